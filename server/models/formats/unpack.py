"""Codes and scales out of the words they are packed in, as tensors of QuantizedWeight.

All of it is exact: values are moved, never computed, but for `offset_of`, whose product is exact for scales of 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loraplex.kernels.quantized import GroupScales
from loraplex.server.models.checkpoint import WeightsError

SIGN = 1 << 7
"""What separates a byte that counts from 0 from the same one as int8."""

SLICE = 1 << 20
"""Codes or weights that are worked on at once: what lies in memory beside a whole weight is a few bytes for each."""


def slices(rows: int, width: int, multiple: int = 1) -> Iterator[slice]:
    """Cut `rows` of `width` into slices of about SLICE, each but the last of a `multiple` of rows."""
    step = max(1, SLICE // (width * multiple)) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def unpack_codes(shape: tuple[int, int], order: Tensor | None, unpack: Callable[[slice], Tensor]) -> Tensor:
    """Fill codes [out, in] of `shape` in slices with what `unpack` makes of a slice of outputs, inputs in `order`.

    A slice begins at a multiple of 8 outputs, which is a word of AWQ.
    """
    codes: Tensor | None = None
    for rows in slices(*shape, multiple=8):
        part = unpack(rows)
        codes = torch.empty(shape, dtype=part.dtype) if codes is None else codes
        codes[rows] = part if order is None else part[:, order]
    assert codes is not None
    return codes


def low_first(words: Tensor, bits: int) -> Tensor:
    """Unpack `words` [rows, n] int32, the lowest bits first, into codes [rows, n * 32 / bits] uint8; bits: 4 or 8."""
    octets = words.contiguous().view(torch.uint8)  # little endian, as safetensors are
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), -1).view(words.shape[0], -1)


def high_first(octets: Tensor) -> Tensor:
    """Unpack `octets` [n] uint8, whose high half comes first, into codes [2 n] uint8."""
    return torch.stack((octets >> 4, octets & 15), -1).view(-1)


def signed(codes: Tensor) -> Tensor:
    """Turn codes uint8 that stand for themselves less 128 into int8."""
    return (codes ^ SIGN).view(torch.int8)


def offset_of(scale: Tensor, zero: Tensor) -> GroupScales:
    """Compute -scale * zero [out, groups] in fp32: scale * code + it is scale * (code - zero).

    Where a scale has 11 bits of mantissa, as fp16 has, the products and their difference are exact in fp32.
    """
    return GroupScales(-(scale.float() * zero.float()).contiguous())


def common_group(in_features: int, block: int) -> int:
    """Find the longest group that is never cut by the end of a row or of a block: blocks need not divide rows."""
    return math.gcd(in_features, block)


def order_of(g_idx: Tensor, group: int, what: str) -> Tensor | None:
    """Read `g_idx` [in], the group of each input, as the order [in] in which groups are contiguous; None: they are.

    Raises WeightsError naming `what` where not every group has `group` inputs.
    """
    in_features, groups = g_idx.numel(), g_idx.numel() // group
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise WeightsError(f"{what} names groups {low} to {high}, expected 0 to {groups - 1}")
    if torch.equal(g_idx.long(), torch.arange(in_features) // group):
        return None
    if (torch.bincount(g_idx, minlength=groups) != group).any():
        raise WeightsError(f"{what} has groups of other sizes than {group}, the group_size of the config")
    return torch.argsort(g_idx.long(), stable=True)


def spread_blocks(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Give each output and each common group of inputs its own of `scale` [out / block, in / block], rounded up.

    Returns [out, in / common_group(in, block)] in the scale's dtype.
    """
    out, in_features = shape
    group = common_group(in_features, block[1])
    columns = torch.arange(0, in_features, group) // block[1]
    return scale[torch.arange(out) // block[0]][:, columns]


def finite(tensor: Tensor, what: str) -> Tensor:
    """Return `tensor`. Raises WeightsError naming `what` where a value is NaN or infinite."""
    if not bool(torch.isfinite(tensor).all()):
        raise WeightsError(f"{what} holds NaN or infinity: the checkpoint is damaged, download it again")
    return tensor
