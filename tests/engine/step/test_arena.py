"""The arena: every layer's view is its own bytes of its own pages."""

from __future__ import annotations

from dataclasses import replace

import torch

from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.server.engine.policy.kv_groups import kv_groups
from loraplex.server.engine.step.arena import allocate_arena, kv_layers
from loraplex.server.engine.step.memory import plan_memory
from loraplex.server.engine.step.scratch import Demand
from tests.support.configs import TINY

GIB = 1 << 30
DEMAND = Demand(max_model_len=2048, max_num_seqs=16, token_budget=256)


class TestViews:
    def test_every_element_of_a_page_belongs_to_one_layer_and_place(self) -> None:
        groups = kv_groups(TINY.windows)
        plan = replace(plan_memory(TINY, torch.float32, GIB, 0, DEMAND, 0), num_pages=5)
        arena = allocate_arena(plan, torch.device("cpu"))
        assert arena.shape == (5, plan.page_bytes)
        assert arena.data_ptr() % 64 == 0
        assert not arena.any()
        layers = kv_layers(arena, TINY, torch.float32, groups)
        assert [groups[layer.group].window for layer in layers] == [8, None, 8]
        by_group: dict[int, list[int]] = {}
        for index, layer in enumerate(layers):
            by_group.setdefault(layer.group, []).append(index)
            assert layer.k.shape == layer.v.shape == (5, 1, BLOCK_SIZE, 16)
        used = 2 * BLOCK_SIZE * 16  # elements of a layer in a page
        for members in by_group.values():
            arena.zero_()
            for index in members:
                layers[index].k.add_(100 * index + 1)
                layers[index].v.add_(100 * index + 2)
            for index in members:  # nobody wrote into another's
                assert (layers[index].k == 100 * index + 1).all()
                assert (layers[index].v == 100 * index + 2).all()
            written = (arena.view(torch.float32) != 0).sum(-1)
            assert (written == used * len(members)).all(), "every page holds all layers of the group, and padding"

    def test_layout_in_a_page(self) -> None:
        """[group_layers, 2, kv_heads, block_size, head_dim], read back from the raw bytes."""
        config = replace(TINY, num_kv_heads=2, windows=(None,) * 3)
        plan = replace(plan_memory(config, torch.bfloat16, GIB, 0, DEMAND, 0), num_pages=3)
        arena = allocate_arena(plan, torch.device("cpu"))
        layers = kv_layers(arena, config, torch.bfloat16, plan.groups)
        layers[2].v[1, 1, 5, 7] = 3.5
        page = arena[1].view(torch.bfloat16)[: 3 * 2 * 2 * BLOCK_SIZE * 16].view(3, 2, 2, BLOCK_SIZE, 16)
        assert page[2, 1, 1, 5, 7] == 3.5
        assert arena.view(torch.bfloat16).count_nonzero() == 1

    def test_memory_lives_as_long_as_a_view_of_it(self) -> None:
        plan = replace(plan_memory(TINY, torch.float32, GIB, 0, DEMAND, 0), num_pages=2)
        view = kv_layers(allocate_arena(plan, torch.device("cpu")), TINY, torch.float32, plan.groups)[0].k
        view.fill_(2.0)
        assert (view == 2.0).all()
