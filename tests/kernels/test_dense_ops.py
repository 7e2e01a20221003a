"""embed, rms_norm, linear, add_bias_, act_mul against fp64 formulas, and load_backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraplex.kernels.ops import Backend, BackendUnavailable
from loraplex.kernels.select import load_backend
from tests.support.rounding import assert_near, exact, rounded, share_equal


def _randn(backend: Backend, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(backend.device, dtype)


@pytest.mark.parametrize("scale", [None, 1152**0.5])
def test_embed_rounds_the_scale_before_it_is_used(backend: Backend, dtype: torch.dtype, scale: float | None) -> None:
    table = _randn(backend, dtype, 50, 24)
    packed = backend.pack_linear(table)
    before = table.clone()
    ids = torch.tensor([0, 49, 7, 7, 31], device=backend.device)
    y = backend.embed(ids, packed, scale)
    factor = 1.0 if scale is None else float(torch.tensor(scale, dtype=dtype))
    expected = rounded(exact(table)[[0, 49, 7, 7, 31]] * factor, dtype)
    assert np.array_equal(exact(y), expected)
    y.zero_()  # the table must not be what was handed out
    assert torch.equal(table, before)


def test_embed_takes_rows_of_the_step(backend: Backend, dtype: torch.dtype) -> None:
    table, own = _randn(backend, dtype, 50, 24), _randn(backend, dtype, 3, 24, seed=1)
    ids = torch.tensor([-1, 49, 50, 7, -3, 1 << 40], device=backend.device)
    y = backend.embed(ids, backend.pack_linear(table), 2.0, own)
    nothing = torch.zeros_like(own[0])
    assert torch.equal(y, torch.stack([own[0], table[49] * 2, nothing, table[7] * 2, own[2], nothing]))


@pytest.mark.parametrize("shape", [(1, 33), (5, 576), (3, 4, 64)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], with_residual: bool, offset: float
) -> None:
    x = _randn(backend, dtype, *shape) * 3
    residual = _randn(backend, dtype, *shape, seed=1) if with_residual else None
    weight = _randn(backend, dtype, shape[-1], seed=2)
    kept = x.clone()
    y, r = backend.rms_norm(x, weight, 1e-5, residual, offset)

    total = exact(x) if residual is None else rounded(exact(x) + exact(residual), dtype)
    assert np.array_equal(exact(r), total)
    normed = total / np.sqrt(np.mean(total**2, -1, keepdims=True) + 1e-5)
    w = exact(weight)
    expected = w * rounded(normed, dtype) if offset == 0.0 else normed * (1.0 + w)
    assert_near(y, expected, ulps=3.0)
    if dtype != torch.float32:  # where rounding sits shows only there; a fused form agrees on three quarters at best
        assert share_equal(y, expected) > 0.98
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("tokens", "n_in", "n_out"), [(1, 64, 48), (4, 34, 7), (17, 576, 192), (129, 96, 100)])
def test_linear_and_logits(backend: Backend, dtype: torch.dtype, tokens: int, n_in: int, n_out: int) -> None:
    x = _randn(backend, dtype, tokens, n_in)
    weight = _randn(backend, dtype, n_out, n_in, seed=1)
    x64, w64 = exact(x), exact(weight)
    packed = backend.pack_linear(weight)
    assert (packed.in_features, packed.out_features) == (n_in, n_out)
    expected, terms = x64 @ w64.T, np.abs(x64) @ np.abs(w64).T
    y = backend.linear(x, packed)
    assert y.dtype == dtype
    assert_near(y, expected, terms)
    logits = backend.logits(x, packed)
    assert logits.dtype == torch.float32
    assert_near(logits.to(dtype), expected, terms, ulps=2.0)


def test_take_rows(backend: Backend, dtype: torch.dtype) -> None:
    x = _randn(backend, dtype, 9, 21)
    rows = torch.tensor([8, 0, 0, 5], device=backend.device)
    assert torch.equal(backend.take_rows(x, rows), x[rows])


def test_long_sums_are_taken_in_fp32(backend: Backend, dtype: torch.dtype) -> None:
    """4096 terms of one sign: summed in a 16-bit dtype they would stick far below the total."""
    x = torch.full((1, 4096), 0.5, device=backend.device, dtype=dtype)
    weight = torch.full((8, 4096), 0.25, device=backend.device, dtype=dtype)
    y = backend.linear(x, backend.pack_linear(weight))
    assert np.array_equal(exact(y), np.full((1, 8), 512.0))


def test_add_bias_is_in_place(backend: Backend, dtype: torch.dtype) -> None:
    y, bias = _randn(backend, dtype, 5, 31), _randn(backend, dtype, 31, seed=1)
    expected = rounded(exact(y) + exact(bias), dtype)
    assert backend.add_bias_(y, bias) is y
    assert np.array_equal(exact(y), expected)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_act_mul(backend: Backend, dtype: torch.dtype, activation: str) -> None:
    gate_up = _randn(backend, dtype, 7, 2 * 39) * 4
    gate, up = np.split(exact(gate_up), 2, axis=-1)
    if activation == "silu":
        act = gate / (1.0 + np.exp(-gate))
    else:
        act = 0.5 * gate * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (gate + 0.044715 * gate**3)))
    # Far left, gelu is 1 - 1: its error is relative to |gate|.
    assert_near(backend.act_mul(gate_up, activation), act * up, terms=np.abs(gate * up))


def test_act_mul_refuses_what_it_does_not_know(backend: Backend) -> None:
    with pytest.raises(ValueError, match="relu"):
        backend.act_mul(torch.zeros(1, 4, device=backend.device), "relu")


def test_backends_are_asked_for_by_name() -> None:
    assert load_backend("reference", "cpu").device == torch.device("cpu")
    with pytest.raises(ValueError, match="there are: auto, cpu, reference"):
        load_backend("abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_not_a_fallback() -> None:
    assert load_backend("reference").device == torch.device("cpu")  # auto
    for name in ("reference", "triton", "auto"):
        with pytest.raises(BackendUnavailable, match="no GPU"):
            load_backend(name, "cuda")


def test_triton_on_a_cpu_is_for_tests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="needs a GPU"):
        load_backend("triton", "cpu")
