"""From a ServeConfig to a listening server and back down again.

Order: what can be wrong and is quick to find out comes first (the port, the folder), then the base is loaded and the
adapters with it, and only then the server listens: whoever can connect gets an answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.server.config import DEMO, HttpConfig, ServeConfig

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from loraplex.server.engine.build import EngineParts
    from loraplex.server.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BASE_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
"""What is downloaded of a base's Hub repository: never a pickle, never code."""

Ready = Callable[[ServeConfig, "EngineParts", "Tokenizer", int], None]
"""Called once the server listens, with the port."""


class StartError(Exception):
    """The server cannot start; the message is one line that says why and what to do."""

    def __init__(self, reason: object) -> None:
        super().__init__(" ".join(str(reason).split()))


def prepare_environment(environ: MutableMapping[str, str]) -> None:
    """Settings that libraries read when they are loaded: call before torch is imported. The user's own are kept.

    Waiting OpenMP threads sleep: spinning, they would take the cores from the API's thread and, in containers, from
    the quota. tokenizers gets no pool of its own beside torch's.
    """
    settings = {
        "OMP_NUM_THREADS": str(usable_cpus()),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in settings.items():
        environ.setdefault(name, value)


def usable_cpus() -> int:
    """Cores this process may use: its affinity, less where a container's quota is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2 here, or the quota is "max"
        return cores


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the port but does not listen yet. Raises StartError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # "localhost" is both: clients that try one only try the older
        family, kind, proto, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        held = socket.socket(family, kind, proto)
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
        return held
    except OSError as error:
        held.close()
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}; --port moves it") from error


def find_base(base: str) -> Path:
    """The folder of the base `base`: made ("demo"), local, or downloaded. Raises StartError."""
    if base == DEMO:
        from loraplex.server.models.demo import DemoError, ensure_demo_base

        try:
            return ensure_demo_base()
        except DemoError as error:
            raise StartError(error) from error
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise StartError(f"the base {base!r} is a file; give the folder that holds config.json and the safetensors")
    if base.count("/") != 1 or base.startswith(("/", ".", "~")):
        raise StartError(f"there is no folder {base!r}; give a folder, a Hub id such as org/name, or {DEMO!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=list(BASE_FILES)))
    except Exception as error:  # the Hub client fails in a dozen ways
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise StartError(f"there is no folder {base!r}, and the Hub could not give it either: {reason}") from error


def run(config: ServeConfig, held: socket.socket, folder: Path, ready: Ready) -> None:
    """Load the base in `folder`, serve on `held` until told to stop, and stop everything. Raises StartError."""
    from loraplex.server.engine.tokenizer import Tokenizer, TokenizerError

    try:
        tokenizer = Tokenizer(folder)
    except TokenizerError as error:
        raise StartError(error) from error
    parts = _build(config, folder)
    parts.engine.start()
    try:
        asyncio.run(_serve(config, parts, tokenizer, held, ready))
    finally:
        parts.engine.stop()
        parts.adapters.close()


def _build(config: ServeConfig, folder: Path) -> EngineParts:
    from loraplex.kernels.backend import BackendUnavailable
    from loraplex.server.engine.arena import NotEnoughMemory
    from loraplex.server.engine.build import build_engine
    from loraplex.server.models.config import UnsupportedModel
    from loraplex.server.models.weights import WeightsError

    try:
        parts = build_engine(config.engine, folder, config.base_names[0])
    except (UnsupportedModel, WeightsError, BackendUnavailable, NotEnoughMemory, OSError) as error:
        raise StartError(error) from error
    limit = parts.model_config.max_position
    if parts.max_model_len > limit:
        raise StartError(f"--max-model-len {parts.max_model_len}: the base was made for at most {limit} tokens")
    return parts


async def _serve(
    config: ServeConfig, parts: EngineParts, tokenizer: Tokenizer, held: socket.socket, ready: Ready
) -> None:
    await _load_adapters(config, parts)
    server = make_server(
        make_app(config, parts, tokenizer), config.http, lambda port: ready(config, parts, tokenizer, port)
    )
    # uvicorn stops at these, puts back the handlers it found and raises the signal once more, to end the process as the
    # signal would have. Here the process goes on to stop the engine and ends well.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    await server.serve(sockets=[held])


async def _load_adapters(config: ServeConfig, parts: EngineParts) -> None:
    from loraplex.adapters.errors import AdapterError

    for adapter in config.adapters.named:
        try:
            version = await parts.adapters.register(adapter.name, adapter.source)
        except AdapterError as error:
            raise StartError(f"--adapter {adapter.name}={adapter.source}: {error}") from error
        logger.info("adapter %s: rank %d, %d pages", version.name, version.rank, version.num_pages)
    if config.adapters.directory is not None:
        found = await parts.adapters.register_folder(config.adapters.directory)
        logger.info("%d adapters from %s", len(found), config.adapters.directory)


def make_server(app: FastAPI, http: HttpConfig, on_listening: Callable[[int], None]) -> uvicorn.Server:
    """A server for `serve(sockets=[bind(...)])`; `on_listening(port)` is called once it answers."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_listening(self.servers[0].sockets[0].getsockname()[1])

    return Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=75,  # longer than clients keep theirs, or they send into a closing connection
            timeout_graceful_shutdown=http.shutdown_seconds,
        )
    )


def make_app(config: ServeConfig, parts: EngineParts, tokenizer: Tokenizer) -> FastAPI:
    """The application around a loaded base."""
    from loraplex.kernels.metadata import BLOCK_SIZE
    from loraplex.server.api.parts import Base, Parts
    from loraplex.server.app import create_app
    from loraplex.server.metrics import Limits, Metrics

    names, engine = config.base_names, parts.engine
    limits = Limits(names[0], parts.max_model_len, BLOCK_SIZE, engine.num_pages, config.engine.num_slots)
    registry = parts.adapters.registry
    return create_app(
        Parts(
            base=Base(names, config.base, parts.model_config.vocab_size, parts.max_model_len, int(time.time())),
            engine=engine,
            adapters=parts.adapters,
            tokenizer=tokenizer,
            defaults=parts.defaults,
            metrics=Metrics(limits, engine.stats, lambda: [(v.name, v.digest) for v in registry.list()]),
            max_body_bytes=config.http.max_body_bytes,
        )
    )
