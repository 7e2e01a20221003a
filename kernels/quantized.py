"""Records of quantised base weights: what every reader of a format yields and every backend packs. Plain torch.

A format is a few facts (WeightFormat) that choose a kernel and count bytes. A weight is codes and scales; a code takes
a byte while it is on its way from the file to the backend. `dequantize` is the meaning of both: the weight in fp32 as
the format's own library computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

A8_GROUP = 32
"""Inputs of a row that share a scale where activations are rounded to 8 bits and the format has groups of inputs."""


class Activations(StrEnum):
    """How exact the inputs of a quantised linear are."""

    EXACT = "exact"  # as they come, in the compute dtype
    A8 = "a8"  # rounded to 8 bits, see round_activations


@dataclass(frozen=True)
class WeightFormat:
    """What all weights of a format have in common.

    Semantics: value[n, k] = codebook[code[n, k]], or code[n, k] - zero where there is none; with g = k // group
               weight[n, k] = scale[n, g] * value[n, k] + offset[n, g], each product and sum rounded to fp32
    """

    name: str  # as its users call it: "Q4_K", "nf4", "gptq"
    bits: int  # of a code: 4, 5, 6 or 8
    group: int | None  # inputs that share a scale and an offset; None: all inputs of an output
    zero: int = 0
    codebook: tuple[float, ...] | None = None  # 2^bits fp32 values
    scale_bits: int = 32  # what a scale takes in memory: 16 (all are fp16), 32, or 8 beside a shared one (GroupScales)
    has_offset: bool = False  # takes as many bits as a scale
    activations: Activations | None = None  # what the weights were made for; None: either

    def groups(self, in_features: int) -> int:
        """Count the groups of a weight with `in_features` inputs. Raises ValueError where they do not divide."""
        group = self.group or in_features
        if in_features % group:
            raise ValueError(f"{self.name} has groups of {group}, which do not divide {in_features} inputs")
        return in_features // group


PartShape = tuple[int, int, WeightFormat | None]
"""[out, in] of a part of a packed linear, and its format; None: it is dense."""


@dataclass(frozen=True)
class GroupScales:
    """One number for each output and group of inputs, in one level or in two.

    Semantics: number[n, g] = shared[n, g // span] * codes[n, g] in fp32, or shared[n, g] where there are no codes.
    """

    shared: Tensor  # [out, groups / span] float16, bfloat16 or float32
    codes: Tensor | None = None  # [out, groups] int8 or uint8
    span: int = 1  # groups that share one number of `shared`

    def expanded(self) -> Tensor:
        """Compute the numbers [out, groups] in fp32."""
        shared = self.shared.float()
        return shared if self.codes is None else shared.repeat_interleave(self.span, 1) * self.codes.float()

    def rows(self, outputs: slice) -> GroupScales:
        """View the numbers of some outputs."""
        return GroupScales(self.shared[outputs], None if self.codes is None else self.codes[outputs], self.span)

    def to(self, device: torch.device) -> GroupScales:
        """Copy the numbers to `device`; those that are there are shared."""
        return GroupScales(self.shared.to(device), None if self.codes is None else self.codes.to(device), self.span)


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight [out, in] of a format."""

    format: WeightFormat
    codes: Tensor  # [out, in] uint8, or int8 where the format's zero is 0 and it has no codebook and 8 bits
    scale: GroupScales
    offset: GroupScales | None = None
    order: Tensor | None = (
        None  # [in] int64: column j of codes is of input order[j] (GPTQ's act_order); None: as they are
    )

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def rows(self, outputs: slice) -> QuantizedWeight:
        """View the weight of some outputs."""
        offset = None if self.offset is None else self.offset.rows(outputs)
        return QuantizedWeight(self.format, self.codes[outputs], self.scale.rows(outputs), offset, self.order)

    def to(self, device: torch.device) -> QuantizedWeight:
        """Copy the weight to `device`; what is there is shared."""
        offset = None if self.offset is None else self.offset.to(device)
        order = None if self.order is None else self.order.to(device)
        return QuantizedWeight(self.format, self.codes.to(device), self.scale.to(device), offset, order)


def join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Lay the outputs of weights of one input one behind the other; None where their formats or orders differ."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if any(weight.format != first.format or not _same(weight.order, first.order) for weight in weights):
        return None
    scale = _join_scales([weight.scale for weight in weights])
    offsets = [weight.offset for weight in weights if weight.offset is not None]
    offset = _join_scales(offsets) if offsets else None
    codes = [weight.codes for weight in weights]
    if scale is None or len(offsets) not in (0, len(weights)) or (offsets and offset is None) or not _alike(codes):
        return None
    return QuantizedWeight(first.format, torch.cat(codes), scale, offset, first.order)


def _join_scales(scales: Sequence[GroupScales]) -> GroupScales | None:
    codes = [each.codes for each in scales if each.codes is not None]
    spans = {each.span for each in scales}
    if len(codes) not in (0, len(scales)) or len(spans) > 1 or not _alike(codes):
        return None
    if not _alike([each.shared for each in scales]):
        return None
    return GroupScales(torch.cat([each.shared for each in scales]), torch.cat(codes) if codes else None, spans.pop())


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Tell whether the tensors [*, n] have one n and one dtype."""
    return len({(tensor.shape[1], tensor.dtype) for tensor in tensors}) < 2


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Compute the weight [out, in] in fp32, inputs in the model's order."""
    out, columns = weight.codes.shape
    form = weight.format
    if form.codebook is None:
        value = weight.codes.float() - form.zero
    else:
        value = torch.tensor(form.codebook, dtype=torch.float32, device=weight.codes.device)[weight.codes.int()]
    value = value.view(out, form.groups(columns), -1) * weight.scale.expanded()[:, :, None]
    if weight.offset is not None:
        value += weight.offset.expanded()[:, :, None]
    value = value.view(out, columns)
    if weight.order is None:
        return value
    return torch.empty_like(value).index_copy_(1, weight.order, value)


def round_activations(x: Tensor, group: int | None) -> Tensor:
    """Round x [T, in] to 8 bits with a scale for each A8_GROUP inputs, or for each row where `group` is None, in fp32.

    Semantics: per group of a row s = max |x| / 127, y = s * clamp(round(x / s), -127, 127), halves to even; s 0: y 0.
               Rows that are not of whole groups stay as they are.
    """
    if group is not None and x.shape[1] % A8_GROUP:
        return x.float()
    grouped = x.float().view(x.shape[0], -1, A8_GROUP if group is not None else x.shape[1])
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, grouped / scale, 0).round().clamp(-127, 127)
    return (codes * scale).view(x.shape)
