"""A server as `loraplex serve` makes it, whose engine can also be asked without HTTP: both with one engine, in turns.

    python -m loraplex.benchmarks.api.inside BASE ROWS      what host.serve_host() starts

Its standard output and input are lines of JSON. First it says {"port": ..., "model": ...}. Each line
{"streams": n, "requests": [[prompt, tokens], ...]} is a closed loop of n requests at a time, answered by
{"seconds": ..., "tokens": ...}. The end of its input is the server's.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplex.server.command.build import EngineParts
    from loraplex.server.config import ServeConfig
    from loraplex.server.text.tokenizer import Tokenizer

MAX_MODEL_LEN, STEP_TOKENS = 1024, 256


async def ask_engine(
    parts: EngineParts, tokenizer: Tokenizer, requests: Sequence[tuple[str, int]], streams: int
) -> int:
    """Generated tokens of (prompt, tokens), greedy, `streams` at a time: tokens to text as the API does it, no more."""
    from loraplex.server.engine.request import GenerationRequest, SamplingParams
    from loraplex.server.text.detokenizer import Detokenizer

    queue = [(tuple(tokenizer.encode(prompt)), tokens) for prompt, tokens in reversed(requests)]
    found = 0

    async def stream() -> None:
        nonlocal found
        while queue:
            prompt, tokens = queue.pop()
            params = SamplingParams(max_tokens=tokens, temperature=0.0)
            request = GenerationRequest(secrets.token_hex(16), prompt, params, arrival=time.monotonic())
            reader, pieces = Detokenizer(tokenizer, prompt), list[str]()
            async for event in parts.engine.submit(request):
                if event.error is not None:
                    raise event.error
                if event.token_id is not None:
                    pieces.append(reader.push(event.token_id))
                    found += 1
            pieces.append(reader.finish())

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
    return found


def _answer_lines(parts: EngineParts, tokenizer: Tokenizer, loop: asyncio.AbstractEventLoop) -> None:
    """In a thread of its own; the end of the lines is the end of the server."""

    async def timed(question: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        tokens = await ask_engine(parts, tokenizer, question["requests"], question["streams"])
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    try:
        for line in sys.stdin:
            _say(asyncio.run_coroutine_threadsafe(timed(json.loads(line)), loop).result())
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    from loraplex.server import startup
    from loraplex.server.command import launch
    from loraplex.server.config import LogFormat, RunConfig, ServeConfig
    from loraplex.server.http import listening
    from loraplex.server.telemetry.logs import set_up

    base, rows = sys.argv[1], int(sys.argv[2])
    held = listening.bind("127.0.0.1", 0)
    startup.prepare_environment(os.environ)
    set_up(LogFormat.text)
    startup.end_on_sigterm()
    folder = startup.find_base(base)
    from loraplex.server.config_engine import EngineConfig

    def ready(config: ServeConfig, parts: EngineParts, tokenizer: Tokenizer, port: int) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=_answer_lines, args=(parts, tokenizer, loop), daemon=True).start()
        _say({"port": port, "model": config.base_names[0]})

    engine = EngineConfig(max_num_seqs=rows, max_model_len=MAX_MODEL_LEN, token_budget=STEP_TOKENS)
    config = ServeConfig(base, engine=engine, run=RunConfig(grace_seconds=1))
    sys.exit(launch.run(config, held, folder, ready))


if __name__ == "__main__":
    main()
