"""What the engine tells about itself: snapshots, cheap enough for every scrape. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex.adapters.histogram import Histogram
from loraplex.adapters.tiers.stats import TierStats

STEP_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper ends of the buckets for the tokens of a step."""


@dataclass(frozen=True)
class EngineStats:
    """Counters only grow."""

    running: int
    waiting: int  # queued or preempted
    kv_usage: float  # 0..1: KV pages in use / all pages of the arena
    adapter_usage: float  # 0..1: adapter pages in use / all pages of the arena
    running_adapters: tuple[str, ...]  # names, sorted, each once
    waiting_adapters: tuple[str, ...]
    resident_adapters: tuple[str, ...]  # digests on the device
    prompt_tokens: int  # counter: prompt tokens of admitted requests
    generation_tokens: int  # counter: tokens sampled
    preemptions: int  # counter
    adapter_loads: int  # counter: copies host -> device
    adapter_evictions: int  # counter
    steps: int  # counter
    queued_tokens: int  # prompt tokens of waiting requests
    clients: int  # tenants, and mixes of adapters without one, that have open requests
    fairness_spread: float  # virtual tokens between the client served most and the one served least, of these
    prefix_hits: int  # counter: prompt tokens found in the prefix cache
    prefix_queries: int  # counter: prompt tokens looked up in it
    stall_seconds: float  # counter: that copies of adapters have taken from steps in which streams decode
    refused: int  # counter: requests answered with 429
    expired: int  # counter: requests whose time was over
    waiting_for_adapters: int = 0  # of those waiting: they could go on if their adapters were there
    adapter_wait: float = 0.0  # counter: seconds that requests have waited so
    step_sizes: Histogram = field(default_factory=lambda: Histogram(STEP_BOUNDS))  # steps by their tokens
    token_budget: int = 0  # tokens that the next step may have
    token_seconds: float = 0.0  # what each of a full step's tokens takes, as learned
    pages: Mapping[str, int] = field(default_factory=dict)  # of the arena, by owner: kv, prefix, adapter, free
    tiers: Mapping[str, TierStats] = field(default_factory=dict)  # by name of the tier
