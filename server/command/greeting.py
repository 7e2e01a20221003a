"""What `loraplex serve` prints once it listens: where the memory goes, the address, and three lines to try."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from typing import TYPE_CHECKING

from loraplex.server.config import ServeConfig
from loraplex.server.version import version

if TYPE_CHECKING:
    from loraplex.server.command.build import EngineParts
    from loraplex.server.engine.step.memory import MemoryPlan
    from loraplex.server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def greet(config: ServeConfig, parts: EngineParts, tokenizer: Tokenizer, port: int) -> None:
    """Where the memory goes, the address and three lines to try. A disk that is full keeps nobody from being served."""
    try:
        _greet(config, parts, tokenizer, port)
    except OSError as error:
        logger.warning("what is printed at the start cannot be written: %s", error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it would fail at the end


def _greet(config: ServeConfig, parts: EngineParts, tokenizer: Tokenizer, port: int) -> None:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.http.host, config.http.host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    names = [adapter.name for adapter in parts.adapters.registry.list()]
    name = config.base_names[0]
    adapters = "1 adapter" if len(names) == 1 else f"{len(names)} adapters"
    _show_memory(parts.memory, parts.token_budget)
    print(f"\nloraplex {version()} serves {name} and {adapters} at {url}\n")
    auth = '-H "Authorization: Bearer $LORAPLEX_API_KEY" ' if config.auth.asks_for_keys else ""
    print(f"  curl {auth}{url}/v1/models")
    chats = tokenizer.has_chat_template
    print(_example(url, auth, chats, name, "What is the capital of France?"))
    if names:
        print(_example(url, auth, chats, names[0], "Tell me about the sea."))
    else:
        print(_example(url, auth, chats, name, "Tell me about the sea.", stream=True))
    print(flush=True)


def _show_memory(memory: MemoryPlan, token_budget: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from loraplex.server.engine.step.memory import size

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, nbytes, remark in memory.parts():
        table.add_row(f"  {name}", size(nbytes), remark)
    where = "memory" if memory.shared else "device memory"
    table.add_row(f"  {where} in all", size(memory.total_bytes), "what --memory sets")
    print(f"\ncontext of {memory.max_model_len:,} tokens, steps of {token_budget:,}\n")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _example(url: str, auth: str, chats: bool, model: str, prompt: str, **extra: bool) -> str:
    content = {"messages": [{"role": "user", "content": prompt}]} if chats else {"prompt": prompt}
    body = json.dumps({"model": model, **content, "max_tokens": 64, **extra})
    route = "chat/completions" if chats else "completions"
    unbuffered = "-N " if extra.get("stream") else ""
    return f"  curl {unbuffered}{auth}{url}/v1/{route} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
