"""Attention over paged keys and values: decode rows with their keys split, prefill chunks in tiles of queries.

The query heads of one kv head share a program, so keys and values are read once for all of them; the group is padded
to a power of two, at least 16 rows for the matrix units. Products and softmax are fp32: probabilities are multiplied
with V as the sum of two numbers of the compute dtype, so that rounding them costs nothing that can be seen.

Blocks of keys begin at multiples of their size counted from position 0, and the keys of a decode row are split every
KV_SPLIT positions whatever its length: a row has the same bits alone, among others, and in any chunk of its prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu import tuning
from loraplex.kernels.metadata import BLOCK_SIZE, AttentionMeta, AttentionParams, KVLayer

NO_WINDOW = 1 << 30
"""A window longer than any context."""


def attention(q: Tensor, layer: KVLayer, meta: AttentionMeta, params: AttentionParams) -> Tensor:
    """Backend.attention: q [T, num_heads, head_dim] -> [T, num_heads * head_dim].

    One launch per run of prefill chunks and two per run of decode rows; a step's order (see ForwardBatch) has at most
    two runs of each.
    """
    out = torch.empty(q.shape[0], params.num_heads * params.head_dim, dtype=q.dtype, device=q.device)
    for is_decode, first, last in _runs(meta.is_decode):
        (_decode if is_decode else _prefill)(q, layer, meta, params, first, last, out)
    return out


def _runs(is_decode: tuple[bool, ...]) -> Iterator[tuple[bool, int, int]]:
    """(role, first sequence, past the last) of neighbours with the same role."""
    start = 0
    for role, members in itertools.groupby(is_decode):
        stop = start + len(list(members))
        yield role, start, stop
        start = stop


def _sizes(params: AttentionParams) -> tuple[int, int, int]:
    """(query heads per kv head, the same padded, head_dim padded)."""
    group = params.num_heads // params.num_kv_heads
    return group, triton.next_power_of_2(group), max(16, triton.next_power_of_2(params.head_dim))


def _decode(
    q: Tensor, layer: KVLayer, meta: AttentionMeta, params: AttentionParams, first: int, last: int, out: Tensor
) -> None:
    group, group_pad, dim_pad = _sizes(params)
    tile = tuning.decode_tile(dim_pad, q.element_size())
    window = params.window or NO_WINDOW
    lens = meta.kv_lens_host[first:last]
    splits = max(_splits(kv_len, window) for kv_len in lens)
    if splits == 0:
        return
    table = meta.groups[layer.group].block_table
    heads, dim = params.num_heads, params.head_dim
    partial = torch.empty(last - first, heads, splits, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(last - first, heads, splits, 2, dtype=torch.float32, device=q.device)
    _decode_split[(last - first, params.num_kv_heads, splits)](
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
    _decode_combine[(last - first, heads)](
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


def _splits(kv_len: int, window: int) -> int:
    """At least the splits that a decode row sees with this many keys or fewer: a graph is captured for the most."""
    return min(int(triton.cdiv(kv_len, tuning.KV_SPLIT)), int(triton.cdiv(window - 1, tuning.KV_SPLIT)) + 1)


def _prefill(
    q: Tensor, layer: KVLayer, meta: AttentionMeta, params: AttentionParams, first: int, last: int, out: Tensor
) -> None:
    group, group_pad, dim_pad = _sizes(params)
    tile = tuning.prefill_tile(dim_pad, q.element_size())
    rows = max(tile.rows, group_pad)
    longest = max(stop - start for start, stop in itertools.pairwise(meta.query_bounds[first : last + 1]))
    if longest == 0:
        return
    table = meta.groups[layer.group].block_table
    _prefill_tile[(triton.cdiv(longest, rows // group_pad), params.num_kv_heads, last - first)](
        q,
        layer.k,
        layer.v,
        table,
        meta.query_ptr,
        meta.kv_lens,
        out,
        first,
        table.shape[1],
        layer.k.stride(0),
        params.window or NO_WINDOW,
        float(params.scale),
        float(params.softcap or 0.0),
        has_softcap=params.softcap is not None,
        num_heads=params.num_heads,
        group=group,
        group_pad=group_pad,
        rows=rows,
        head_dim=params.head_dim,
        dim_pad=dim_pad,
        page_tokens=BLOCK_SIZE,
        keys=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit
def _attend(
    acc,
    top,
    total,
    q,
    k,
    v,
    table,
    page_stride,
    kv_head,
    positions,
    oldest,
    newest,
    query,
    window,
    scale,
    softcap,
    has_softcap: tl.constexpr,
    head_dim: tl.constexpr,
    dim_pad: tl.constexpr,
    page_tokens: tl.constexpr,
):
    """One block of keys: the running (acc [rows, D], top [rows], total [rows]) of an online softmax.

    positions [keys]: of the block, read where oldest <= position <= newest; query [rows]: positions of the queries.
    Semantics: a row's top = max of its scores so far, total = sum of exp(score - top), acc = the same sum times V.
               A block that a row does not see leaves it as it was, to the bit.
    """
    dims = tl.arange(0, dim_pad)
    inside = (positions >= oldest) & (positions <= newest)
    page = tl.load(table + positions // page_tokens, mask=inside, other=0).to(tl.int64)
    at = page * page_stride + (kv_head * page_tokens + positions % page_tokens) * head_dim
    mask = inside[:, None] & (dims < head_dim)[None, :]
    keys = tl.load(k + at[:, None] + dims[None, :], mask=mask, other=0.0)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    if has_softcap:
        # softcap * tanh(s / softcap); the interpreter has no tanh
        e = tl.exp(-2.0 * tl.abs(scores / softcap))
        capped = softcap * (1.0 - e) / (1.0 + e)
        scores = tl.where(scores < 0.0, -capped, capped)
    seen = inside[None, :] & (positions[None, :] <= query[:, None]) & (positions[None, :] > query[:, None] - window)
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp(scores - base[:, None])
    fade = tl.exp(top - base)
    total = total * fade + tl.sum(p, axis=1)
    values = tl.load(v + at[:, None] + dims[None, :], mask=mask, other=0.0)
    acc = acc * fade[:, None]
    high = p.to(v.dtype.element_ty)
    acc = tl.dot(high, values, acc, input_precision="ieee")
    if v.dtype.element_ty != tl.float32:
        low = (p - high.to(tl.float32)).to(v.dtype.element_ty)
        acc = tl.dot(low, values, acc, input_precision="ieee")
    return acc, new_top, total


@triton.jit(do_not_specialize=["first_seq", "splits", "table_stride", "window"])
def _decode_split(
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
        acc, top, total = _attend(
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
def _decode_combine(
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


@triton.jit(do_not_specialize=["first_seq", "table_stride", "window"])
def _prefill_tile(
    q,
    k,
    v,
    block_table,
    query_ptr,
    kv_lens,
    out,
    first_seq,
    table_stride,
    page_stride,
    window,
    scale,
    softcap,
    has_softcap: tl.constexpr,
    num_heads: tl.constexpr,
    group: tl.constexpr,
    group_pad: tl.constexpr,
    rows: tl.constexpr,
    head_dim: tl.constexpr,
    dim_pad: tl.constexpr,
    page_tokens: tl.constexpr,
    keys: tl.constexpr,
):
    """Grid (tile of queries, kv head, sequence). Row r of a tile is query r // group_pad, head r % group_pad.

    Semantics: out[t, head] = softmax(scores of the keys that token t sees) @ V, as one pass over blocks of keys.
    """
    kv_head = tl.program_id(1)
    seq = first_seq + tl.program_id(2)
    first_token = tl.load(query_ptr + seq)
    count = tl.load(query_ptr + seq + 1) - first_token
    queries_in_tile: tl.constexpr = rows // group_pad
    low = tl.program_id(0) * queries_in_tile
    if low >= count:
        return
    before = tl.load(kv_lens + seq) - count
    row = tl.arange(0, rows)
    dims = tl.arange(0, dim_pad)
    index = low + row // group_pad
    heads = kv_head * group + row % group_pad
    mask = ((index < count) & (row % group_pad < group))[:, None] & (dims < head_dim)[None, :]
    at = ((first_token + index).to(tl.int64)[:, None] * num_heads + heads[:, None]) * head_dim + dims[None, :]
    queries = tl.load(q + at, mask=mask, other=0.0)
    query = before + index
    oldest = tl.maximum(before + low - window + 1, 0)
    newest = before + tl.minimum(low + queries_in_tile, count) - 1
    acc = tl.zeros((rows, dim_pad), dtype=tl.float32)
    top = tl.full((rows,), float("-inf"), tl.float32)
    total = tl.zeros((rows,), dtype=tl.float32)
    table = block_table + seq.to(tl.int64) * table_stride
    for n in range(oldest // keys * keys, newest + 1, keys):
        positions = n + tl.arange(0, keys)
        acc, top, total = _attend(
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
            newest,
            query,
            window,
            scale,
            softcap,
            has_softcap,
            head_dim,
            dim_pad,
            page_tokens,
        )
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
