"""Ops of batch-invariant backends: near the exact result, and a row's bits those of the row alone.

What the whole model makes of them is asked in tests/models/test_batch_invariant.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.ops import Backend, BackendUnavailable
from loraplex.kernels.select import load_backend
from tests.support.rounding import assert_near, exact

SHAPES = [(576, 192), (896, 151), (64, 64), (34, 3)]  # whole tiles, a part of one on either side


@pytest.fixture
def invariant(backend: Backend) -> Iterator[Backend]:
    """The batch-invariant twin of `backend`."""
    if isinstance(backend, CpuBackend):
        yield CpuBackend(backend.team.isa, batch_invariant=True)
    elif backend.name == "triton" and backend.device.type == "cpu":
        from tests.support import triton_bf16

        with triton_bf16.dots_in_order():
            yield load_backend("triton", "cpu", batch_invariant=True)
    else:
        yield load_backend(backend.name, backend.device.type, batch_invariant=True)


def test_the_reference_has_no_batch_invariant_twin() -> None:
    with pytest.raises(BackendUnavailable, match="'reference' is not batch-invariant"):
        load_backend("reference", "cpu", batch_invariant=True)


@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_linear(invariant: Backend, dtype: torch.dtype, n_in: int, n_out: int) -> None:
    generator = torch.Generator().manual_seed(n_in)
    x = torch.randn(70, n_in, generator=generator).to(invariant.device, dtype)  # a tile of 64 rows and a part of one
    w = torch.randn(n_out, n_in, generator=generator).to(invariant.device, dtype)
    expected, terms = exact(x) @ exact(w).T, np.abs(exact(x)) @ np.abs(exact(w)).T
    packed = invariant.pack_linear(w)
    y, logits = invariant.linear(x, packed), invariant.logits(x, packed)
    assert (y.dtype, logits.dtype) == (dtype, torch.float32)
    assert_near(y, expected, terms)
    assert_near(logits.to(dtype), expected, terms, ulps=2.0)
    back = torch.arange(69, -1, -1, device=invariant.device)
    for op, whole in ((invariant.linear, y), (invariant.logits, logits)):
        assert torch.equal(op(x[back], packed)[back], whole)
        for rows in (1, 2, 16, 33):
            assert torch.equal(op(x[:rows], packed), whole[:rows]), f"{rows} rows"
        assert torch.equal(op(x[68:69], packed), whole[68:69])
    assert invariant.linear(x[:0], packed).shape == (0, n_out)


@pytest.mark.parametrize("columns", [96, 1001])
def test_rowwise(invariant: Backend, dtype: torch.dtype, columns: int) -> None:
    """Odd rows end inside a vector: torch computes what is left at a tensor's end by other code."""
    generator = torch.Generator().manual_seed(columns)
    x, residual = torch.randn(2, 9, columns, generator=generator).to(invariant.device, dtype)
    weight = torch.randn(columns, generator=generator).to(invariant.device, dtype)
    gate_up = torch.randn(9, 2 * columns, generator=generator).to(invariant.device, dtype)
    normed, total = invariant.rms_norm(x, weight, 1e-6, residual, 0.0)
    plain, same = invariant.rms_norm(x, weight, 1e-6, None, 1.0)
    assert torch.equal(same, x)
    for row in range(9):
        one = slice(row, row + 1)
        alone = invariant.rms_norm(x[one], weight, 1e-6, residual[one], 0.0)
        assert torch.equal(alone[0], normed[one])
        assert torch.equal(alone[1], total[one])
        assert torch.equal(invariant.rms_norm(x[one], weight, 1e-6, None, 1.0)[0], plain[one])
    for activation in ("silu", "gelu_tanh"):
        whole = invariant.act_mul(gate_up, activation)
        for row in range(9):
            assert torch.equal(invariant.act_mul(gate_up[row : row + 1], activation), whole[row : row + 1])
