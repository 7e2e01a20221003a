"""The arena: one allocation of equal pages for keys, values and adapters, and each layer's view of it.

arena     [num_pages, page_bytes] uint8, 64-byte aligned
KV page   [group_layers, 2, kv_heads, block_size, head_dim] of the compute dtype, then padding up to page_bytes:

    | layer 0 of the group: K | V | layer 1: K | V | ... | layer G - 1: K | V | padding |
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex.kernels.constants import ALIGN, BLOCK_SIZE
from loraplex.kernels.hugepages import huge_zeros
from loraplex.kernels.records import KVLayer
from loraplex.server.engine.policy.kv_groups import GroupSpec
from loraplex.server.engine.step.memory import MemoryPlan
from loraplex.server.models.config import ModelConfig


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
