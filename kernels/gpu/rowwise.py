"""Ops that look at one row at a time: norm, rotation with the KV store, activation, bias, gathering of rows.

Every load is widened to fp32 before anything is computed, and every result rounded where the Semantics say so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.constants import ACTIVATIONS, BLOCK_SIZE, Activation
from loraplex.kernels.gpu import tuning
from loraplex.kernels.records import AttentionParams, KVLayer, QKNorm

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


def rope_store_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    layer: KVLayer,
    store_index: Tensor,
    params: AttentionParams,
    norm: QKNorm | None,
) -> Tensor:
    """As Backend.rope_store_kv. A token whose store_index is negative is not stored (rows that fill up a graph)."""
    heads, kv_heads, dim = params.num_heads, params.num_kv_heads, params.head_dim
    q = torch.empty(qkv.shape[0], heads, dim, dtype=qkv.dtype, device=qkv.device)
    if q.numel():
        _rope_store_kv[(qkv.shape[0], heads + 2 * kv_heads)](
            qkv,
            cos,
            sin,
            q,
            layer.k,
            layer.v,
            store_index,
            qkv if norm is None else norm.q,
            qkv if norm is None else norm.k,
            layer.k.stride(0),
            0.0 if norm is None else norm.eps,
            0.0 if norm is None else norm.offset,
            normed=norm is not None,
            round_first=norm is None or norm.offset == 0.0,
            num_heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            dim_pad=triton.next_power_of_2(dim),
            rotary_dim=cos.shape[1],
            page_tokens=BLOCK_SIZE,
            num_warps=1,
        )
    return q


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


@triton.jit
def _normed(x, weight, scale, offset, round_first: tl.constexpr, dtype: tl.constexpr):
    """Semantics: as _rms_norm, with scale = 1 / sqrt(mean(x^2) + eps); the result widened again."""
    n = x * scale
    n = weight * n.to(dtype).to(tl.float32) if round_first else n * (offset + weight)
    return n.to(dtype).to(tl.float32)


@triton.jit
def _rope_store_kv(
    qkv,
    cos,
    sin,
    q,
    k_cache,
    v_cache,
    store_index,
    q_norm,
    k_norm,
    page_stride,
    eps,
    offset,
    normed: tl.constexpr,
    round_first: tl.constexpr,
    num_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    dim_pad: tl.constexpr,
    rotary_dim: tl.constexpr,
    page_tokens: tl.constexpr,
):
    """Grid (token, head of qkv).

    Semantics: x = rms_norm(head) where it has one; x[j] = x[j] * cos[j] -+ x[partner of j] * sin[j] for j < rotary_dim,
               the partner half a rotation away; q goes to `q`, k and v to their place in the cache, v as it is.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, dim_pad)
    inside = dims < head_dim
    source = qkv + (token * (num_heads + 2 * kv_heads) + head) * head_dim
    dtype = qkv.dtype.element_ty
    x = tl.load(source + dims, mask=inside, other=0.0)
    index = tl.load(store_index + token)
    stored = dims < tl.where(index >= 0, head_dim, 0)
    place = (index // page_tokens) * page_stride + (index % page_tokens) * head_dim + dims
    if head >= num_heads + kv_heads:
        tl.store(v_cache + place + (head - num_heads - kv_heads) * page_tokens * head_dim, x, mask=stored)
        return
    half: tl.constexpr = rotary_dim // 2
    turned = dims < rotary_dim
    partner = tl.where(dims < half, dims + half, dims - half)
    x = x.to(tl.float32)
    other = tl.load(source + partner, mask=turned, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / head_dim + eps)
    if head < num_heads:
        if normed:
            weight = tl.load(q_norm + dims, mask=inside, other=0.0).to(tl.float32)
            x = _normed(x, weight, scale, offset, round_first, dtype)
            weight = tl.load(q_norm + partner, mask=turned, other=0.0).to(tl.float32)
            other = _normed(other, weight, scale, offset, round_first, dtype)
    else:
        if normed:
            weight = tl.load(k_norm + dims, mask=inside, other=0.0).to(tl.float32)
            x = _normed(x, weight, scale, offset, round_first, dtype)
            weight = tl.load(k_norm + partner, mask=turned, other=0.0).to(tl.float32)
            other = _normed(other, weight, scale, offset, round_first, dtype)
    c = tl.load(cos + token * rotary_dim + dims, mask=turned, other=1.0)
    s = tl.load(sin + token * rotary_dim + dims, mask=turned, other=0.0)
    result = (x * c + tl.where(dims < half, -other, other) * s).to(dtype)
    if head < num_heads:
        tl.store(q + (token * num_heads + head) * head_dim + dims, result, mask=inside)
    else:
        tl.store(k_cache + place + (head - num_heads) * page_tokens * head_dim, result, mask=stored)
