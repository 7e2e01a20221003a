"""kernels/quantized.py against the libraries whose formats it holds."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as library_dequantize

from loraplex.kernels.quantized import (
    Activations,
    GroupScales,
    QuantizedWeight,
    WeightFormat,
    dequantize,
    round_activations,
)
from loraplex.kernels.reference import ReferenceBackend
from tests.support.quantized import FORMATS, random_weight

OUT, COLUMNS = 3, 512


def _blocks(kind: gguf.GGMLQuantizationType, seed: int) -> np.ndarray:
    """Any bytes are blocks of a format, but for the fp16 scales, which are made finite."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return rng.integers(0, 256, (OUT, COLUMNS // block, size), dtype=np.uint8)


def _fp16(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float16)


def test_one_level_with_an_offset_is_what_gguf_says_of_q4_1() -> None:
    rng = np.random.default_rng(1)
    blocks = _blocks(gguf.GGMLQuantizationType.Q4_1, 2)
    numbers = _fp16(rng, OUT, COLUMNS // 32, 2)
    blocks[:, :, :4] = numbers.view(np.uint8)
    low, high = blocks[:, :, 4:] & 15, blocks[:, :, 4:] >> 4
    weight = QuantizedWeight(
        WeightFormat("Q4_1", bits=4, group=32, scale_bits=16, has_offset=True),
        torch.from_numpy(np.concatenate([low, high], -1).reshape(OUT, COLUMNS)),
        GroupScales(torch.from_numpy(numbers[:, :, 0].copy())),
        GroupScales(torch.from_numpy(numbers[:, :, 1].copy())),
    )
    expected = library_dequantize(blocks.reshape(OUT, -1), gguf.GGMLQuantizationType.Q4_1)
    assert torch.equal(dequantize(weight), torch.from_numpy(expected))


def test_two_levels_are_what_gguf_says_of_q6_k() -> None:
    rng = np.random.default_rng(3)
    blocks = _blocks(gguf.GGMLQuantizationType.Q6_K, 4)
    shared = _fp16(rng, OUT, COLUMNS // 256)
    blocks[:, :, -2:] = shared[:, :, None].view(np.uint8)
    scales = blocks[:, :, 192:208].view(np.int8).reshape(OUT, COLUMNS // 16)
    low = blocks[:, :, :128].reshape(OUT, -1, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(1, 1, 1, 2, 1) & 15
    high = (
        blocks[:, :, 128:192].reshape(OUT, -1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 1, 4, 1) & 3
    )
    codes = low.reshape(OUT, COLUMNS) | high.reshape(OUT, COLUMNS) << 4
    weight = QuantizedWeight(
        WeightFormat("Q6_K", bits=6, group=16, zero=32, scale_bits=8),
        torch.from_numpy(codes),
        GroupScales(torch.from_numpy(shared), torch.from_numpy(scales.copy()), span=16),
    )
    expected = library_dequantize(blocks.reshape(OUT, -1), gguf.GGMLQuantizationType.Q6_K)
    assert torch.equal(dequantize(weight), torch.from_numpy(expected))


def test_inputs_in_another_order_come_back_to_their_place() -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(1, 64) % 16
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    scale = GroupScales(torch.tensor([[1.0, 2.0]]))
    weight = QuantizedWeight(WeightFormat("gptq", bits=4, group=32, zero=8), codes, scale, order=order)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    stored = (codes.double() - 8) * torch.tensor([1.0, 2.0]).repeat_interleave(32)
    torch.testing.assert_close(x @ dequantize(weight).double().T, x[:, order] @ stored.T)


def test_activations_are_off_by_half_a_step_of_their_group_at_most() -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(7)) * torch.tensor([1e-3, 1.0, 1e3, 0.0])[:, None]
    for group, width in ((32, 32), (None, 96)):
        step = x.view(4, -1, width).abs().amax(-1, keepdim=True) / 127
        error = (round_activations(x, group) - x).view(4, -1, width).abs()
        assert (error <= step * 0.5001).all()
        assert error.max() > 0


@pytest.mark.parametrize("activations", Activations)
def test_the_reference_multiplies_dense_and_quantised_parts_alike(activations: Activations) -> None:
    ops = ReferenceBackend(torch.device("cpu"))
    generator = torch.Generator().manual_seed(8)
    dense = torch.randn(5, 64, generator=generator)
    codes = torch.randint(0, 16, (7, 64), generator=generator, dtype=torch.uint8)
    scale = GroupScales(torch.rand(7, 2, generator=generator))
    order = torch.randperm(64, generator=generator)
    weight = QuantizedWeight(WeightFormat("gptq", bits=4, group=32, zero=8), codes, scale, order=order)
    packed = ops.pack_parts([dense, weight], torch.float32, activations)
    assert (packed.in_features, packed.out_features) == (64, 12)

    x = torch.randn(3, 64, generator=generator)
    rounded = x if activations is Activations.EXACT else round_activations(x[:, order], 32)[:, order.argsort()]
    expected = torch.cat([x @ dense.T, rounded @ dequantize(weight).T], 1)
    torch.testing.assert_close(ops.linear(x, packed), expected)
    assert (activations is Activations.EXACT) == torch.allclose(rounded, x)
    torch.testing.assert_close(
        ops.embed(torch.tensor([4, 6]), packed, 2.0), torch.stack([dense[4], dequantize(weight)[1]]) * 2
    )


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_rows_of_the_values(name: str) -> None:
    weight = random_weight(name, 40, 512, seed=3)
    assert torch.equal(dequantize(weight.rows(slice(7, 23))), dequantize(weight)[7:23])
