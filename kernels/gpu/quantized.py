"""Base linears whose weights stay quantised on the device: codes are dequantised inside the product, tile by tile.

A weight is dequantised in fp32 and meets x as the sum of two numbers of the compute dtype, so that the product is that
of fp32 weights on every device, at twice the matrix work: a decode step waits for memory. Codes of 4 bits lie two to a
byte, wider ones take a byte each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu import tuning
from loraplex.kernels.quantized import (
    Activations,
    GroupScales,
    QuantizedWeight,
    WeightFormat,
    dequantize,
    round_activations,
)


@dataclass(frozen=True)
class TritonQuantized:
    """A quantised weight as the kernels read it."""

    format: WeightFormat
    in_features: int
    codes: Tensor  # [out, ceil(in / 2)] uint8, the first of two in the low bits; or [out, in] uint8 or int8
    scale: GroupScales
    offset: GroupScales | None
    codebook: Tensor | None  # [2^bits] fp32
    order: Tensor | None  # [in] int64

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]


@dataclass(frozen=True)
class TritonParts:
    """The parts of a fused weight of which some are quantised."""

    parts: tuple[Tensor | TritonQuantized, ...]
    dtype: torch.dtype  # the compute dtype
    activations: Activations

    @property
    def in_features(self) -> int:
        return self.parts[0].shape[1] if isinstance(self.parts[0], Tensor) else self.parts[0].in_features

    @property
    def out_features(self) -> int:
        return sum(part.shape[0] if isinstance(part, Tensor) else part.out_features for part in self.parts)


def keeps_codes(form: WeightFormat) -> bool:
    """Tell whether the kernels take this format: its groups are powers of two from 16 on, or of whole outputs."""
    return form.group is None or (form.group >= 16 and form.group & (form.group - 1) == 0)


def pack(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor | TritonQuantized:
    """Lay out a weight for the kernels; where they do not take its format, as the weights it stands for, in `dtype`."""
    form, codes = weight.format, weight.codes
    if not keeps_codes(form):
        return dequantize(weight).to(dtype)
    if form.bits == 4:
        if codes.shape[1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    codebook = None
    if form.codebook is not None:
        codebook = torch.tensor(form.codebook, dtype=torch.float32, device=codes.device)
    return TritonQuantized(
        form,
        weight.in_features,
        codes.contiguous(),
        _contiguous(weight.scale),
        None if weight.offset is None else _contiguous(weight.offset),
        codebook,
        weight.order,
    )


def packed_bytes(out: int, columns: int, form: WeightFormat | None, dtype: torch.dtype) -> int:
    """Count the bytes of a packed weight [out, columns], dense ones in `dtype`."""
    if form is None or not keeps_codes(form):
        return out * columns * dtype.itemsize
    groups = form.groups(columns)
    numbers = groups * (1 + form.has_offset) * form.scale_bits // 8
    shared = groups // 8 * 4 * (1 + form.has_offset) if form.scale_bits == 8 else 0  # 8 groups or more share a number
    codebook = 4 << form.bits if form.codebook is not None else 0
    order = columns * 8
    return out * (-(-columns * (4 if form.bits == 4 else 8) // 8) + numbers + shared) + codebook + order


def linear(x: Tensor, weight: TritonParts, dtype: torch.dtype, few: bool) -> Tensor:
    """x [T, in] -> [T, out] in `dtype`, accumulated in fp32.

    few: take the tile for few rows, whose sums may be in another order.
    """
    y = torch.empty(x.shape[0], weight.out_features, dtype=dtype, device=x.device)
    start = 0
    for part in weight.parts:
        if isinstance(part, Tensor):
            stop = start + part.shape[0]
            y[:, start:stop] = torch.nn.functional.linear(x, part)
        else:
            stop = start + part.out_features
            _multiply(_inputs(x, part, weight.activations), part, y[:, start:stop], few)
        start = stop
    return y


def outputs_of(weight: TritonParts, outputs: slice) -> TritonParts:
    """View the weight of some outputs."""
    parts: list[Tensor | TritonQuantized] = []
    start = 0
    for part in weight.parts:
        count = part.shape[0] if isinstance(part, Tensor) else part.out_features
        mine = slice(max(0, outputs.start - start), min(count, outputs.stop - start))
        start += count
        if mine.start >= mine.stop:
            continue
        if isinstance(part, Tensor):
            parts.append(part[mine])
        else:
            offset = None if part.offset is None else part.offset.rows(mine)
            parts.append(replace(part, codes=part.codes[mine], scale=part.scale.rows(mine), offset=offset))
    return replace(weight, parts=tuple(parts))


def embed(ids: Tensor, table: TritonParts, scale: float | None) -> Tensor:
    """ids [T] int64 -> rows [T, in] of the table, rounded to the compute dtype; `scale` is already rounded to it."""
    part = table.parts[0]
    assert isinstance(part, TritonQuantized), "a table that is not quantised is packed by pack_linear"
    assert part.out_features == table.out_features, "a table has one part"
    rows, n_in = ids.shape[0], part.in_features
    y = torch.empty(rows, n_in, dtype=table.dtype, device=ids.device)
    if y.numel():
        _rows[(triton.cdiv(rows, tuning.QUANTIZED_IDS), triton.cdiv(n_in, tuning.QUANTIZED_DEPTH))](
            ids,
            *_tensors(part),
            y,
            rows,
            0.0 if scale is None else scale,
            n_in,
            *_sizes(part),
            **_constants(part),
            has_scale=scale is not None,
            block=tuning.QUANTIZED_IDS,
            depth=tuning.QUANTIZED_DEPTH,
            enable_fp_fusion=False,  # products are rounded before an offset is added, as the reference has it
        )
    return y if part.order is None else torch.empty_like(y).index_copy_(1, part.order, y)


def _inputs(x: Tensor, part: TritonQuantized, activations: Activations) -> Tensor:
    """x in the order of the part's codes; rounded to 8 bits it is fp32."""
    if part.order is not None:
        x = x[:, part.order]
    return x if activations is Activations.EXACT else round_activations(x, part.format.group)


