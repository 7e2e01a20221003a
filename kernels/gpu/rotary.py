"""The rotation of queries and keys, normed per head where the base does so, with the store of keys and values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.constants import ALIGN, BLOCK_SIZE, TILE_COLUMNS
from loraplex.kernels.gpu.own import COUNTS, cell_of, own_range, tables
from loraplex.kernels.records import AdapterStep, AttentionParams, KVLayer, QKNorm

_COLUMNS = tl.constexpr(TILE_COLUMNS)
_UNIT = tl.constexpr(ALIGN)


def rope_store_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    layer: KVLayer,
    store_index: Tensor,
    params: AttentionParams,
    norm: QKNorm | None,
    norms: AdapterStep | None,
) -> Tensor:
    """As Backend.rope_store_kv. A token whose store_index is negative is not stored (rows that fill up a graph).

    norms: the step's adapters, where some have norms of their own.
    """
    heads, kv_heads, dim = params.num_heads, params.num_kv_heads, params.head_dim
    q = torch.empty(qkv.shape[0], heads, dim, dtype=qkv.dtype, device=qkv.device)
    worn: tuple[Tensor | int, ...] = (qkv,) * 6 + (0,) * 3
    has_own = norms is not None and norm is not None and norm.place >= 0
    if norms is not None and norm is not None and has_own:
        worn = (
            norms.arena,
            *tables(norms),
            len(norms.segments.mixes),
            *cell_of(norms.table, norm.place),
        )
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
            *worn,
            layer.k.stride(0),
            0.0 if norm is None else norm.eps,
            0.0 if norm is None else norm.offset,
            normed=norm is not None,
            has_own=has_own,
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
def _normed(x, weight, scale, offset, round_first: tl.constexpr, dtype: tl.constexpr):
    """Semantics: as _rms_norm, with scale = 1 / sqrt(mean(x^2) + eps); the result widened again."""
    n = x * scale
    n = weight * n.to(dtype).to(tl.float32) if round_first else n * (offset + weight)
    return n.to(dtype).to(tl.float32)


@triton.jit
def _weights(base, own, found, dims, inside, has_own: tl.constexpr):
    """Semantics: the norm's weights at `dims` in fp32, own[dims] where one was found."""
    weight = tl.load(base + dims, mask=inside, other=0.0).to(tl.float32)
    if has_own:
        weight = tl.where(found, tl.load(own + dims, mask=inside & found, other=0.0), weight)
    return weight


@triton.jit(do_not_specialize=COUNTS)
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
    arena,
    ranges,
    tiles,
    indptr,
    mix_ptr,
    mix_slot,
    num_segments,
    slot_stride,
    cell,
    page_stride,
    eps,
    offset,
    normed: tl.constexpr,
    has_own: tl.constexpr,
    round_first: tl.constexpr,
    num_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    dim_pad: tl.constexpr,
    rotary_dim: tl.constexpr,
    page_tokens: tl.constexpr,
):
    """Grid (token, head of qkv).

    Semantics: x = rms_norm(head) where it has one, with the adapter's norm where it has one; x[j] = x[j] * cos[j] -+
               x[partner of j] * sin[j] for j < rotary_dim, the partner half a rotation away; q goes to `q`, k and v to
               their place in the cache, v as it is.
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
    if normed:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / head_dim + eps)
        found = head < 0
        own = arena.to(tl.pointer_type(tl.float32))
        if has_own:
            keys = tl.where(head < num_heads, 0, 2)  # the next place
            first, last = own_range(ranges, indptr, mix_ptr, mix_slot, num_segments, slot_stride, cell + keys, token)
            found = first < last
            at = tl.load(tiles + first.to(tl.int64) * _COLUMNS, mask=found, other=0).to(tl.int64)
            own = (arena + at * _UNIT).to(tl.pointer_type(tl.float32))
        if head < num_heads:
            weight = _weights(q_norm, own, found, dims, inside, has_own)
            beside = _weights(q_norm, own, found, partner, turned, has_own)
        else:
            weight = _weights(k_norm, own, found, dims, inside, has_own)
            beside = _weights(k_norm, own, found, partner, turned, has_own)
        x = _normed(x, weight, scale, offset, round_first, dtype)
        other = _normed(other, beside, scale, offset, round_first, dtype)
    c = tl.load(cos + token * rotary_dim + dims, mask=turned, other=1.0)
    s = tl.load(sin + token * rotary_dim + dims, mask=turned, other=0.0)
    result = (x * c + tl.where(dims < half, -other, other) * s).to(dtype)
    if head < num_heads:
        tl.store(q + (token * num_heads + head) * head_dim + dims, result, mask=inside)
    else:
        tl.store(k_cache + place + (head - num_heads) * page_tokens * head_dim, result, mask=stored)
