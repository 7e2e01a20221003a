"""The kernels for GPUs that are not here: they compile, spill nothing, fit, and are compiled once, not per step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex.benchmarks.kernels import ahead
from loraplex.benchmarks.kernels.aot_report import compile_for
from loraplex.benchmarks.kernels.gpu_work import (
    LLAMA3,
    SHAPES,
    SMOLLM2,
    Shape,
    Work,
    make_work,
    run_all,
    run_linears,
    run_quantized,
)
from loraplex.kernels.gpu.backend import TritonBackend
from loraplex.kernels.records import AdapterStep

KERNELS = {
    "bgmv._expand",
    "bgmv._shrink",
    "decode_attention._combine",
    "decode_attention._split",
    "linear._tile",
    "own._embed",
    "own._head",
    "own._norm",
    "prefill_attention._tile",
    "quantized._rows",
    "quantized._tile",
    "rotary._rope_store_kv",
    "rotate._turn",
    "rowwise._act_mul",
    "rowwise._add_bias",
    "rowwise._gather",
    "rowwise._place_own",
    "rowwise._rms_norm",
    "sgmv._expand",
    "sgmv._shrink",
}


@pytest.fixture(scope="module")
def ops() -> TritonBackend:
    return TritonBackend(torch.device("cpu"))  # launches are noted, never run


@pytest.mark.timeout(900)
def test_every_variant_compiles_spills_nothing_and_fits() -> None:
    rows = compile_for(ahead.TARGETS)
    assert {row.kernel for row in rows} == KERNELS
    assert [row for row in rows if row.fault] == []
    assert all(row.registers > 0 and row.warps > 0 for row in rows)  # the tools' output was understood
    assert any(row.shared_bytes > 0 for row in rows)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_steady_state_compiles_nothing(ops: TritonBackend, shape: Shape) -> None:
    """Any number of rows, tokens, tiles, keys and adapters is served by what the first step compiled."""
    steps = [(1, (), 1, 0), (2, (3,), 16, 1), (3, (1, 16), 40, 5), (1, (129,), 4, 300), (17, (), 2, 1025)]

    def run(step: tuple[int, tuple[int, ...], int, int]) -> None:
        decode, prefill, rank, kv = step
        run_all(ops, make_work(ops, shape, torch.bfloat16, decode, prefill, rank, kv))

    with ahead.noted(ahead.TARGETS["sm_90"]) as variants:
        run((2, (3, 5), 16, 64))
        first = set(variants)
        assert {variants[key].kernel for key in first} >= KERNELS - {
            "rowwise._add_bias",
            "linear._tile",
            "quantized._rows",
            "quantized._tile",
        }
        for step in steps:
            run(step)
            assert {variants[key].label for key in set(variants) - first} == set()


def test_linears_of_any_number_of_rows_share_a_variant() -> None:
    invariant = TritonBackend(torch.device("cpu"), batch_invariant=True)
    with ahead.noted(ahead.TARGETS["sm_90"]) as variants:
        for rows in (1, 2, 16, 33, 129):
            run_linears(invariant, make_work(invariant, SMOLLM2, torch.bfloat16, rows, ()))
    # Results in bf16 and, for logits, in fp32.
    assert [variant.kernel for variant in variants.values()] == ["linear._tile"] * 2


def test_quantised_linears_have_a_variant_for_few_rows_and_one_for_many(ops: TritonBackend) -> None:
    work = {rows: make_work(ops, LLAMA3, torch.bfloat16, rows, ()) for rows in (2, 5, 16, 17, 33, 129)}
    with ahead.noted(ahead.TARGETS["sm_90"]) as variants:
        for rows in (2, 17):
            run_quantized(ops, work[rows])
        first = set(variants)
        assert {variants[key].kernel for key in first} == {"quantized._rows", "quantized._tile"}
        for rows in (5, 16, 33, 129):
            run_quantized(ops, work[rows])
    assert {variants[key].label for key in set(variants) - first} == set()


def test_layers_and_slots_share_a_variant(ops: TritonBackend) -> None:
    """Offsets into the tile table are even, odd, one and multiples of 16 in turn; none of them is compiled in."""
    work = make_work(ops, SMOLLM2, torch.bfloat16, 2, (3,))
    with ahead.noted(ahead.TARGETS["sm_90"]) as variants:
        for layers in (1, 2, 8, 30):
            _run_last_layer(ops, work, layers)
    assert sorted(variant.kernel for variant in variants.values()) == sorted(
        ["bgmv._shrink", "bgmv._expand", "sgmv._shrink", "sgmv._expand"]
    )


def _run_last_layer(ops: TritonBackend, work: Work, layers: int) -> None:
    ranges = work.table.ranges.expand(-1, layers, -1, -1).contiguous()
    table = replace(work.table, ranges=ranges, ranges_host=ranges)
    x = torch.zeros(work.tokens, SMOLLM2.hidden, dtype=work.dtype)
    y = torch.zeros(work.tokens, SMOLLM2.qkv, dtype=work.dtype)
    ops.adapter_add_(y, x, layers - 1, 0, AdapterStep(work.arena, table, work.segments))
