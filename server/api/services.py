"""What the routes work with: everything they use comes in here, nothing is global."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from loraplex.server.api.abort import OpenAnswers
from loraplex.server.api.body import Bodies
from loraplex.server.catalog.aliases import Aliases
from loraplex.server.catalog.on_demand import OnDemand
from loraplex.server.catalog.pushed import Pushed
from loraplex.server.catalog.saved import Remembering
from loraplex.server.config import RequestLimits
from loraplex.server.drain import Drain
from loraplex.server.engine.engine import Engine
from loraplex.server.facts import Facts
from loraplex.server.proof.audit import AuditLog
from loraplex.server.proof.prover import Prover
from loraplex.server.telemetry.metrics import Metrics
from loraplex.server.telemetry.tracing import Tracing
from loraplex.server.tenancy.access import Access
from loraplex.server.tenancy.local_sources import LocalSources
from loraplex.server.text.fair_pool import TextPools
from loraplex.server.text.generation_defaults import GenerationDefaults
from loraplex.server.text.grammar import Grammars
from loraplex.server.text.tokenizers import Tokenizers


@dataclass(frozen=True)
class Services:
    """Hold what runs in one server."""

    facts: Facts
    engine: Engine
    adapters: Remembering
    aliases: Aliases
    on_demand: OnDemand
    pushed: Pushed
    tokenizers: Tokenizers
    texts: TextPools
    grammars: Grammars
    defaults: GenerationDefaults
    metrics: Metrics
    access: Access | None = None  # None: no keys are asked for
    local_sources: LocalSources | None = None  # folders that requests may load adapters from; None: any
    tracing: Tracing | None = None  # None: no traces
    prover: Prover | None = None  # None: no receipts are made
    audit: AuditLog | None = None  # None: there is no --state-dir to keep one in
    drain: Drain = field(default_factory=Drain)
    open_answers: OpenAnswers = field(default_factory=OpenAnswers)

    @property
    def limits(self) -> RequestLimits:
        """Return the limits of what one request may ask for."""
        return self.facts.config.limits

    @cached_property
    def bodies(self) -> Bodies:
        """Return the reader of requests' bodies."""
        return Bodies(self.limits)
