"""What decode and prefill attention share: one block of keys folded into a running softmax.

The query heads of one kv head share a program, so keys and values are read once for all of them; the group is padded
to a power of two, at least 16 rows for the matrix units. Products and softmax are fp32: probabilities are multiplied
with V as the sum of two numbers of the compute dtype, so that rounding them costs nothing that can be seen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraplex.kernels.records import AttentionParams

NO_WINDOW = 1 << 30
"""A window longer than any context."""


def sizes(params: AttentionParams) -> tuple[int, int, int]:
    """(query heads per kv head, the same padded, head_dim padded)."""
    group = params.num_heads // params.num_kv_heads
    return group, triton.next_power_of_2(group), max(16, triton.next_power_of_2(params.head_dim))


@triton.jit
def attend(
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
