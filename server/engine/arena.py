"""The arena: one allocation of equal pages for keys, values and adapters; how large it is, and each layer's view of it.

arena     [num_pages, page_bytes] uint8, 64-byte aligned
KV page   [group_layers, 2, kv_heads, block_size, head_dim] of the compute dtype, then padding up to page_bytes:

    | layer 0 of the group: K | V | layer 1: K | V | ... | layer G - 1: K | V | padding |
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraplex.kernels.hugepages import huge_zeros
from loraplex.kernels.metadata import ALIGN, BLOCK_SIZE, KVLayer, element_bytes
from loraplex.server.engine.kv_cache import GroupSpec, group_layers, kv_groups, peak_pages
from loraplex.server.engine.request import EngineError
from loraplex.server.models.config import ModelConfig

logger = logging.getLogger(__name__)

LOGIT_BYTES = 32 << 20
"""Most bytes of one slice of logits (fp32): 163 rows at 50k tokens of vocabulary, 32 at 256k."""

TYPICAL_RANK = 16
"""Of the adapters that the default size has room for."""


MAX_ARENA = (2**31 - 1) * ALIGN
"""Bytes: as far as a tile's offset (int32, in units of 64 bytes) reaches."""


class NotEnoughMemory(EngineError):
    """The memory given cannot hold the weights, one sequence and one page of an adapter."""


@dataclass(frozen=True)
class MemoryPlan:
    """Who gets how much. total = weights + arena + scratch, of which only the arena is allocated in one piece."""

    groups: tuple[GroupSpec, ...]
    page_bytes: int
    num_pages: int
    max_model_len: int
    weights_bytes: int
    scratch_bytes: int  # an estimate of a step's activations, scores and logits

    @property
    def arena_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.arena_bytes + self.scratch_bytes

    def __str__(self) -> str:
        return (
            f"{size(self.total_bytes)}: weights {size(self.weights_bytes)}, arena {size(self.arena_bytes)} "
            f"({self.num_pages} pages of {size(self.page_bytes)}), scratch {size(self.scratch_bytes)}"
        )


@dataclass(frozen=True)
class Demand:
    """What the memory is wanted for."""

    max_model_len: int | None  # tokens; None: the model's own limit, or less where memory is short
    max_num_seqs: int
    token_budget: int


