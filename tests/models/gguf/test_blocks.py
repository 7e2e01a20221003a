"""Blocks of every type of ggml's that is read, against the gguf package's own values, bit for bit."""

from __future__ import annotations

import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize as gguf_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.kernels.quantized import dequantize
from loraplex.server.models.gguf import blocks
from loraplex.server.models.gguf.blocks import DENSE, QUANTIZED, quantized_weight, type_name

KINDS = [Kind(number) for number in QUANTIZED]

HALVES = {  # where a block has its fp16 numbers, by ggml-common.h
    **{Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,)},
    **{Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)},
}


def random_rows(kind: Kind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Any bytes at all, but for fp16 numbers that are finite: of any sign and size, zero and subnormal ones too."""
    block, width = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, columns // block, width), dtype=np.uint8)
    for at in HALVES[kind]:
        half = rng.integers(0, 1 << 16, (rows, columns // block, 1), dtype=np.uint16)
        half[(half & 0x7C00) == 0x7C00] = 0x8001
        data[:, :, at : at + 2] = half.view(np.uint8)
    return data.reshape(rows, -1)


def test_types_are_those_the_issue_names() -> None:
    assert {kind.name for kind in KINDS} == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"}
    assert {type_name(number) for number in DENSE} == {"F32", "F16", "BF16"}
    assert all(QUANTIZED[kind].format.name == kind.name for kind in KINDS)
    assert all((QUANTIZED[k].block, QUANTIZED[k].block_bytes) == gguf.GGML_QUANT_SIZES[k] for k in KINDS)
    assert type_name(Kind.IQ4_XS) == "IQ4_XS"
    assert type_name(1234) == "type 1234"


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_gguf_package(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK", 4 * 512)  # 7 rows are two chunks, the second a short one
    data = random_rows(kind, 7, 512)
    found = dequantize(quantized_weight(QUANTIZED[kind], data))
    assert torch.equal(found, torch.from_numpy(gguf_dequantize(data, kind)))
    assert found.abs().max() > 1


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_values_of_any_bytes(kind: Kind, rows: int, blocks_of_row: int, seed: int) -> None:
    data = random_rows(kind, rows, blocks_of_row * QUANTIZED[kind].block, seed)
    found = dequantize(quantized_weight(QUANTIZED[kind], data))
    assert torch.equal(found, torch.from_numpy(gguf_dequantize(data, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_formats_say_what_the_weights_have(kind: Kind) -> None:
    form = QUANTIZED[kind].format
    weight = quantized_weight(QUANTIZED[kind], random_rows(kind, 3, 256))
    assert weight.codes.dtype == (torch.int8 if kind is Kind.Q8_0 else torch.uint8)
    assert int(weight.codes.max()) < 1 << form.bits
    assert weight.scale.shared.dtype == torch.float16
    assert (weight.scale.codes is None) == (form.scale_bits == 16)
    assert (weight.offset is not None) == form.has_offset
    assert weight.scale.expanded().shape == (3, form.groups(256))


def test_rows_are_taken_in_an_order() -> None:
    data = random_rows(Kind.Q5_K, 6, 256)
    order = np.array([3, 0, 5, 1, 2, 4])
    found = quantized_weight(QUANTIZED[Kind.Q5_K], data, order)
    assert torch.equal(dequantize(found), torch.from_numpy(gguf_dequantize(data[order], Kind.Q5_K)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_weight_takes_its_codes_and_little_else(kind: Kind) -> None:
    """A byte for each code, whatever is made of pieces of it on the way."""
    rows, columns = 4096, 2048
    data = np.zeros((rows, columns // QUANTIZED[kind].block * QUANTIZED[kind].block_bytes), np.uint8)
    tracemalloc.start()
    try:
        weight = quantized_weight(QUANTIZED[kind], data, np.arange(rows)[::-1])
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert weight.codes.numel() == rows * columns
    assert rows * columns < held < 1.2 * rows * columns
    assert peak < held + 8 * blocks.CHUNK


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_that_are_not_finite_are_refused(kind: Kind, bits: int) -> None:
    for at in HALVES[kind]:
        data = random_rows(kind, 3, 256)
        data[1, at : at + 2] = np.array([bits], np.uint16).view(np.uint8)
        with pytest.raises(ValueError, match="not finite"):
            quantized_weight(QUANTIZED[kind], data)
