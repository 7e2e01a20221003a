"""Composition: the services of one server, around an engine that is built."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from loraplex.adapters.sources.spool import Spool
from loraplex.adapters.tiers.merging import merge_versions
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.server.api.services import Services
from loraplex.server.catalog.manager import AdapterManager
from loraplex.server.catalog.on_demand import OnDemand
from loraplex.server.catalog.pushed import Pushed
from loraplex.server.catalog.saved import Remembering, StateError, StateFile
from loraplex.server.command.build import EngineParts
from loraplex.server.command.keys import open_access
from loraplex.server.config import ServeConfig
from loraplex.server.facts import Facts
from loraplex.server.models.demo import default_cache_dir
from loraplex.server.startup import StartError
from loraplex.server.telemetry.metrics import Metrics
from loraplex.server.telemetry.tracing import TracingUnavailable, start_tracing
from loraplex.server.tenancy.local_sources import LocalSources
from loraplex.server.text.fair_pool import TextPools
from loraplex.server.text.generation_defaults import GenerationDefaults
from loraplex.server.text.grammar import Grammars
from loraplex.server.text.tokenizers import Tokenizers


def make_services(
    config: ServeConfig, parts: EngineParts, tokenizers: Tokenizers, defaults: GenerationDefaults, grammars: Grammars
) -> Services:
    """Put the services around a loaded base together; begin to load what was loaded before. Raises StartError."""
    engine, manager, cache = parts.engine, parts.adapters, parts.cache
    facts = make_facts(config, parts)
    metrics = Metrics(facts, engine.stats, manager.registry)
    cache.watch = metrics.adapters
    adapters: AdapterManager | Remembering = manager
    endpoint, folder = config.run.otlp_endpoint, config.run.state_dir
    try:
        tracing = None if endpoint is None else start_tracing(endpoint)
        if folder is not None:
            adapters = _remembering(manager, folder)
            metrics.add(adapters.collector())
    except (TracingUnavailable, StateError) as error:
        raise StartError(error) from error
    downloads = manager.downloads
    merge = merge_versions if downloads is None else partial(merge_versions, locate=downloads.locate)
    keys = config.auth.keys_file
    on_demand = OnDemand(manager, merge)
    return Services(
        facts=facts,
        engine=engine,
        adapters=adapters,
        on_demand=on_demand,
        pushed=Pushed(manager, on_demand.quota, spool_of(config), config.adapters.downloads.max_bytes),
        tokenizers=tokenizers,
        texts=TextPools(),
        grammars=grammars,
        defaults=defaults,
        metrics=metrics,
        access=open_access(config.auth),
        local_sources=None if keys is None else LocalSources(config.auth.allowed_paths, config.adapters.directory),
        tracing=tracing,
    )


def spool_of(config: ServeConfig) -> Spool:
    """Keep what clients push beside the state, which remembers it, or for the life of the process."""
    adapters, state = config.adapters, config.run.state_dir
    if state is not None:
        return Spool(state / "pushed", adapters.pushed_bytes, keep=True)
    return Spool(adapters.downloads.folder or default_cache_dir() / "downloads", adapters.pushed_bytes)


def make_facts(config: ServeConfig, parts: EngineParts) -> Facts:
    """State what was told and what base and machine decided."""
    memory = parts.memory
    return Facts(
        config,
        vocab_size=parts.model_config.vocab_size,
        max_model_len=memory.max_model_len,
        num_pages=memory.num_pages,
        page_bytes=memory.page_bytes,
        block_size=BLOCK_SIZE,
        created=int(time.time()),
        formats=parts.formats,
        device="cpu" if memory.shared else "cuda",
        memory=tuple(memory.parts()),
    )


def _remembering(manager: AdapterManager, folder: Path) -> Remembering:
    """Raises StateError."""
    remembering = Remembering(manager, StateFile(folder))
    remembering.restore()
    return remembering
