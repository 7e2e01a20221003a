"""Weights quantised at load: int8 in groups, int4 in groups with a minimum, and NF4 as QLoRA has it.

Each function takes a dense weight [out, in] of any float type and works in fp32 on slices of it, so that what lies in
memory beside the codes is bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex.kernels.quantized import GroupScales, QuantizedWeight, WeightFormat
from loraplex.server.models.formats.unpack import common_group, slices

INT8 = WeightFormat("int8", bits=8, group=32, scale_bits=16)
INT4 = WeightFormat("int4", bits=4, group=32, scale_bits=16, has_offset=True)

NF4_BLOCK, NESTED_BLOCK = 64, 256
CELLS = 64
"""Cells that -1 to 1 is cut into to find codes of NF4: none has two of the 15 bounds between its values. Searching
among the bounds took six times as long, 21 s of a core for a thousand million weights."""

PLACES = 1 << 16
"""Places of the table in which bitsandbytes looks up 8-bit codes on the CPU. Its GPU kernels have no table: of 1,000
scales two are one code apart."""

NF4: tuple[float, ...] = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of NormalFloat (Dettmers et al. 2023, appendix E): quantiles of the normal distribution."""


def nf4_format(in_features: int) -> WeightFormat:
    """Say which format `quantize_nf4` makes of a weight with `in_features` inputs."""
    return WeightFormat("nf4", bits=4, group=common_group(in_features, NF4_BLOCK), codebook=NF4)


def quantize_int8(weight: Tensor) -> QuantizedWeight:
    """Round `weight` to 8 bits in groups of 32 inputs with a scale in fp16, as ggml's Q8_0.

    One scale for all inputs of an output would take 6 % less, and on the demo base diverge from it three times as far
    (0.0050 nats for 0.0018, see docs/quantised.md).

    Semantics: d = max |w| / 127 of a group, code = round(w * (1 / d)), halves away from zero; d is kept in fp16.
    Raises ValueError where 32 does not divide the inputs, or a scale is not finite in fp16.
    """
    out, in_features = weight.shape
    groups = INT8.groups(in_features)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(out, groups, dtype=torch.float16)
    for rows in slices(out, in_features):
        w = weight[rows].float().view(-1, groups, 32)
        d = w.abs().amax(-1, keepdim=True) / 127
        scaled = w * (1 / d).where(d != 0, 0)
        codes[rows] = (scaled.abs() + 0.5).floor_().copysign_(scaled).to(torch.int8).view(-1, in_features)
        scale[rows] = d.squeeze(-1)
    return QuantizedWeight(INT8, codes, GroupScales(_finite(scale)))


def quantize_int4(weight: Tensor) -> QuantizedWeight:
    """Round `weight` to 4 bits in groups of 32 inputs with a scale and a minimum in fp16, as ggml's Q4_1.

    Semantics: d = (max - min) / 15, code = floor((w - min) * (1 / d) + 0.5); d and min are kept in fp16.
    Raises ValueError where 32 does not divide the inputs, or a scale is not finite in fp16.
    """
    out, in_features = weight.shape
    groups = INT4.groups(in_features)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scale = torch.empty(out, groups, dtype=torch.float16)
    least = torch.empty(out, groups, dtype=torch.float16)
    for rows in slices(out, in_features):
        w = weight[rows].float().view(-1, groups, 32)
        low = w.amin(-1, keepdim=True)
        d = (w.amax(-1, keepdim=True) - low) / 15
        inverse = (1 / d).where(d != 0, 0)
        codes[rows] = ((w - low) * inverse + 0.5).clamp_(0, 15).to(torch.uint8).view(-1, in_features)
        scale[rows], least[rows] = d.squeeze(-1), low.squeeze(-1)
    return QuantizedWeight(INT4, codes, GroupScales(_finite(scale)), GroupScales(_finite(least)))