def _multiply(x: Tensor, part: TritonQuantized, y: Tensor, few: bool) -> None:
    """x [T, in] times the part's weights into y [T, out], whose rows may lie further apart."""
    rows = x.shape[0]
    tile = tuning.QUANTIZED_FEW if few else tuning.QUANTIZED_MANY
    if y.numel():
        _tile[(triton.cdiv(rows, tile.rows), triton.cdiv(part.out_features, tile.columns))](
            x,
            *_tensors(part),
            y,
            rows,
            x.shape[1],
            part.out_features,
            y.stride(0),
            *_sizes(part),
            **_constants(part),
            split=x.dtype != torch.float32,
            block_rows=tile.rows,
            block=tile.columns,
            depth=tuning.QUANTIZED_DEPTH,
            num_warps=tile.warps,
        )


def _contiguous(numbers: GroupScales) -> GroupScales:
    codes = None if numbers.codes is None else numbers.codes.contiguous()
    return GroupScales(numbers.shared.contiguous(), codes, numbers.span)


def _tensors(part: TritonQuantized) -> tuple[Tensor, ...]:
    """What _weights reads; what a format lacks is stood for by its scale."""
    scale, offset = part.scale, part.offset or part.scale
    return (
        part.codes,
        scale.shared,
        scale.shared if scale.codes is None else scale.codes,
        offset.shared,
        offset.shared if offset.codes is None else offset.codes,
        scale.shared if part.codebook is None else part.codebook,
    )


def _sizes(part: TritonQuantized) -> tuple[int, int]:
    """Inputs of a group, and groups of an output."""
    return part.format.group or part.in_features, part.format.groups(part.in_features)


def _constants(part: TritonQuantized) -> dict[str, object]:
    form = part.format
    return {
        "nibbles": form.bits == 4,
        "zero": form.zero,
        "has_codebook": part.codebook is not None,
        "two_levels": part.scale.codes is not None,
        "span": part.scale.span,
        "has_offset": part.offset is not None,
        "each": min(form.group or tuning.QUANTIZED_DEPTH, tuning.QUANTIZED_DEPTH),
    }


