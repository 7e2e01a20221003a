"""Attention of prefill chunks: tiles of queries, each passing over the keys that it sees.

Blocks of keys begin at multiples of their size counted from position 0: a row has the same bits in any chunk of its
prompt.
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.kernels.gpu import tuning
from loraplex.kernels.gpu.online_softmax import NO_WINDOW, attend, sizes
from loraplex.kernels.records import AttentionMeta, AttentionParams, KVLayer


def prefill(
    q: Tensor, layer: KVLayer, meta: AttentionMeta, params: AttentionParams, first: int, last: int, out: Tensor
) -> None:
    """Backend.attention for the sequences [first, last), each with any number of queries. One launch."""
    group, group_pad, dim_pad = sizes(params)
    tile = tuning.prefill_tile(dim_pad, q.element_size())
    rows = max(tile.rows, group_pad)
    longest = max(stop - start for start, stop in itertools.pairwise(meta.query_bounds[first : last + 1]))
    if longest == 0:
        return
    table = meta.groups[layer.group].block_table
    _tile[(triton.cdiv(longest, rows // group_pad), params.num_kv_heads, last - first)](
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


@triton.jit(do_not_specialize=["first_seq", "table_stride", "window"])
def _tile(
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
