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
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.server.config import AuthConfig, ServeConfig
from loraplex.server.drain import EXIT_SECONDS, Drain, Shutdown, end_process_after
from loraplex.server.http.listening import make_server
from loraplex.server.startup import StartError, bound_malloc, raise_descriptors

if TYPE_CHECKING:
    from fastapi import FastAPI
    from prometheus_client.registry import Collector

    from loraplex.server.api.services import Adapters
    from loraplex.server.catalog.reconciler import Reconciler
    from loraplex.server.command.build import EngineParts
    from loraplex.server.models.config import ModelConfig
    from loraplex.server.telemetry.tracing import Tracing
    from loraplex.server.tenancy.access import Access
    from loraplex.server.text.grammar import Grammars
    from loraplex.server.text.tokenizer import Tokenizer
    from loraplex.server.text.tokenizers import Tokenizers

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
    for name in ("uvicorn", "loraplex.server.command.app", "loraplex.server.command.build"):
        import_module(name)  # before the weights: what the process takes for itself is counted between them
    imported = time.perf_counter()
    model_config = read_config(folder)
    configured = time.perf_counter()
    tokenizers = read_tokenizers(folder, model_config.vocab_size, config.chat_template)
    grammars = read_grammars(tokenizers)  # before memory is divided: what it takes is the process's own
    laps: tuple[tuple[str, float], ...] = (
        ("imports", imported - start),
        ("configuration", configured - imported),
        ("tokenizer and grammars", time.perf_counter() - configured),
    )
    parts = _build(config, folder, model_config, tokenizers)
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
        asyncio.run(_serve(config, parts, tokenizers, grammars, held, ready))
    finally:
        parts.engine.stop()
        tokenizers.close()
        parts.adapters.close()
        if parts.prefault is not None:
            parts.prefault.stop()
    return 1 if parts.engine.failure is not None else 0


def read_config(folder: Path) -> ModelConfig:
    """Of the base in `folder`. Raises StartError."""
    from loraplex.server.models.config import ModelConfig, UnsupportedModel

    try:
        return ModelConfig.from_hf(folder)
    except UnsupportedModel as error:
        raise StartError(error) from error


def read_tokenizers(folder: Path, rows: int, chat_template: Path | None = None) -> Tokenizers:
    """The tokenizers of the base in `folder`, whose embedding has so many rows.

    chat_template: a file instead of the base's own. Raises StartError.
    """
    from loraplex.server.models.config import GenerationDefaults, UnsupportedModel
    from loraplex.server.text.tokenizer import Tokenizer, TokenizerError
    from loraplex.server.text.tokenizers import Tokenizers

    try:
        eos_ids = GenerationDefaults.from_hf(folder).eos_token_ids
        return Tokenizers(Tokenizer.read(folder, chat_template), rows, eos_ids)
    except (TokenizerError, UnsupportedModel) as error:
        raise StartError(error) from error


def read_grammars(tokenizers: Tokenizers) -> Grammars:
    """What holds answers to grammars, its vocabulary read: that takes 0.8 s with the interpreter's lock held."""
    from loraplex.server.text.grammar import GrammarRefused, Grammars

    grammars = Grammars(tokenizers.base, tokenizers.rows, tokenizers.eos_ids)
    try:
        grammars.load()
    except GrammarRefused as error:
        logger.warning("answers cannot be held to grammars: %s", error)
    return grammars


