"""Compute rotary positions and attention over pages in plain PyTorch, for reference.py.

Query heads are grouped on their kv head, so that attention of a decode row is a matrix product too; a sequence's pages
are gathered once. Scores, softmax and sums are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex.kernels.records import AttentionParams, KVLayer

QUERY_BLOCK = 128
"""Queries attended at once: bounds the score matrix to heads * 128 * kv_len fp32 (151 MB at 9 heads and 32k keys)."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim elements of every head of x [T, heads, D] in fp32; cos, sin [T, rotary_dim] fp32."""
    rotary_dim = cos.shape[-1]
    part = x[..., :rotary_dim].float()
    first, second = part.chunk(2, -1)
    turned = part * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
    if rotary_dim == x.shape[-1]:
        return turned.to(x.dtype)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), -1)


def attend(
    q: Tensor, layer: KVLayer, blocks: Tensor, kv_len: int, params: AttentionParams, found: Tensor, out: Tensor
) -> None:
    """Attend of one sequence: q [n, num_heads, D] at positions kv_len - n .. kv_len - 1 into `out` [n, num_heads, D].

    blocks [max_blocks]: its row of the block table; found [2, enough]: room for its keys and values.
    """
    n, heads, head_dim = q.shape
    kv_heads, group = params.num_kv_heads, heads // params.num_kv_heads
    first = kv_len - n
    oldest = 0 if params.window is None else max(0, first - params.window + 1)
    k = _gather(layer.k, blocks, oldest, kv_len, found[0])
    v = _gather(layer.v, blocks, oldest, kv_len, found[1])
    for start in range(0, n, QUERY_BLOCK):
        m = min(QUERY_BLOCK, n - start)
        begin = 0 if params.window is None else max(0, first + start - params.window + 1)
        end = first + start + m
        keys, values = k[:, begin - oldest : end - oldest], v[:, begin - oldest : end - oldest]
        # Heads of one kv head side by side, [kv_heads, group * m, D]: decode becomes a matrix product too.
        queries = q[start : start + m].float().view(m, kv_heads, group, head_dim).permute(1, 2, 0, 3)
        scores = queries.reshape(kv_heads, group * m, head_dim) @ keys.transpose(1, 2)
        scores *= params.scale
        if params.softcap is not None:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        if m > 1:
            hidden = _hidden(first + start, m, begin, end, params.window, q.device)
            scores.view(kv_heads, group, m, end - begin).masked_fill_(hidden, -torch.inf)
        mixed = torch.softmax(scores, -1) @ values
        out[start : start + m].view(m, kv_heads, group, head_dim).copy_(
            mixed.view(kv_heads, group, m, head_dim).permute(2, 0, 1, 3)
        )


def _gather(pages: Tensor, blocks: Tensor, start: int, stop: int, out: Tensor) -> Tensor:
    """Gather positions start .. stop - 1 of one sequence into `out` [kv_heads, stop - start, D] fp32, and no other."""
    _, kv_heads, block_size, head_dim = pages.shape
    first = start // block_size
    n = -(-stop // block_size) - first
    found = out[: kv_heads * n * block_size * head_dim].view(kv_heads, n, block_size, head_dim)
    found.copy_(pages.index_select(0, blocks[first : first + n]).transpose(0, 1))
    return found.view(kv_heads, n * block_size, head_dim)[:, start - first * block_size : stop - first * block_size]


def _hidden(first: int, m: int, begin: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """Build a mask [m, end - begin] bool: True where the query at first + row may not see the key at begin + column."""
    query = torch.arange(first, first + m, device=device).unsqueeze(1)
    key = torch.arange(begin, end, device=device)
    hidden = key > query
    return hidden if window is None else hidden | (key <= query - window)
