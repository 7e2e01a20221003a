"""Linears and tables of quantised weights against products with the dequantised weight in fp64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from loraplex.kernels.ops import Backend
from loraplex.kernels.quantized import Activations, GroupScales, QuantizedWeight, dequantize, round_activations
from tests.support.quantized import FORMATS, random_weight
from tests.support.rounding import Exact, assert_near, exact

NAMED = pytest.mark.parametrize("name", FORMATS)
BOTH = pytest.mark.parametrize("activations", Activations)


def _sums(weight: QuantizedWeight, x: Tensor, activations: Activations) -> tuple[Exact, Exact, Exact | float]:
    """Compute x W^T in fp64; how large the terms are of which it is made where scales are multiplied last; the wobble.

    In bf16 a codebook may be rounded to bf16, as its library rounds weights: NF4 errs by a thousandth then, which
    grows as the root of the sum of squares. Three quarters of an ulp of that are five deviations.
    """
    order = torch.arange(weight.in_features) if weight.order is None else weight.order
    if activations is Activations.A8:
        x = round_activations(x[:, order], weight.format.group)[:, order.argsort()]
    values = replace(weight, offset=None)
    zeros = replace(values, format=replace(weight.format, zero=0, codebook=None))
    parts = [dequantize(values), dequantize(zeros)]
    if weight.offset is not None:
        parts.append(dequantize(replace(weight, codes=torch.zeros_like(weight.codes))))
    sizes = sum(np.abs(exact(part)) for part in parts)
    dense = exact(dequantize(weight))
    rounds = weight.format.codebook is not None and activations is Activations.EXACT and x.dtype != torch.float32
    wobble = 0.75 * np.sqrt(exact(x) ** 2 @ dense.T**2) if rounds else 0.0
    return exact(x) @ dense.T, np.abs(exact(x)) @ sizes.T, wobble


@NAMED
@BOTH
@pytest.mark.parametrize(("out", "columns"), [(64, 512), (100, 256), (7, 768)])
def test_linear(
    backend: Backend, dtype: torch.dtype, name: str, activations: Activations, out: int, columns: int
) -> None:
    weight = random_weight(name, out, columns)
    packed = backend.pack_parts([weight], dtype, activations)
    assert (packed.in_features, packed.out_features) == (columns, out)
    for rows in (1, 2, 7, 40, 200):
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
        expected, terms, wobble = _sums(weight, x, activations)
        y, logits = backend.linear(x.to(backend.device), packed), backend.logits(x.to(backend.device), packed)
        assert (y.dtype, logits.dtype) == (dtype, torch.float32)
        assert_near(y, expected, terms, wobble)
        assert_near(logits.to(dtype), expected, terms, wobble, ulps=2.0)


@BOTH
def test_every_count_of_rows(backend: Backend, activations: Activations) -> None:
    """1 to 40 rows: tiles of every height, alone and one behind the other."""
    for name in FORMATS:
        weight = random_weight(name, 80, 256)
        packed = backend.pack_parts([weight], torch.bfloat16, activations)
        x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        expected, terms, wobble = _sums(weight, x, activations)
        for rows in range(1, 41):
            bounds = [each if isinstance(each, float) else each[:rows] for each in (terms, wobble)]
            assert_near(backend.linear(x[:rows].to(backend.device), packed), expected[:rows], *bounds)


@BOTH
def test_parts_of_several_formats_and_a_dense_one(
    backend: Backend, dtype: torch.dtype, activations: Activations
) -> None:
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(40, 512, generator=generator).to(dtype)
    parts: list[Tensor | QuantizedWeight] = [
        random_weight("Q4_K", 100, 512),
        dense,
        random_weight("Q8_0", 30, 512),
        random_weight("nf4", 64, 512),
    ]
    packed = backend.pack_parts(parts, dtype, activations)
    x = torch.randn(9, 512, generator=generator).to(dtype)
    found = backend.linear(x, packed).split([100, 40, 30, 64], 1)
    for part, y in zip(parts, found, strict=True):
        if isinstance(part, Tensor):
            assert_near(y, exact(x) @ exact(part).T, np.abs(exact(x)) @ np.abs(exact(part)).T)
        else:
            assert_near(y, *_sums(part, x, activations))


def test_inputs_of_no_whole_groups_stay_exact(backend: Backend) -> None:
    """48 inputs in groups of 16: 8-bit activations have groups of 32."""
    weight = random_weight("Q6_K", 20, 512)
    scale = GroupScales(weight.scale.shared.float().repeat_interleave(3, 1)[:, :3])
    cut = replace(
        weight, format=replace(weight.format, scale_bits=32), codes=weight.codes[:, :48].contiguous(), scale=scale
    )
    packed = backend.pack_parts([cut], torch.float32, Activations.A8)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(5))
    assert_near(backend.linear(x.to(backend.device), packed), *_sums(cut, x, Activations.EXACT))


@NAMED
def test_embed_is_the_dequantised_row_rounded_once(backend: Backend, dtype: torch.dtype, name: str) -> None:
    weight = random_weight(name, 100, 256)
    packed = backend.pack_parts([weight], dtype, Activations.A8)
    ids = torch.tensor([0, 99, 63, 64, 7], device=backend.device)
    for scale in (None, 1152**0.5):
        expected = dequantize(weight).to(dtype)[ids.cpu()]
        if scale is not None:
            expected *= torch.tensor(scale, dtype=dtype).item()
        assert torch.equal(backend.embed(ids, packed, scale).cpu(), expected)
        own = expected[:1].to(ids.device) + 1
        outside = torch.tensor([-1, weight.out_features], device=ids.device)
        assert torch.equal(backend.embed(outside, packed, scale, own).cpu(), torch.cat((own, 0 * own)).cpu())


def test_groups_that_no_panel_holds_are_multiplied_dense(backend: Backend) -> None:
    """Groups of 12, and of 3 to a row of 36: kept as the weights they stand for."""
    weight = random_weight("int4", 20, 48)
    odd = replace(weight, format=replace(weight.format, group=12), scale=random_weight("int4", 20, 128).scale)
    packed = backend.pack_parts([odd], torch.float32, Activations.EXACT)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(3))
    assert_near(backend.linear(x.to(backend.device), packed), *_sums(odd, x, Activations.EXACT))
