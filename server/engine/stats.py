"""What the engine tells about itself: frozen records that its thread publishes and any thread reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex.adapters.histogram import Histogram
from loraplex.adapters.tiers.stats import AdapterStats

STEP_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper ends of the buckets for the tokens of a step."""


@dataclass(frozen=True)
class EngineStats:
    """The engine's state after a step. Counters only grow."""

    running: int = 0
    waiting: int = 0  # queued or preempted
    kv_usage: float = 0.0  # 0..1: KV pages in use / all pages of the arena
    adapter_usage: float = 0.0  # 0..1: adapter pages in use / all pages of the arena
    running_adapters: tuple[str, ...] = ()  # names, sorted, each once
    waiting_adapters: tuple[str, ...] = ()
    prompt_tokens: int = 0  # counter: prompt tokens of admitted requests
    generation_tokens: int = 0  # counter: tokens sampled
    preemptions: int = 0  # counter
    steps: int = 0  # counter
    queued_tokens: int = 0  # prompt tokens of waiting requests
    clients: int = 0  # tenants, and mixes of adapters without one, that have open requests
    fairness_spread: float = 0.0  # virtual tokens between the client served most and the one served least, of these
    prefix_hits: int = 0  # counter: prompt tokens found in the prefix cache
    prefix_queries: int = 0  # counter: prompt tokens looked up in it
    refused: int = 0  # counter: requests answered with 429
    expired: int = 0  # counter: requests whose time was over
    waiting_for_adapters: int = 0  # of those waiting: they could go on if their adapters were there
    adapter_wait: float = 0.0  # counter: seconds that requests have waited so
    step_sizes: Histogram = field(default_factory=lambda: Histogram(STEP_BOUNDS))  # steps by their tokens
    token_budget: int = 0  # tokens that the next step may have
    token_seconds: float = 0.0  # what each of a full step's tokens takes, as learned
    pages: Mapping[str, int] = field(default_factory=dict)  # of the arena, by owner: kv, prefix, adapter, free
    adapters: AdapterStats = field(default_factory=AdapterStats)
