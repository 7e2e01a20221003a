"""A whole server on a free loopback port, in a thread of the test's process: real engine, real sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraplex.server.command.app import create_app
from loraplex.server.command.build import EngineParts, build_engine
from loraplex.server.command.compose import make_services
from loraplex.server.command.load import read_defaults, read_tokenizers
from loraplex.server.config import AuthConfig, EngineConfig, HttpConfig, ServeConfig
from loraplex.server.http.listening import bind, make_server
from loraplex.server.models.config import ModelConfig
from loraplex.server.text.grammar import Grammars
from loraplex.server.text.tokenizer import Tokenizer
from tests.support.waiting import LIMIT


@dataclass(frozen=True)
class LiveServer:
    url: str
    parts: EngineParts
    tokenizer: Tokenizer


@contextmanager
def live_server(base: Path, name: str, engine: EngineConfig, auth: AuthConfig | None = None) -> Iterator[LiveServer]:
    """Serve the checkpoint in `base` as `name` while the block runs."""
    config = ServeConfig(str(base), (name,), engine, http=HttpConfig(grace_seconds=1), auth=auth or AuthConfig())
    model_config, defaults = ModelConfig.from_hf(base), read_defaults(base)
    tokenizers = read_tokenizers(base, model_config.vocab_size, defaults.eos_token_ids)
    grammars = Grammars(tokenizers.base, tokenizers.rows, tokenizers.eos_ids)
    parts = build_engine(engine, base, name, model_config=model_config, check_tokenizer=tokenizers.check)
    held = bind("127.0.0.1", 0)
    listening = threading.Event()
    app = create_app(make_services(config, parts, tokenizers, defaults, grammars))
    server = make_server(app, lambda port: listening.set())
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[held])))
    parts.engine.start()
    thread.start()
    try:
        assert listening.wait(LIMIT)
        yield LiveServer(f"http://127.0.0.1:{held.getsockname()[1]}", parts, tokenizers.base)
    finally:
        server.close()
        thread.join(LIMIT)
        parts.engine.stop()
        parts.adapters.close()
        tokenizers.close()
        held.close()