def plan_memory(
    config: ModelConfig,
    dtype: torch.dtype,
    memory_bytes: int | None,
    weights_bytes: int,
    demand: Demand,
    available_bytes: int,
) -> MemoryPlan:
    """Divide `memory_bytes`. None: what `demand` could use at most, but no more than half of `available_bytes`.

    Raises NotEnoughMemory when one sequence of the length asked for and one page of an adapter do not fit.
    """
    groups = kv_groups(config.windows)
    page = page_bytes(config, dtype, groups)
    longest = demand.max_model_len or config.max_position
    budget = memory_bytes
    if budget is None:
        wanted = demand.max_num_seqs * (
            peak_pages(groups, BLOCK_SIZE, longest, demand.token_budget) + _adapter_pages(config, dtype, page)
        )
        budget = min(
            weights_bytes + scratch_bytes(config, dtype, longest, demand) + wanted * page,
            available_bytes // 2,
        )

    def pages(length: int) -> int:
        return (budget - weights_bytes - scratch_bytes(config, dtype, length, demand)) // page

    def fits(length: int) -> bool:
        return pages(length) >= peak_pages(groups, BLOCK_SIZE, length, demand.token_budget) + 1

    length = longest
    if not fits(length) and demand.max_model_len is None:
        length = _largest(fits, longest)
        logger.warning("context cut from %d to %d tokens: more do not fit in %s", longest, length, size(budget))
    if not fits(max(length, 1)):
        need = peak_pages(groups, BLOCK_SIZE, longest, demand.token_budget) + 1
        scratch = scratch_bytes(config, dtype, longest, demand)
        raise NotEnoughMemory(
            f"{size(budget)} of memory are too little: the weights take {size(weights_bytes)}, a step's scratch "
            f"{size(scratch)}, and one sequence of {longest} tokens with one page of an adapter {size(need * page)} "
            f"({need} pages of {size(page)}); give at least --memory {weights_bytes + scratch + need * page}, or lower "
            "--max-model-len"
        )
    return MemoryPlan(
        groups=groups,
        page_bytes=page,
        num_pages=min(pages(length), MAX_ARENA // page),
        max_model_len=length,
        weights_bytes=weights_bytes,
        scratch_bytes=scratch_bytes(config, dtype, length, demand),
    )


def page_bytes(config: ModelConfig, dtype: torch.dtype, groups: tuple[GroupSpec, ...]) -> int:
    """One size for all pages: a KV page, or more where an adapter's rows are longer (tiny models, narrow caches)."""
    element = element_bytes(dtype)
    kv_page = group_layers(groups) * 2 * config.num_kv_heads * BLOCK_SIZE * config.head_dim * element
    # tiles.pack() keeps to one page beyond the bytes if a row of A and its share of B fit in a page.
    rows = [p.in_features * element * (p.in_features + p.out_features) // p.out_features for p in config.projections()]
    return _padded(max(kv_page, *rows))


def scratch_bytes(config: ModelConfig, dtype: torch.dtype, length: int, demand: Demand) -> int:
    """Estimate of the most that a step holds beside weights and arena: activations, one sequence's scores, logits."""
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    widest = 4 * config.hidden_size + 2 * qkv + 4 * config.intermediate_size
    activations = demand.token_budget * widest * max(4, element_bytes(dtype))  # ops work on fp32 copies
    scores = 2 * config.num_heads * min(demand.token_budget, 128) * length * 4
    gathered = 4 * config.num_kv_heads * config.head_dim * length * 4
    logits = min(demand.max_num_seqs, logit_rows(config.vocab_size)) * config.vocab_size * 4
    return activations + scores + gathered + 5 * logits  # sampling sorts them, and keeps their probabilities and order


def logit_rows(vocab_size: int) -> int:
    """Rows of logits computed at once."""
    return max(1, LOGIT_BYTES // (vocab_size * 4))


def allocate_arena(plan: MemoryPlan, device: torch.device) -> Tensor:
    """[num_pages, page_bytes] uint8, zeroed, 64-byte aligned.

    On Linux it is asked for in huge pages (decode reads all weights of a mix per token: fewer TLB misses) and costs
    memory only as pages are first written.
    """
    if device.type == "cpu":
        arena = huge_zeros(plan.arena_bytes)
    else:
        arena = torch.zeros(plan.arena_bytes, dtype=torch.uint8, device=device)
    assert arena.data_ptr() % ALIGN == 0
    assert arena.storage_offset() == 0
    return arena.view(plan.num_pages, plan.page_bytes)


def kv_layers(arena: Tensor, config: ModelConfig, dtype: torch.dtype, groups: tuple[GroupSpec, ...]) -> list[KVLayer]:
    """Each layer's keys and values as strided views of the whole arena, in the order of the layers."""
    elements = arena.view(dtype)  # [num_pages, page_elements]
    heads, dim = config.num_kv_heads, config.head_dim
    plane = heads * BLOCK_SIZE * dim  # one layer's K, or its V
    shape = (elements.shape[0], heads, BLOCK_SIZE, dim)
    strides = (elements.shape[1], BLOCK_SIZE * dim, dim, 1)
    views: dict[int, KVLayer] = {}
    for index, group in enumerate(groups):
        for place, layer in enumerate(group.layers):
            start = elements.storage_offset() + 2 * place * plane
            views[layer] = KVLayer(
                k=elements.as_strided(shape, strides, start),
                v=elements.as_strided(shape, strides, start + plane),
                group=index,
            )
    return [views[layer] for layer in range(config.num_layers)]


def available_memory(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now; on the CPU no more than the container is allowed."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _meminfo()
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def size(nbytes: int) -> str:
    """Bytes for people."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(nbytes) >= 1 << power:
            return f"{nbytes / (1 << power):.4g} {unit}"
    return f"{nbytes} bytes"


def _meminfo() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _adapter_pages(config: ModelConfig, dtype: torch.dtype, page: int) -> int:
    """Pages of an adapter of TYPICAL_RANK on every linear."""
    elements = sum(p.in_features + p.out_features for p in config.projections()) * TYPICAL_RANK * config.num_layers
    return -(-elements * element_bytes(dtype) // page) + 1


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest length up to `limit` that fits; 0 for none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN
