"""Ops that look at one row at a time: norm, activation, bias, gathering of rows. (Rotation: rotary.py.)

Every load is widened to fp32 before anything is computed, and every result rounded where the Semantics say so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.constants import ACTIVATIONS, Activation
from loraplex.kernels.gpu import tuning

GELU_TANH = tl.constexpr(int(Activation.GELU_TANH))


def gather(table: Tensor, ids: Tensor, scale: float | None) -> Tensor:
    """table [N, H], ids [L] int64 -> [L, H]; `scale` is already rounded to the dtype."""
    columns = table.shape[1]
    y = torch.empty(ids.shape[0], columns, dtype=table.dtype, device=table.device)
    if y.numel():
        _gather[(ids.shape[0], triton.cdiv(columns, tuning.ELEMENTS))](
            table, ids, y, columns, 0.0 if scale is None else scale, has_scale=scale is not None, block=tuning.ELEMENTS
        )
    return y


def place_own_(y: Tensor, ids: Tensor, own: Tensor, vocab: int) -> None:
    """Write own [E, H] over the rows of y [T, H] whose ids [T] are outside the table; see Backend.embed."""
    columns = y.shape[1]
    if y.numel():
        _place_own[(ids.shape[0], triton.cdiv(columns, tuning.ELEMENTS))](
            y, ids, own, columns, vocab, block=tuning.ELEMENTS
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float) -> tuple[Tensor, Tensor]:
    """As Backend.rms_norm; x is contiguous."""
    columns = x.shape[-1]
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(columns)
    if x.numel():
        _rms_norm[(x.numel() // columns,)](
            x,
            x if residual is None else residual,
            weight,
            y,
            total,
            columns,
            eps,
            offset,
            has_residual=residual is not None,
            round_first=offset == 0.0,
            block=block,
            num_warps=tuning.row_warps(block),
        )
    return y, total


def add_bias_(y: Tensor, bias: Tensor) -> None:
    """y [T, out] += bias [out]."""
    columns = y.shape[1]
    if y.numel():
        _add_bias[(y.shape[0], triton.cdiv(columns, tuning.ELEMENTS))](y, bias, columns, block=tuning.ELEMENTS)


def act_mul(gate_up: Tensor, activation: str) -> Tensor:
    """gate_up [T, 2 * F] -> [T, F]. Raises ValueError for an activation that is none of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; there are: {', '.join(ACTIVATIONS)}")
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, columns, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        _act_mul[(rows, triton.cdiv(columns, tuning.ELEMENTS))](
            gate_up, y, columns, activation=int(ACTIVATIONS[activation]), block=tuning.ELEMENTS
        )
    return y


@triton.jit
def _gather(table, ids, y, columns, scale, has_scale: tl.constexpr, block: tl.constexpr):
    """Grid (row, block of columns). Semantics: y[i] = round(table[ids[i]] * scale)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    values = tl.load(table + tl.load(ids + row) * columns + column, mask=inside, other=0.0)
    if has_scale:
        values = (values.to(tl.float32) * scale).to(y.dtype.element_ty)
    tl.store(y + row * columns + column, values, mask=inside)


@triton.jit
def _place_own(y, ids, own, columns, vocab, block: tl.constexpr):
    """Grid (row, block of columns). Semantics: ids[i] < 0: y[i] = own[-1 - ids[i]]; ids[i] >= vocab: y[i] = 0."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    token = tl.load(ids + row)
    values = tl.load(own + (-1 - token) * columns + column, mask=inside & (token < 0), other=0.0)
    tl.store(y + row * columns + column, values, mask=inside & ((token < 0) | (token >= vocab)))


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
    y,
    total,
    columns,
    eps,
    offset,
    has_residual: tl.constexpr,
    round_first: tl.constexpr,
    block: tl.constexpr,
):
    """Grid (row).

    Semantics: total = round(x + residual); n = total / sqrt(mean(total^2) + eps) in fp32;
               round_first: y = round(weight * round(n)), else y = round(n * (offset + weight)).
    """
    at = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, block)
    inside = column < columns
    dtype = y.dtype.element_ty
    r = tl.load(x + at + column, mask=inside, other=0.0).to(tl.float32)
    if has_residual:
        r += tl.load(residual + at + column, mask=inside, other=0.0).to(tl.float32)
        r = r.to(dtype).to(tl.float32)
        tl.store(total + at + column, r.to(dtype), mask=inside)
    n = r * tl.rsqrt(tl.sum(r * r, axis=0) / columns + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    n = w * n.to(dtype).to(tl.float32) if round_first else n * (offset + w)
    tl.store(y + at + column, n.to(dtype), mask=inside)


@triton.jit
def _add_bias(y, bias, columns, block: tl.constexpr):
    """Grid (row, block of columns). Semantics: y = round(y + bias)."""
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    at = y + tl.program_id(0).to(tl.int64) * columns + column
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32) + tl.load(bias + column, mask=inside).to(tl.float32)
    tl.store(at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _act_mul(gate_up, y, columns, activation: tl.constexpr, block: tl.constexpr):
    """Grid (row, block of columns).

    Semantics: y = round(act(gate) * up) in fp32; silu(g) = g * sigmoid(g);
               gelu_tanh(g) = g * sigmoid(2 z), z = sqrt(2 / pi) * (g + 0.044715 g^3), which is g / 2 * (1 + tanh(z)).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    gate = tl.load(gate_up + row * 2 * columns + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * columns + column, mask=inside, other=0.0).to(tl.float32)
    z = gate
    if activation == GELU_TANH:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    result = gate / (1.0 + tl.exp(-z)) * up
    tl.store(y + row * columns + column, result.to(y.dtype.element_ty), mask=inside)
