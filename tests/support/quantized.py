"""Random weights of the formats that bases come in."""

from __future__ import annotations

import torch

from loraplex.kernels.quantized import GroupScales, QuantizedWeight, WeightFormat

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""bitsandbytes' codebook (its functional.py)."""


def _fp8() -> tuple[float, ...]:
    """e4m3's 256 values, two of them NaN."""
    return tuple(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist())


FORMATS = {
    "Q4_0": WeightFormat("Q4_0", bits=4, group=32, zero=8, scale_bits=16),
    "Q4_1": WeightFormat("Q4_1", bits=4, group=32, scale_bits=16, has_offset=True),
    "Q4_K": WeightFormat("Q4_K", bits=4, group=32, scale_bits=8, has_offset=True),
    "Q5_1": WeightFormat("Q5_1", bits=5, group=32, scale_bits=16, has_offset=True),
    "Q5_K": WeightFormat("Q5_K", bits=5, group=32, scale_bits=8, has_offset=True),
    "Q6_K": WeightFormat("Q6_K", bits=6, group=16, zero=32, scale_bits=8),
    "Q8_0": WeightFormat("Q8_0", bits=8, group=32, scale_bits=16),
    "int8": WeightFormat("int8", bits=8, group=None),
    "int4": WeightFormat("int4", bits=4, group=128, zero=8, scale_bits=16),
    "int4 with zeros": WeightFormat("int4 with zeros", bits=4, group=64, zero=8, has_offset=True),
    "int4 per column": WeightFormat("int4 per column", bits=4, group=None, zero=8),
    "nf4": WeightFormat("nf4", bits=4, group=64, codebook=NF4),
    "fp8": WeightFormat("fp8", bits=8, group=None, codebook=_fp8()),
    "fp8 in blocks": WeightFormat("fp8 in blocks", bits=8, group=128, codebook=_fp8()),
    "act order": WeightFormat("act order", bits=4, group=128, zero=8, scale_bits=16),
}
"""By name; of "act order" the inputs have another order."""


def random_weight(name: str, out: int, columns: int, seed: int = 0) -> QuantizedWeight:
    """Draw a weight [out, columns] of FORMATS[name] whose values are about the root of 1 over columns."""
    form = FORMATS[name]
    generator = torch.Generator().manual_seed(seed * 7919 + out * 31 + columns)
    signed = form.bits == 8 and form.codebook is None
    low, high = (-127, 128) if signed else (0, 2**form.bits)
    codes = torch.randint(low, high, (out, columns), generator=generator, dtype=torch.int8 if signed else torch.uint8)
    if form.name.startswith("fp8"):  # no checkpoint has NaN
        codes[codes % 128 == 127] = 0
    spread = 1.0 if form.codebook is not None else 2.0**form.bits / 4
    groups = columns // form.group if form.group is not None and columns % form.group == 0 else 1

    def numbers(size: float, signed: bool) -> GroupScales:
        size *= columns**-0.5
        if form.scale_bits == 8:
            span = 256 // (form.group or 256)
            shared = (torch.rand(out, groups // span, generator=generator) + 0.5) * size / 32
            kind = torch.int8 if signed else torch.uint8
            codes = torch.randint(-63 if signed else 0, 64, (out, groups), generator=generator).to(kind)
            return GroupScales(shared.half(), codes, span)
        values = (torch.rand(out, groups, generator=generator) + 0.5) * size
        return GroupScales(values.half() if form.scale_bits == 16 else values)

    scale = numbers(1 / spread, signed=form.bits == 6)
    offset = numbers(-2.0, signed=False) if form.has_offset else None
    order = torch.randperm(columns, generator=generator) if name == "act order" else None
    return QuantizedWeight(form, codes, scale, offset, order)
