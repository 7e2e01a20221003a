"""From a ServeConfig to a listening server and back down again.

Order: what can be wrong and is quick to find out comes first (the port, the folder), then the base is loaded and the
adapters with it, and only then the server listens: whoever can connect gets an answer.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.server.command.load import load_engine, read_config, read_defaults, read_grammars, read_tokenizers
from loraplex.server.config import ServeConfig
from loraplex.server.drain import EXIT_SECONDS, Shutdown, end_process_after
from loraplex.server.http.listening import make_server
from loraplex.server.startup import StartError, bound_malloc, raise_descriptors

if TYPE_CHECKING:
    from loraplex.server.api.services import Services
    from loraplex.server.catalog.reconciler import Reconciler
    from loraplex.server.catalog.state_store import StateStore
    from loraplex.server.command.build import EngineParts
    from loraplex.server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Ready = Callable[[ServeConfig, "EngineParts", "Tokenizer", int], None]
"""Called once the server listens, with the port."""


def run(config: ServeConfig, held: socket.socket, folder: Path, ready: Ready) -> int:
    """Load the base in `folder`, serve on `held` until told to stop, and stop everything. Raises StartError.

    Returns the exit code: 0, or 1 where the engine crashed.
    """
    start = time.perf_counter()
    bound_malloc()
    raise_descriptors()
    for name in ("uvicorn", "loraplex.server.command.app", "loraplex.server.command.compose"):
        import_module(name)  # before the weights: what the process takes for itself is counted between them
    from loraplex.server.command.compose import make_services

    state = _open_state(config)
    imported = time.perf_counter()
    model_config, defaults = read_config(folder), read_defaults(folder)
    configured = time.perf_counter()
    tokenizers = read_tokenizers(folder, model_config.vocab_size, defaults.eos_token_ids, config.chat_template)
    grammars = read_grammars(tokenizers)  # before memory is divided: what it takes is the process's own
    laps: tuple[tuple[str, float], ...] = (
        ("imports", imported - start),
        ("configuration", configured - imported),
        ("tokenizer and grammars", time.perf_counter() - configured),
    )
    parts = load_engine(config, folder, model_config, tokenizers)
    laps += parts.startup
    logger.info(
        "loaded in %.1f s: %s", time.perf_counter() - start, ", ".join(f"{name} {lap:.1f}" for name, lap in laps)
    )
    # A thread that wants the GIL asks for it after this long. At the default of 5 ms the engine, whose steps take 5 to
    # 20 ms, waits behind whoever checks an adapter: p99 between tokens 40 ms beside registrations, 34 with it (1 run).
    sys.setswitchinterval(0.0005)
    if parts.prefault is not None:
        parts.prefault.start()
    parts.engine.start()
    try:
        services = partial(make_services, config, state, parts, tokenizers, defaults, grammars)
        asyncio.run(_serve(config, parts, services, held, ready))
    finally:
        parts.engine.stop()
        tokenizers.close()
        parts.adapters.close()
        state.close()
        if parts.prefault is not None:
            parts.prefault.stop()
    return 1 if parts.engine.failure is not None else 0


def _open_state(config: ServeConfig) -> StateStore:
    """Take the folder of the state before anything that takes long. Raises StartError."""
    from loraplex.server.catalog.state_store import StateError, StateStore

    try:
        return StateStore(config.run.state_dir)
    except StateError as error:
        raise StartError(error) from error


async def _serve(
    config: ServeConfig,
    parts: EngineParts,
    make_services: Callable[[], Services],
    held: socket.socket,
    ready: Ready,
) -> None:
    from loraplex.server.command.app import create_app
    from loraplex.server.command.defaults import check_default

    reconciler = await _load_adapters(config, parts)
    services = make_services()
    check_default(services, config.adapters.default_adapter)
    app = create_app(services)
    app.openapi()  # 0.2 s, which the first who asks for it would take from everybody
    gc.collect()
    gc.freeze()  # what is here stays: looking through all of it again stopped every thread for 0.1 to 0.5 s
    server = make_server(
        app,
        lambda port: ready(config, parts, services.tokenizers.base, port),
        config.http,
        config.limits.max_body_bytes,
    )
    shutdown = Shutdown(
        services.drain,
        config.run.grace_seconds,
        parts.engine.stop,
        lambda code: end_process_after(EXIT_SECONDS, code),
    )
    shutdown.handle_signals()
    parts.engine.on_crash = shutdown.crash
    if parts.engine.failure is not None:
        shutdown.crash()
    ending = asyncio.create_task(shutdown.run(server.close))
    try:
        await server.serve(sockets=[held])
    finally:
        ending.cancel()
        reconciler.stop()
        if services.prover is not None:
            services.prover.close()
        if services.tracing is not None:
            await asyncio.to_thread(services.tracing.flush)


async def _load_adapters(config: ServeConfig, parts: EngineParts) -> Reconciler:
    """What is local and named is there or the server does not start; the rest comes, and is followed from then on."""
    from loraplex.adapters.errors import AdapterError
    from loraplex.adapters.names import check_name
    from loraplex.adapters.sources.sources import parse_source
    from loraplex.server.catalog.adapter_list import AdapterListError, DesiredAdapter
    from loraplex.server.catalog.manager import COMMAND
    from loraplex.server.catalog.reconciler import Reconciler

    distant = []
    for adapter in config.adapters.named:
        try:
            if parse_source(adapter.source).is_remote:
                check_name(adapter.name)
                distant.append(DesiredAdapter(adapter.name, adapter.source, enforced=False))
                continue
        except AdapterError as error:
            raise StartError(f"--adapter {adapter.name}: {error}") from error
        try:
            version = await parts.adapters.register(adapter.name, adapter.source, by=COMMAND)
        except AdapterError as error:
            raise StartError(f"--adapter {adapter.name}={adapter.source}: {error}") from error
        logger.info("adapter %s: %s", version.name, version.info.size)
    directory, list_file = config.adapters.directory, config.adapters.list_file
    try:
        reconciler = Reconciler(parts.adapters, directory=directory, list_file=list_file, named=distant)
    except AdapterListError as error:
        raise StartError(f"--adapters-file {error}") from error
    await asyncio.to_thread(reconciler.start)
    if directory is not None:
        logger.info("%d adapters, those of %s among them", len(parts.adapters.registry.list()), directory)
    return reconciler
