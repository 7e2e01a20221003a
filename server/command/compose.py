"""Composition: the services of one server, around an engine that is built."""

from __future__ import annotations

import time
from collections.abc import Collection
from functools import partial

from loraplex.adapters.sources.sources import resolve
from loraplex.adapters.sources.spool import Spool
from loraplex.adapters.tiers.merging import merge_versions
from loraplex.adapters.version import AdapterVersion
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.server.api.services import Services
from loraplex.server.catalog.aliases import Aliases
from loraplex.server.catalog.copies import VersionCopies
from loraplex.server.catalog.expiry import Expiry
from loraplex.server.catalog.manager import AdapterManager
from loraplex.server.catalog.on_demand import OnDemand
from loraplex.server.catalog.pushed import Pushed
from loraplex.server.catalog.saved import Remembering
from loraplex.server.catalog.state_store import StateError, StateStore
from loraplex.server.catalog.state_writer import StateWriter
from loraplex.server.catalog.version_records import KeptName
from loraplex.server.catalog.versions import Versions
from loraplex.server.command.build import EngineParts
from loraplex.server.command.keys import open_access
from loraplex.server.command.proving import keep_receipt, kept_receipt, make_prover, note_operator, open_audit
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
    config: ServeConfig,
    state: StateStore,
    parts: EngineParts,
    tokenizers: Tokenizers,
    defaults: GenerationDefaults,
    grammars: Grammars,
) -> Services:
    """Put the services around a loaded base together; begin to load what was loaded before. Raises StartError."""
    engine, manager, cache = parts.engine, parts.adapters, parts.cache
    facts = make_facts(config, parts)
    metrics = Metrics(facts, engine.stats, manager.registry)
    cache.watch = metrics.adapters
    endpoint, writer = config.run.otlp_endpoint, StateWriter(state)
    try:
        tracing = None if endpoint is None else start_tracing(endpoint)
        kept = {row.source: row.name.rpartition("/")[0] for row in state.rows(KeptName)}
        spool = _spool(config, state, kept)
        adapters = _remembering(config, manager, writer)
        aliases = Aliases(adapters)
    except (TracingUnavailable, StateError) as error:
        raise StartError(error) from error
    prover, audit = make_prover(parts, (*config.base_names, config.base), state_dir=state.folder), None
    if state.folder is not None:
        metrics.add(writer.collector())
        audit = open_audit(state.folder, adapters.versions)
        note_operator(writer, manager.registry, audit)
    prover.remember(partial(kept_receipt, adapters.versions))
    prover.on_made = partial(keep_receipt, writer, adapters.versions, audit)
    downloads = manager.downloads
    merge = merge_versions if downloads is None else partial(merge_versions, locate=downloads.locate)
    keys = config.auth.keys_file
    on_demand = OnDemand(manager, merge)
    return Services(
        prover=prover,
        audit=audit,
        facts=facts,
        engine=engine,
        adapters=adapters,
        aliases=aliases,
        on_demand=on_demand,
        pushed=Pushed(
            manager, on_demand.quota, spool, config.adapters.downloads.max_bytes, kept, adapters.versions.copied_bytes
        ),
        tokenizers=tokenizers,
        texts=TextPools(),
        grammars=grammars,
        defaults=defaults,
        metrics=metrics,
        access=open_access(config.auth),
        local_sources=None if keys is None else LocalSources(config.auth.allowed_paths, config.adapters.directory),
        tracing=tracing,
    )


def _spool(config: ServeConfig, state: StateStore, kept: Collection[str]) -> Spool:
    """Keep what clients push beside the state, which remembers it, or for the life of the process."""
    adapters = config.adapters
    if state.folder is not None:
        spool = Spool(state.folder / "pushed", adapters.pushed_bytes, keep=True)
        spool.keep_only(kept)
        return spool
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


def _remembering(config: ServeConfig, manager: AdapterManager, writer: StateWriter) -> Remembering:
    """Have changes written down, and what was loaded before come back. Raises StateError."""
    folder, locate = config.run.state_dir, resolve if manager.downloads is None else manager.downloads.locate
    copies = VersionCopies(None if folder is None else folder / "versions", config.adapters.retained_bytes, locate)
    adapters = Remembering(manager, writer, Versions(writer), copies, config.adapters.retain)
    forget = manager.registry.on_drained

    def drained(version: AdapterVersion) -> None:
        if forget is not None:
            forget(version)
        adapters.drained(version)

    manager.registry.on_drained = drained
    adapters.restore()
    Expiry(adapters).start()
    return adapters