def quantize_nf4(weight: Tensor) -> QuantizedWeight:
    """Round `weight` to NF4 in blocks of 64 with double quantisation, to the bit what bitsandbytes makes of it.

    Semantics (bitsandbytes.functional.quantize_4bit with compress_statistics): the scale of a block is its largest
    |w|, and its codes the values next to w / scale. Scales less their mean are rounded to 8 bits of dynamic_values, in
    blocks of 256, and kept as what that stands for. Blocks run over the flattened weight.
    Raises ValueError where the inputs have no factor of 64 but 1, 2 or 4, or a value is NaN or infinite.
    """
    form = nf4_format(weight.shape[1])
    flat = weight.reshape(-1)
    codes = torch.empty(flat.numel(), dtype=torch.uint8)
    absmax = torch.empty(-(-flat.numel() // NF4_BLOCK))
    for blocks in slices(absmax.numel(), NF4_BLOCK):
        part = slice(blocks.start * NF4_BLOCK, blocks.stop * NF4_BLOCK)
        w = _blocks(flat[part].float(), NF4_BLOCK)
        absmax[blocks] = w.abs().amax(1)
        nearest = nf4_codes(_scaled(w, absmax[blocks]))
        codes[part] = nearest.view(-1)[: codes[part].numel()]
    scale = _doubly(_finite(absmax))
    if weight.shape[1] % NF4_BLOCK:
        assert form.group is not None
        scale = scale[torch.arange(0, flat.numel(), form.group) // NF4_BLOCK]
    return QuantizedWeight(form, codes.view(weight.shape), GroupScales(scale.view(weight.shape[0], -1)))


def nf4_codes(x: Tensor) -> Tensor:
    """Find for each x, -1 to 1, the next value of NF4, the lower one halfway: codes uint8."""
    bounds = _halfway(torch.tensor(NF4))
    first = torch.bucketize(torch.arange(CELLS + 1) / CELLS * 2 - 1, bounds).to(torch.uint8)  # where the cell begins
    bound = torch.full((CELLS + 1,), 2.0)
    bound[((bounds + 1) * (CELLS / 2)).int()] = bounds
    cell = ((x + 1) * (CELLS / 2)).int().clamp_(0, CELLS).view(-1)
    return (first.index_select(0, cell) + (x.view(-1) > bound.index_select(0, cell))).view(x.shape)


def dynamic_values() -> Tensor:
    """List the 256 values of bitsandbytes' dynamic 8-bit type in rising order (arXiv 1511.04561): [256] fp32.

    Powers of ten from -6 to 0; the larger the power, the more values: 2^i of the size 10^(i - 6), midway between
    points that divide 0.1 to 1, and their negatives; beside them 0 and 1.
    """
    found = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        points = torch.linspace(0.1, 1, 2**i + 1)
        size = 10.0 ** (i - 6) * ((points[:-1] + points[1:]) / 2)
        found += [size, -size]
    return torch.cat(found).sort().values


def _doubly(absmax: Tensor) -> Tensor:
    """Quantise the scales [blocks] of a weight and compute what they are then, in fp32."""
    mean = absmax.mean()
    rest = _blocks(absmax - mean, NESTED_BLOCK)
    largest = rest.abs().amax(1)
    values = dynamic_values()
    places = (((_scaled(rest, largest) + 1) * 0.5) * (PLACES - 1) + 0.5).int()
    codes = _nearest(places.float() / (PLACES - 1) * 2 - 1, values)
    return (values[codes.int()] * largest[:, None]).view(-1)[: absmax.numel()] + mean


def _scaled(w: Tensor, largest: Tensor) -> Tensor:
    """Divide each w [blocks, n] by the `largest` [blocks] of its block."""
    return (w * (1 / largest.clamp(min=1e-38))[:, None]).clamp_(-1, 1)


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """Find for each x the next of the rising `values`, the lower one halfway: codes uint8."""
    return torch.bucketize(x, _halfway(values), out_int32=True).to(torch.uint8)


def _halfway(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


def _blocks(flat: Tensor, size: int) -> Tensor:
    """View `flat` [n] in rows of `size`, the last filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def _finite(scale: Tensor) -> Tensor:
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("a scale of the quantised weight is NaN or infinite, expected finite weights below 65,504")
    return scale
