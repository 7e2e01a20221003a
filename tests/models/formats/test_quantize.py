"""Weights quantised at load against the libraries whose values they are: bitsandbytes' NF4, ggml's Q4_1 and Q8_0."""

from __future__ import annotations

import math
from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from gguf import quants

from loraplex.kernels.quantized import QuantizedWeight, dequantize
from loraplex.server.models.formats import quantize
from loraplex.server.models.formats.quantize import quantize_int4, quantize_int8, quantize_nf4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 64),
        (96, 576),
        (257, 1088),  # 4,369 blocks: the last of the 18 blocks of scales is cut
        (40, 24),  # blocks of 64 begin within rows
        (3, 8),  # less than one block
        (1030, 1024),  # more than a slice
    ],
)
def test_nf4_is_bitsandbytes_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = drawn(*shape, dtype=dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    state.dtype = torch.float32
    state.shape = (1, weight.numel())  # its CPU kernel takes every row to begin a block, which holds for one row alone
    expected = bnb.dequantize_4bit(packed, state).view(shape)
    ours = quantize_nf4(weight)
    assert torch.equal(dequantize(ours), expected)
    assert ours.format.group == math.gcd(64, shape[1])


def test_nf4_of_zeros_and_of_one_value_in_all_blocks() -> None:
    weight = torch.zeros(4, 128)
    weight[2:] = 0.5
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(dequantize(quantize_nf4(weight)), bnb.dequantize_4bit(packed, state))
    assert torch.equal(dequantize(quantize_nf4(torch.zeros(4, 128))), torch.zeros(4, 128))


def test_codes_of_nf4_at_their_bounds_and_at_the_ends_of_cells() -> None:
    values = torch.tensor(quantize.NF4)
    bounds = (values[:-1] + values[1:]) / 2
    ends = torch.arange(quantize.CELLS + 1) / quantize.CELLS * 2 - 1
    one = torch.ones(())
    near = torch.cat([bounds, ends, values])
    x = torch.cat([near, near.nextafter(one), near.nextafter(-one), torch.linspace(-1, 1, 100_001)]).clamp(-1, 1)
    assert torch.equal(quantize.nf4_codes(x).long(), torch.bucketize(x, bounds))


def test_the_dynamic_type_is_bitsandbytes() -> None:
    assert torch.equal(quantize.dynamic_values(), bnb.create_dynamic_map())


def test_the_values_of_nf4_are_bitsandbytes() -> None:
    assert tuple(bnb.get_4bit_type("nf4", device="cpu").tolist()) == quantize.NF4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 576), (1, 32), (1030, 1024)])
@pytest.mark.parametrize(("function", "name"), [(quantize_int4, "Q4_1"), (quantize_int8, "Q8_0")])
def test_int4_and_int8_are_ggmls_to_the_bit(
    shape: tuple[int, int], dtype: torch.dtype, function: Callable[[torch.Tensor], QuantizedWeight], name: str
) -> None:
    weight = drawn(*shape, dtype=dtype)
    weight[0, :32] = 0.25  # a group of one value
    weight[-1, -32:] = 0.0
    kind = gguf.GGMLQuantizationType[name]
    expected = quants.dequantize(quants.quantize(weight.float().numpy(), kind), kind)
    assert np.array_equal(dequantize(function(weight)).numpy(), expected)


@pytest.mark.parametrize("function", [quantize_int8, quantize_int4, quantize_nf4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(function: object, value: float) -> None:
    weight = drawn(4, 64)
    weight[2, 5] = value
    assert callable(function)
    with pytest.raises(ValueError, match="NaN or infinite"):
        function(weight)


def test_int4_of_inputs_that_32_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 32"):
        quantize_int4(drawn(4, 72))
