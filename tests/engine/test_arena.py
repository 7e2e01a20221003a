"""Memory: how it is divided, what is refused, and that every layer's view is its own bytes of its own pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.kernels.metadata import BLOCK_SIZE
from loraplex.server.engine.arena import (
    Demand,
    NotEnoughMemory,
    allocate_arena,
    available_memory,
    kv_layers,
    logit_rows,
    page_bytes,
    plan_memory,
    scratch_bytes,
)
from loraplex.server.engine.kv_cache import kv_groups
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.rotary import RopeConfig

GIB = 1 << 30
SMOLLM2 = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position=8192,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    activation="silu",
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    norm_offset=0.0,
    sandwich_norm=False,
    embed_scale=None,
    attn_scale=0.125,
    attn_softcap=None,
    final_softcap=None,
    windows=(None,) * 30,
    ropes=(RopeConfig("default", 1e5, 64, 8192),),
    rope_of_layer=(0,) * 30,
    fused_checkpoint=False,
)
TINY = replace(
    SMOLLM2, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=1, head_dim=16,
    windows=(8, None, 8), rope_of_layer=(0, 0, 0), vocab_size=320,
)  # fmt: skip
WEIGHTS = 269_000_000
DEMAND = Demand(max_model_len=2048, max_num_seqs=16, token_budget=256)


def test_page_of_smollm2_is_the_kv_page() -> None:
    assert page_bytes(SMOLLM2, torch.bfloat16, kv_groups(SMOLLM2.windows)) == 30 * 2 * 3 * 16 * 64 * 2 == 360 * 1024


def test_a_page_is_no_shorter_than_an_adapters_rows() -> None:
    narrow = replace(TINY, windows=(None,) * 3, num_layers=1, head_dim=2)
    size = page_bytes(narrow, torch.float32, kv_groups(narrow.windows[:1]))
    assert size % 64 == 0
    assert size >= 4 * 96 * (1 + 96 / 64)  # down_proj: a row of A and its share of B


def test_memory_given_is_the_total() -> None:
    plan = plan_memory(SMOLLM2, torch.bfloat16, GIB, WEIGHTS, DEMAND, available_bytes=0)
    assert GIB - plan.page_bytes < plan.total_bytes <= GIB
    assert plan.total_bytes == plan.weights_bytes + plan.arena_bytes + plan.scratch_bytes
    assert plan.max_model_len == 2048


def test_default_is_what_can_be_used() -> None:
    plan = plan_memory(SMOLLM2, torch.bfloat16, None, WEIGHTS, DEMAND, available_bytes=1000 * GIB)
    kv = 16 * 2048 // BLOCK_SIZE
    assert kv < plan.num_pages < 2 * kv, "pages for every sequence and its adapter, not all there is"


def test_default_leaves_half_of_the_machine() -> None:
    plan = plan_memory(SMOLLM2, torch.bfloat16, None, WEIGHTS, DEMAND, available_bytes=2 * GIB)
    assert GIB - plan.page_bytes < plan.total_bytes <= GIB


def test_context_is_cut_where_it_was_left_open() -> None:
    demand = replace(DEMAND, max_model_len=None)
    assert plan_memory(SMOLLM2, torch.bfloat16, 4 * GIB, WEIGHTS, demand, 0).max_model_len == 8192
    plan = plan_memory(SMOLLM2, torch.bfloat16, WEIGHTS + 256 * 2**20, WEIGHTS, demand, 0)
    assert 16 < plan.max_model_len < 8192
    assert plan.num_pages >= -(-plan.max_model_len // BLOCK_SIZE) + 1
    assert plan.total_bytes <= WEIGHTS + 256 * 2**20
    longer = replace(DEMAND, max_model_len=plan.max_model_len + BLOCK_SIZE)
    with pytest.raises(NotEnoughMemory):  # a block more would not fit
        plan_memory(SMOLLM2, torch.bfloat16, WEIGHTS + 256 * 2**20, WEIGHTS, longer, 0)


def test_too_little_is_refused_with_numbers_that_hold() -> None:
    with pytest.raises(NotEnoughMemory, match=r"one sequence of 2048 tokens.*45\.35 MiB \(129 pages") as caught:
        plan_memory(SMOLLM2, torch.bfloat16, 300_000_000, WEIGHTS, DEMAND, 0)
    least = int(str(caught.value).split("--memory ")[1].split(",")[0])
    assert plan_memory(SMOLLM2, torch.bfloat16, least, WEIGHTS, DEMAND, 0).num_pages == 129
    with pytest.raises(NotEnoughMemory):
        plan_memory(SMOLLM2, torch.bfloat16, least - 1, WEIGHTS, DEMAND, 0)


def test_nothing_at_all_fits() -> None:
    with pytest.raises(NotEnoughMemory):
        plan_memory(SMOLLM2, torch.bfloat16, 1000, WEIGHTS, replace(DEMAND, max_model_len=None), 0)


@settings(max_examples=200, deadline=None)
@given(st.integers(WEIGHTS, 8 * GIB), st.integers(1, 64), st.integers(1, 2048), st.none() | st.integers(1, 8192))
def test_a_plan_never_exceeds_what_was_given(memory: int, seqs: int, budget: int, length: int | None) -> None:
    demand = Demand(length, seqs, budget)
    try:
        plan = plan_memory(SMOLLM2, torch.bfloat16, memory, WEIGHTS, demand, 0)
    except NotEnoughMemory:
        return
    assert plan.total_bytes <= memory
    assert plan.scratch_bytes == scratch_bytes(SMOLLM2, torch.bfloat16, plan.max_model_len, demand)


def test_logit_slices_are_bounded() -> None:
    assert logit_rows(262144) * 262144 * 4 <= 32 << 20
    assert logit_rows(10**9) == 1


def test_available_memory_is_something() -> None:
    assert 10**6 < available_memory(torch.device("cpu")) < 10**15


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
