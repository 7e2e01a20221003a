"""How memory is divided: who gets how much of --memory, and what is refused. Arithmetic only: nothing is allocated.

On the CPU everything is in one memory, and the plan is the process's whole resident set:

    | process | weights, as packed | arena: KV cache and adapters | host store | scratch |

The process part is what Python and its libraries take before the weights, and room for requests. On a GPU the plan is
the device's: weights, arena and scratch; process and host store are in another memory and are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraplex.kernels.constants import ALIGN, BLOCK_SIZE
from loraplex.kernels.records import element_bytes
from loraplex.server.engine.policy.kv_groups import GroupSpec, group_layers, kv_groups, peak_pages
from loraplex.server.engine.request import EngineError
from loraplex.server.engine.step.scratch import Demand, Surroundings, scratch_bytes
from loraplex.server.models.config import ModelConfig

TYPICAL_RANK = 16
"""Of the adapters that sizes left open have room for."""

STAGING_BYTES = 256 << 20
"""Most of the CPU's host store where its size is left open: adapters only pass through it on their way to the arena."""

DEVICE_HOST_BYTES = 2 << 30
"""Of a GPU's host store where its size is left open: there it holds what the device has no room for."""

GROWTH_BYTES = 64 << 20
"""What a loaded server's process takes beyond its start: connections, library code first run under load, freed blocks
that the allocator keeps."""

WAITING_TOKEN_BYTES = 64
"""Of a token of a queued prompt: an int object, two references to it, and its text."""

MAX_ARENA = (2**31 - 1) * ALIGN
"""Bytes: as far as a tile's offset (int32, in units of 64 bytes) reaches."""


class NotEnoughMemory(EngineError):
    """The memory given cannot hold the weights, one sequence and one page of an adapter."""


@dataclass(frozen=True)
class MemoryPlan:
    """Who gets how much. Only the arena is allocated in one piece."""

    groups: tuple[GroupSpec, ...]
    page_bytes: int
    num_pages: int
    max_model_len: int
    weights_bytes: int
    scratch_bytes: int  # the most of a step's activations, logits and sampling
    host_store_bytes: int
    process_bytes: int = 0
    shared: bool = True  # process and host store are in the same memory as the rest
    typical_pages: int = 1  # of an adapter of TYPICAL_RANK on every linear
    weights_remark: str = ""  # what they are in

    @property
    def arena_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def total_bytes(self) -> int:
        """Sum the memory the plan is about: the process's whole on the CPU, the device's on a GPU."""
        device = self.weights_bytes + self.arena_bytes + self.scratch_bytes
        return device + self.host_bytes if self.shared else device

    @property
    def host_bytes(self) -> int:
        """Sum process and host store."""
        return self.process_bytes + self.host_store_bytes

    @property
    def loading_bytes(self) -> int:
        """Return the host store's bytes for loads under way: files, and images that are being made."""
        return self.host_store_bytes // 2

    @property
    def images_bytes(self) -> int:
        """Return the host store's bytes for images that are ready."""
        return self.host_store_bytes - self.loading_bytes

    @property
    def kv_tokens(self) -> int:
        """Count the tokens of KV that the arena holds without adapters, in sequences of full length."""
        pages = peak_pages(self.groups, BLOCK_SIZE, self.max_model_len, BLOCK_SIZE)
        return self.num_pages * self.max_model_len // pages

    @property
    def typical_adapters(self) -> int:
        """Count the adapters of TYPICAL_RANK on every linear that the arena holds without KV."""
        return self.num_pages // self.typical_pages

    def __str__(self) -> str:
        return ", ".join(f"{name} {size(nbytes)}" for name, nbytes, _ in self.parts()) + f": {size(self.total_bytes)}"

    def parts(self) -> list[tuple[str, int, str]]:
        """List (name, bytes, remark) of each part, in the order of the module's picture."""
        rank = f"adapters of rank {TYPICAL_RANK} on all linears"
        arena = (
            f"{self.num_pages:,} pages of {size(self.page_bytes)}: {self.kv_tokens:,} tokens of KV or "
            f"{self.typical_adapters:,} {rank}"
        )
        waiting = self.images_bytes // (self.typical_pages * self.page_bytes)
        store = f"{waiting:,} {rank}" if not self.shared else f"{waiting:,} such adapters on their way from their files"
        rows = [
            ("process", self.process_bytes, "Python, libraries, requests"),
            ("weights", self.weights_bytes, self.weights_remark),
            ("arena", self.arena_bytes, arena),
            ("host store", self.host_store_bytes, store),
            ("scratch", self.scratch_bytes, "of a step"),
        ]
        return [row for row in rows if row[1]]