def _build(config: ServeConfig, folder: Path, model_config: ModelConfig, tokenizers: Tokenizers) -> EngineParts:
    from loraplex.kernels.ops import BackendUnavailable
    from loraplex.server.address_space import address_limit, is_refused_mapping
    from loraplex.server.command.build import build_engine
    from loraplex.server.engine.step.memory import NotEnoughMemory, size
    from loraplex.server.models.checkpoint import WeightsError
    from loraplex.server.models.config import UnsupportedModel

    try:
        parts = build_engine(
            config.engine,
            folder,
            *config.base_names,
            model_config=model_config,
            check_tokenizer=tokenizers.check,
        )
    except Exception as error:
        if is_refused_mapping(error):
            limit = address_limit()
            limited = f"; the address space is limited to {size(limit)} (ulimit -v)" if limit > 0 else ""
            raise StartError(f"{error or 'memory cannot be had'}{limited}") from error
        if isinstance(error, UnsupportedModel | WeightsError | BackendUnavailable | NotEnoughMemory | OSError):
            raise StartError(error) from error
        raise
    _leave_cores_to_kernels()
    limit = parts.model_config.max_position
    if parts.max_model_len > limit:
        raise StartError(f"--max-model-len {parts.max_model_len}: the base was made for at most {limit} tokens")
    return parts


def _leave_cores_to_kernels() -> None:
    """From now on torch works in the thread that calls it; the kernels have their team, and a GPU needs none.

    Torch's threads wait for each other after every operation, 25 times in a logsumexp, and each time for the one whose
    core somebody else has: the scores of 64 rows took 12 ms on two idle cores, 100 with three other processes on them,
    and 10 and 38 in one thread.
    """
    import torch

    torch.set_num_threads(1)


