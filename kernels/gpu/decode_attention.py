"""Attention of decode rows: one query a sequence, its keys split among programs, the parts combined.

The keys are split every KV_SPLIT positions, counted from position 0, whatever the row's length: a row has the same
bits alone and among others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.kernels.gpu import tuning
from loraplex.kernels.gpu.online_softmax import NO_WINDOW, attend, sizes
from loraplex.kernels.records import AttentionMeta, AttentionParams, KVLayer


def decode(
    q: Tensor, layer: KVLayer, meta: AttentionMeta, params: AttentionParams, first: int, last: int, out: Tensor
) -> None:
    """Backend.attention for the sequences [first, last), each with one query or none. Two launches."""
    group, group_pad, dim_pad = sizes(params)
    tile = tuning.decode_tile(dim_pad, q.element_size())
    window = params.window or NO_WINDOW
    lens = meta.kv_lens_host[first:last]
    splits = max(_most_splits(kv_len, window) for kv_len in lens)
    if splits == 0:
        return
    table = meta.groups[layer.group].block_table
    heads, dim = params.num_heads, params.head_dim
    partial = torch.empty(last - first, heads, splits, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(last - first, heads, splits, 2, dtype=torch.float32, device=q.device)
    _split[(last - first, params.num_kv_heads, splits)](
        q,
        layer.k,
        layer.v,
        table,
        meta.query_ptr,
        meta.kv_lens,
        partial,
        sums,
        first,
        splits,
        table.shape[1],
        layer.k.stride(0),
        window,
        float(params.scale),
        float(params.softcap or 0.0),
        has_softcap=params.softcap is not None,
        num_heads=heads,
        group=group,
        rows=max(tile.rows, group_pad),
        head_dim=dim,
        dim_pad=dim_pad,
        page_tokens=BLOCK_SIZE,
        split=tuning.KV_SPLIT,
        keys=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    _combine[(last - first, heads)](
        partial,
        sums,
        meta.query_ptr,
        meta.kv_lens,
        out,
        first,
        splits,
        window,
        num_heads=heads,
        head_dim=dim,
        dim_pad=dim_pad,
        split=tuning.KV_SPLIT,
        block=tuning.COMBINE_SPLITS,
        num_warps=4,
    )


def _most_splits(kv_len: int, window: int) -> int:
    """At least the splits that a decode row sees with this many keys or fewer: a graph is captured for the most."""
    return min(int(triton.cdiv(kv_len, tuning.KV_SPLIT)), int(triton.cdiv(window - 1, tuning.KV_SPLIT)) + 1)


@triton.jit(do_not_specialize=["first_seq", "splits", "table_stride", "window"])
def _split(
    q,
    k,
    v,
    block_table,
    query_ptr,
    kv_lens,
    partial,
    sums,
    first_seq,
    splits,
    table_stride,
    page_stride,
    window,
    scale,
    softcap,
    has_softcap: tl.constexpr,
    num_heads: tl.constexpr,
    group: tl.constexpr,
    rows: tl.constexpr,
    head_dim: tl.constexpr,
    dim_pad: tl.constexpr,
    page_tokens: tl.constexpr,
    split: tl.constexpr,
    keys: tl.constexpr,
):
    """Grid (sequence, kv head, split). A sequence has one query, or none.

    Semantics: partial = sum of exp(score - top) * V over the split's keys that the query sees, sums = (top, sum of
               exp(score - top)), for every query head of the kv head; splits count from the first that is seen.
    """
    index = tl.program_id(0)
    kv_head = tl.program_id(1)
    s = tl.program_id(2)
    seq = first_seq + index
    token = tl.load(query_ptr + seq)
    kv_len = tl.load(kv_lens + seq)
    oldest = tl.maximum(kv_len - window, 0)
    start = (oldest // split + s) * split
    if (start >= kv_len) | (tl.load(query_ptr + seq + 1) == token):
        return
    row = tl.arange(0, rows)
    dims = tl.arange(0, dim_pad)
    heads = kv_head * group + row
    mask = (row < group)[:, None] & (dims < head_dim)[None, :]
    at = (token.to(tl.int64) * num_heads + heads[:, None]) * head_dim + dims[None, :]
    queries = tl.load(q + at, mask=mask, other=0.0)
    query = tl.full((rows,), 0, tl.int32) + (kv_len - 1)
    acc = tl.zeros((rows, dim_pad), dtype=tl.float32)
    top = tl.full((rows,), float("-inf"), tl.float32)
    total = tl.zeros((rows,), dtype=tl.float32)
    table = block_table + seq.to(tl.int64) * table_stride
    for n in range(start, tl.minimum(start + split, kv_len), keys):
        positions = n + tl.arange(0, keys)
        acc, top, total = attend(
            acc,
            top,
            total,
            queries,
            k,
            v,
            table,
            page_stride,
            kv_head,
            positions,
            oldest,
            kv_len - 1,
            query,
            window,
            scale,
            softcap,
            has_softcap,
            head_dim,
            dim_pad,
            page_tokens,
        )
    at = (index.to(tl.int64) * num_heads + heads) * splits + s
    tl.store(partial + at[:, None] * head_dim + dims[None, :], acc, mask=mask)
    tl.store(sums + at * 2, top, mask=row < group)
    tl.store(sums + at * 2 + 1, total, mask=row < group)


@triton.jit(do_not_specialize=["first_seq", "splits", "window"])
def _combine(
    partial,
    sums,
    query_ptr,
    kv_lens,
    out,
    first_seq,
    splits,
    window,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    dim_pad: tl.constexpr,
    split: tl.constexpr,
    block: tl.constexpr,
):
    """Grid (sequence, query head).

    Semantics: out = sum of partial * exp(top - largest top) / sum of total * exp(top - largest top), block by block of
               the splits, in order.
    """
    index = tl.program_id(0)
    head = tl.program_id(1)
    seq = first_seq + index
    token = tl.load(query_ptr + seq)
    kv_len = tl.load(kv_lens + seq)
    if (kv_len == 0) | (tl.load(query_ptr + seq + 1) == token):
        return
    count = tl.cdiv(kv_len, split) - tl.maximum(kv_len - window, 0) // split
    dims = tl.arange(0, dim_pad)
    acc = tl.zeros((dim_pad,), dtype=tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    base = (index.to(tl.int64) * num_heads + head) * splits
    for start in range(0, count, block):
        s = start + tl.arange(0, block)
        tops = tl.load(sums + (base + s) * 2, mask=s < count, other=float("-inf"))
        totals = tl.load(sums + (base + s) * 2 + 1, mask=s < count, other=0.0)
        parts = tl.load(
            partial + (base + s)[:, None] * head_dim + dims[None, :],
            mask=(s < count)[:, None] & (dims < head_dim)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        fade = tl.exp(top - new_top)
        share = tl.exp(tops - new_top)
        acc = acc * fade + tl.sum(parts * share[:, None], axis=0)
        total = total * fade + tl.sum(totals * share, axis=0)
        top = new_top
    at = (token.to(tl.int64) * num_heads + head) * head_dim + dims
    tl.store(out + at, (acc / total).to(out.dtype.element_ty), mask=dims < head_dim)