@triton.jit
def _numbers(shared, codes, outputs, inside, group, groups, two_levels: tl.constexpr, span: tl.constexpr):
    """Semantics: number[n, g] of outputs [n] and groups `group` [g] as kernels/quantized.py has it, in fp32."""
    at = outputs[:, None] * (groups // span) + (group // span)[None, :]
    number = tl.load(shared + at, mask=inside, other=0.0).to(tl.float32)
    if two_levels:
        number *= tl.load(codes + outputs[:, None] * groups + group[None, :], mask=inside, other=0).to(tl.float32)
    return number


@triton.jit
def _weights(
    codes,
    scale,
    scale_codes,
    offset,
    offset_codes,
    codebook,
    outputs,
    known,
    start,
    n_in,
    group,
    groups,
    nibbles: tl.constexpr,
    zero: tl.constexpr,
    has_codebook: tl.constexpr,
    two_levels: tl.constexpr,
    span: tl.constexpr,
    has_offset: tl.constexpr,
    each: tl.constexpr,
    block: tl.constexpr,
    depth: tl.constexpr,
):
    """Dequantise inputs [start, start + depth) of `outputs` [block]; `known` masks them.

    Semantics: as dequantize of kernels/quantized.py, in fp32 [block, depth]; what is not there is finite.
    """
    if nibbles:
        k = start // 2 + tl.arange(0, depth // 2)
        row = (n_in + 1) // 2
        pairs = tl.load(codes + outputs[:, None] * row + k[None, :], mask=known[:, None] & (k < row)[None, :], other=0)
        code = tl.interleave(pairs & 15, pairs >> 4).to(tl.int32)
    else:
        k = start + tl.arange(0, depth)
        code = tl.load(codes + outputs[:, None] * n_in + k[None, :], mask=known[:, None] & (k < n_in)[None, :], other=0)
        code = code.to(tl.int32)
    value = tl.load(codebook + code) if has_codebook else (code - zero).to(tl.float32)
    g = start // group + tl.arange(0, depth // each)
    inside = known[:, None] & (g < groups)[None, :]
    value = tl.reshape(value, (block, depth // each, each))
    value *= _numbers(scale, scale_codes, outputs, inside, g, groups, two_levels, span)[:, :, None]
    if has_offset:
        value += _numbers(offset, offset_codes, outputs, inside, g, groups, two_levels, span)[:, :, None]
    return tl.reshape(value, (block, depth))


@triton.jit(do_not_specialize=["num_rows"])
def _tile(
    x,
    codes,
    scale,
    scale_codes,
    offset,
    offset_codes,
    codebook,
    y,
    num_rows,
    n_in,
    n_out,
    ldy,
    group,
    groups,
    nibbles: tl.constexpr,
    zero: tl.constexpr,
    has_codebook: tl.constexpr,
    two_levels: tl.constexpr,
    span: tl.constexpr,
    has_offset: tl.constexpr,
    each: tl.constexpr,
    split: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
    depth: tl.constexpr,
):
    """Grid (tile of rows, tile of columns). Semantics: y = round(x @ W.T), summed in fp32 `depth` inputs at a time."""
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    of_rows = (rows < num_rows)[:, None]
    of_columns = columns < n_out
    x_rows = x + rows.to(tl.int64)[:, None] * n_in
    outputs = columns.to(tl.int64)
    total = tl.zeros((block_rows, block), dtype=tl.float32)
    for start in range(0, n_in, depth):
        k = start + tl.arange(0, depth)
        xs = tl.load(x_rows + k[None, :], mask=of_rows & (k < n_in)[None, :], other=0.0)
        weights = _weights(
            codes,
            scale,
            scale_codes,
            offset,
            offset_codes,
            codebook,
            outputs,
            of_columns,
            start,
            n_in,
            group,
            groups,
            nibbles,
            zero,
            has_codebook,
            two_levels,
            span,
            has_offset,
            each,
            block,
            depth,
        )
        high = weights.to(x.dtype.element_ty)
        total = tl.dot(xs, tl.trans(high), total, input_precision="ieee")
        if split:
            low = (weights - high.to(tl.float32)).to(x.dtype.element_ty)
            total = tl.dot(xs, tl.trans(low), total, input_precision="ieee")
    at = y + rows.to(tl.int64)[:, None] * ldy + columns[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=of_rows & of_columns[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _rows(
    ids,
    codes,
    scale,
    scale_codes,
    offset,
    offset_codes,
    codebook,
    y,
    num_rows,
    factor,
    n_in,
    group,
    groups,
    nibbles: tl.constexpr,
    zero: tl.constexpr,
    has_codebook: tl.constexpr,
    two_levels: tl.constexpr,
    span: tl.constexpr,
    has_offset: tl.constexpr,
    each: tl.constexpr,
    has_scale: tl.constexpr,
    block: tl.constexpr,
    depth: tl.constexpr,
):
    """Grid (block of ids, block of columns). Semantics: y[i] = round(round(W[ids[i]]) * factor)."""
    rows = tl.program_id(0) * block + tl.arange(0, block)
    known = rows < num_rows
    start = tl.program_id(1) * depth
    weights = _weights(
        codes,
        scale,
        scale_codes,
        offset,
        offset_codes,
        codebook,
        tl.load(ids + rows, mask=known, other=0),
        known,
        start,
        n_in,
        group,
        groups,
        nibbles,
        zero,
        has_codebook,
        two_levels,
        span,
        has_offset,
        each,
        block,
        depth,
    )
    values = weights.to(y.dtype.element_ty)
    if has_scale:
        values = (values.to(tl.float32) * factor).to(y.dtype.element_ty)
    k = start + tl.arange(0, depth)
    at = y + rows.to(tl.int64)[:, None] * n_in + k[None, :]
    tl.store(at, values, mask=known[:, None] & (k < n_in)[None, :])