async def _serve(
    config: ServeConfig,
    parts: EngineParts,
    tokenizers: Tokenizers,
    grammars: Grammars,
    held: socket.socket,
    ready: Ready,
) -> None:
    reconciler = await _load_adapters(config, parts)
    more = open_extras(config, parts)
    app, drain = make_app(config, parts, tokenizers, more, grammars), more.drain
    app.openapi()  # 0.2 s, which the first who asks for it would take from everybody
    gc.collect()
    gc.freeze()  # what is here stays: looking through all of it again stopped every thread for 0.1 to 0.5 s
    server = make_server(
        app, lambda port: ready(config, parts, tokenizers.base, port), config.http, config.limits.max_body_bytes
    )
    shutdown = Shutdown(
        drain, config.http.grace_seconds, parts.engine.stop, lambda code: end_process_after(EXIT_SECONDS, code)
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
        if more.tracing is not None:
            await asyncio.to_thread(more.tracing.flush)


async def _load_adapters(config: ServeConfig, parts: EngineParts) -> Reconciler:
    """What is local and named is there or the server does not start; the rest comes, and is followed from then on."""
    from loraplex.adapters.errors import AdapterError
    from loraplex.adapters.registry import check_name
    from loraplex.adapters.sources.sources import parse_source
    from loraplex.server.catalog.adapter_list import AdapterListError, DesiredAdapter
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
            version = await parts.adapters.register(adapter.name, adapter.source)
        except AdapterError as error:
            raise StartError(f"--adapter {adapter.name}={adapter.source}: {error}") from error
        logger.info("adapter %s: rank %d, %d pages", version.name, version.info.rank, version.info.num_pages)
    directory, list_file = config.adapters.directory, config.adapters.list_file
    try:
        reconciler = Reconciler(parts.adapters, directory=directory, list_file=list_file, named=distant)
    except AdapterListError as error:
        raise StartError(f"--adapters-file {error}") from error
    await asyncio.to_thread(reconciler.start)
    if directory is not None:
        logger.info("%d adapters, those of %s among them", len(parts.adapters.registry.list()), directory)
    return reconciler


def open_access(auth: AuthConfig) -> Access | None:
    """The keys; None where none are asked for. Raises StartError."""
    from loraplex.server.tenancy.access import Access
    from loraplex.server.tenancy.keys_file import KeysError, KeysFile
    from loraplex.server.tenancy.tenants import owners_keyring

    if auth.keys_file is not None:
        try:
            return Access(KeysFile(auth.keys_file), open_metrics=auth.open_metrics)
        except KeysError as error:
            raise StartError(error) from error
    if auth.api_keys:
        return Access(owners_keyring(auth.api_keys), open_metrics=True)  # as vLLM has it: nobody's but the owner's
    return None


@dataclass(frozen=True)
class Extras:
    """What a server has beside its engine."""

    adapters: Adapters
    drain: Drain = field(default_factory=Drain)
    tracing: Tracing | None = None
    collectors: tuple[Collector, ...] = ()  # what else metrics tell


def open_extras(config: ServeConfig, parts: EngineParts) -> Extras:
    """Traces, and what was loaded before. Raises StartError."""
    from loraplex.server.catalog.saved import Remembering, StateError, StateFile
    from loraplex.server.telemetry.tracing import TracingUnavailable, start_tracing

    endpoint, folder = config.telemetry.otlp_endpoint, config.http.state_dir
    adapters: Adapters = parts.adapters
    collectors: tuple[Collector, ...] = ()
    try:
        tracing = None if endpoint is None else start_tracing(endpoint)
        if folder is not None:
            remembering = Remembering(parts.adapters, StateFile(folder))
            remembering.restore()
            adapters, collectors = remembering, (remembering.collector(),)
    except (TracingUnavailable, StateError) as error:
        raise StartError(error) from error
    return Extras(adapters, tracing=tracing, collectors=collectors)


def make_app(
    config: ServeConfig,
    parts: EngineParts,
    tokenizers: Tokenizers,
    extras: Extras | None = None,
    grammars: Grammars | None = None,
) -> FastAPI:
    """The application around a loaded base."""
    from loraplex.adapters.tiers.merging import merge_versions
    from loraplex.kernels.records import BLOCK_SIZE
    from loraplex.server.api.services import Base, Inside, LocalSources, Services
    from loraplex.server.catalog.on_demand import OnDemand
    from loraplex.server.command.app import create_app
    from loraplex.server.telemetry.engine_metrics import Limits
    from loraplex.server.telemetry.metrics import Metrics
    from loraplex.server.text.fair_pool import TextPools
    from loraplex.server.text.grammar import Grammars

    names, engine = config.base_names, parts.engine
    downloads = parts.adapters.downloads
    merge = merge_versions if downloads is None else partial(merge_versions, locate=downloads.locate)
    model = parts.model_config
    base = Base(
        names=names,
        root=config.base,
        vocab_size=model.vocab_size,
        max_model_len=parts.max_model_len,
        created=int(time.time()),
        dtype=str(parts.dtype).removeprefix("torch."),
        device="cpu" if parts.memory.shared else "cuda",
        max_requests=config.engine.max_num_seqs + config.engine.max_waiting,
        cache_tokens=engine.num_pages * BLOCK_SIZE,
    )
    local_sources = LocalSources(config.auth.allowed_paths, config.adapters.directory)
    extras = extras or Extras(parts.adapters)
    limits = Limits(
        names[0],
        parts.max_model_len,
        BLOCK_SIZE,
        engine.num_pages,
        config.engine.num_slots,
        config.telemetry.max_series,
    )
    metrics = Metrics(limits, engine.stats, parts.cache.places, parts.adapters.registry)
    for collector in extras.collectors:
        metrics.add(collector)
    parts.cache.watch = metrics.adapters
    return create_app(
        Services(
            base=base,
            engine=engine,
            adapters=extras.adapters,
            tokenizers=tokenizers,
            texts=TextPools(),
            grammars=grammars or Grammars(tokenizers.base, tokenizers.rows, tokenizers.eos_ids),
            defaults=parts.defaults,
            metrics=metrics,
            drain=extras.drain,
            tracing=extras.tracing,
            limits=config.limits,
            on_demand=OnDemand(parts.adapters, merge),
            inside=Inside(
                engine.stats,
                parts.cache.places,
                parts.cache.page_owners,
                parts.memory.page_bytes,
                config.engine.max_num_seqs,
                config.engine.num_slots,
                tuple(parts.memory.parts()),
            ),
            access=open_access(config.auth),
            local_sources=local_sources if config.auth.keys_file is not None else None,
            cors_origins=config.auth.cors_origins,
            sse_keep_alive=config.http.sse_keep_alive,
        )
    )
