"""Quantised weights as the Triton kernels read them: how they lie on the device, and what they take there.

Codes of 4 bits lie two to a byte, wider ones take a byte each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraplex.kernels.quantized import Activations, GroupScales, QuantizedWeight, WeightFormat, dequantize


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


def _contiguous(numbers: GroupScales) -> GroupScales:
    codes = None if numbers.codes is None else numbers.codes.contiguous()
    return GroupScales(numbers.shared.contiguous(), codes, numbers.span)


def tensors(part: TritonQuantized) -> tuple[Tensor, ...]:
    """List what the kernels read; what a format lacks is stood for by its scale."""
    scale, offset = part.scale, part.offset or part.scale
    return (
        part.codes,
        scale.shared,
        scale.shared if scale.codes is None else scale.codes,
        offset.shared,
        offset.shared if offset.codes is None else offset.codes,
        scale.shared if part.codebook is None else part.codebook,
    )


def sizes(part: TritonQuantized) -> tuple[int, int]:
    """Count the inputs of a group, and the groups of an output."""
    return part.format.group or part.in_features, part.format.groups(part.in_features)
