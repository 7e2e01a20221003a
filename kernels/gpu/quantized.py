"""Base linears whose weights stay quantised on the device: codes are dequantised inside the product, tile by tile.

A weight is dequantised in fp32 and meets x as the sum of two numbers of the compute dtype, so that the product is that
of fp32 weights on every device, at twice the matrix work: a decode step waits for memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu import tuning
from loraplex.kernels.gpu.quantized_parts import TritonParts, TritonQuantized, sizes, tensors
from loraplex.kernels.quantized import Activations, round_activations


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
            *tensors(part),
            y,
            rows,
            0.0 if scale is None else scale,
            n_in,
            *sizes(part),
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
            *tensors(part),
            y,
            rows,
            x.shape[1],
            part.out_features,
            y.stride(0),
            *sizes(part),
            **_constants(part),
            split=x.dtype != torch.float32,
            block_rows=tile.rows,
            block=tile.columns,
            depth=tuning.QUANTIZED_DEPTH,
            num_warps=tile.warps,
        )


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