def plan_memory(
    config: ModelConfig,
    dtype: torch.dtype,
    memory_bytes: int | None,
    weights_bytes: int,
    demand: Demand,
    available_bytes: int,
    around: Surroundings = Surroundings(),
) -> MemoryPlan:
    """Divide `memory_bytes`. None: what `demand` could use at most, but no more than half of `available_bytes`.

    Raises NotEnoughMemory when one sequence of the length asked for and one page of an adapter do not fit.
    """
    groups = kv_groups(config.windows)
    page = page_bytes(config, dtype, groups)
    longest = demand.max_model_len or config.max_position
    typical = _typical_pages(config, dtype, page)
    least_store = _least_store(demand, around, typical * page)
    process = around.process_bytes if around.shared else 0

    def need(length: int) -> int:
        return peak_pages(groups, BLOCK_SIZE, length, demand.token_budget) + 1

    def fixed(length: int) -> int:
        return process + weights_bytes + least_store + scratch_bytes(config, dtype, length, demand, around)

    budget = memory_bytes
    if budget is None:
        wanted = demand.max_num_seqs * (need(longest) - 1 + typical)
        budget = min(fixed(longest) + STAGING_BYTES + wanted * page, available_bytes // 2)

    def fits(length: int, pages: int = 0) -> bool:
        return fixed(length) + (need(length) + pages) * page <= budget

    length = longest
    if not fits(length) and demand.max_model_len is None:
        # A context that leaves as much again for other sequences and adapters, or what fits at all.
        length = _largest(lambda n: fits(n, need(n) + typical), longest) or _largest(fits, longest)
    if not fits(max(length, 1)) or process + weights_bytes + around.loading_bytes > budget:
        raise NotEnoughMemory(_too_little(budget, fixed(longest), need(longest) * page, longest, weights_bytes, around))
    left = budget - fixed(length) - need(length) * page  # beyond the least of everything
    more_store = _more_store(demand, around, least_store, left)
    return MemoryPlan(
        groups=groups,
        page_bytes=page,
        num_pages=min(need(length) + (left - more_store) // page, MAX_ARENA // page),
        max_model_len=length,
        weights_bytes=weights_bytes,
        scratch_bytes=scratch_bytes(config, dtype, length, demand, around),
        host_store_bytes=(least_store if around.shared else demand.host_store_bytes or DEVICE_HOST_BYTES) + more_store,
        process_bytes=around.process_bytes,
        shared=around.shared,
        typical_pages=typical,
    )


def page_bytes(config: ModelConfig, dtype: torch.dtype, groups: tuple[GroupSpec, ...]) -> int:
    """Choose one size for all pages: a KV page, or more where an adapter's rows are longer (tiny models)."""
    element = element_bytes(dtype)
    kv_page = group_layers(groups) * 2 * config.num_kv_heads * BLOCK_SIZE * config.head_dim * element
    # plan_image() keeps to one page beyond the bytes if a row of A and its share of B fit in a page.
    rows = [p.in_features * element * (p.in_features + p.out_features) // p.out_features for p in config.projections()]
    return -(-max(kv_page, *rows) // ALIGN) * ALIGN


def size(nbytes: int) -> str:
    """Write bytes for people."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(nbytes) >= 1 << power:
            return f"{nbytes / (1 << power):.4g} {unit}"
    return f"{nbytes} bytes"


def _least_store(demand: Demand, around: Surroundings, typical: int) -> int:
    """Bytes of the host store in the memory planned. Left open: enough to read one of rank 32, or 16 in fp32."""
    if not around.shared:
        return 0
    return 8 * typical if demand.host_store_bytes is None else demand.host_store_bytes


def _more_store(demand: Demand, around: Surroundings, least: int, left: int) -> int:
    """Choose what the host store has beyond its `least`, of the `left` bytes: an eighth where its size is left open."""
    open_ended = around.shared and demand.host_store_bytes is None
    return max(0, min(STAGING_BYTES - least, left // 8)) if open_ended else 0


def _too_little(budget: int, fixed: int, sequence: int, length: int, weights: int, around: Surroundings) -> str:
    process = around.process_bytes if around.shared else 0
    least = max(fixed + sequence, process + weights + around.loading_bytes)
    parts = [f"the process takes {size(process)}"] if process else []
    parts += [
        f"the weights take {size(weights)}",
        f"scratch and host store {size(fixed - weights - process)}",
        f"one sequence of {length} tokens with one page of an adapter {size(sequence)}",
    ]
    return (
        f"{size(budget)} of memory are too little: {', '.join(parts)}; give at least --memory {least}, or lower "
        "--max-model-len"
    )


def _typical_pages(config: ModelConfig, dtype: torch.dtype, page: int) -> int:
    """Count the pages of an adapter of TYPICAL_RANK on every linear."""
    elements = sum(p.in_features + p.out_features for p in config.projections()) * TYPICAL_RANK * config.num_layers
    return -(-elements * element_bytes(dtype) // page) + 1


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """Find the largest length up to `limit` that fits; 0 for none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
