"""Composition: the services of one server, around an engine that is built."""

from __future__ import annotations

import time
from functools import partial

from loraplex.adapters.tiers.merging import merge_versions
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.server.api.services import Services
from loraplex.server.catalog.on_demand import OnDemand
from loraplex.server.catalog.saved import Remembering
from loraplex.server.catalog.state_store import StateError, StateStore
from loraplex.server.catalog.state_writer import StateWriter
from loraplex.server.catalog.versions import Versions
from loraplex.server.command.build import EngineParts
from loraplex.server.command.keys import open_access
from loraplex.server.command.proving import keep_receipt, make_prover, open_audit
from loraplex.server.config import ServeConfig
from loraplex.server.facts import Facts
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
        adapters = Remembering(manager, writer, Versions(writer))
        adapters.restore()
    except (TracingUnavailable, StateError) as error:
        raise StartError(error) from error
    prover, audit = make_prover(parts, (*config.base_names, config.base)), None
    if state.folder is not None:
        metrics.add(writer.collector())
        audit = open_audit(state.folder, adapters.versions)
    prover.on_made = partial(keep_receipt, writer, adapters.versions, audit)
    downloads = manager.downloads
    merge = merge_versions if downloads is None else partial(merge_versions, locate=downloads.locate)
    keys = config.auth.keys_file
    return Services(
        prover=prover,
        audit=audit,
        facts=facts,
        engine=engine,
        adapters=adapters,
        on_demand=OnDemand(manager, merge),
        tokenizers=tokenizers,
        texts=TextPools(),
        grammars=grammars,
        defaults=defaults,
        metrics=metrics,
        access=open_access(config.auth),
        local_sources=None if keys is None else LocalSources(config.auth.allowed_paths, config.adapters.directory),
        tracing=tracing,
    )


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
