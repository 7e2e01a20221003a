"""Attention over paged keys and values: decode rows and prefill chunks, each by its kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from loraplex.kernels.gpu.decode_attention import decode
from loraplex.kernels.gpu.prefill_attention import prefill
from loraplex.kernels.records import AttentionMeta, AttentionParams, KVLayer


def attention(
    q: Tensor, layer: KVLayer, meta: AttentionMeta, params: AttentionParams, is_decode: tuple[bool, ...]
) -> Tensor:
    """Backend.attention: q [T, num_heads, head_dim] -> [T, num_heads * head_dim]. is_decode: per sequence, its kernel.

    One launch per run of prefill chunks and two per run of decode rows; a step's order (see ForwardBatch) has at most
    two runs of each.
    """
    out = torch.empty(q.shape[0], params.num_heads * params.head_dim, dtype=q.dtype, device=q.device)
    for role, first, last in _runs(is_decode):
        (decode if role else prefill)(q, layer, meta, params, first, last, out)
    return out


def _runs(is_decode: tuple[bool, ...]) -> Iterator[tuple[bool, int, int]]:
    """(role, first sequence, past the last) of neighbours with the same role."""
    start = 0
    for role, members in itertools.groupby(is_decode):
        stop = start + len(list(members))
        yield role, start, stop
        start = stop
