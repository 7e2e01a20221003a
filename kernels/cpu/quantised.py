"""Pack quantised weights for the kernels of quantised.h, and count what they take."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd

import torch
from torch import Tensor

from loraplex.kernels.constants import PANEL, NumberKind, OpCode
from loraplex.kernels.cpu.abi import Op, Quantised, QuantisedSource
from loraplex.kernels.cpu.team import Team
from loraplex.kernels.quantized import A8_GROUP, Activations, GroupScales, PartShape, QuantizedWeight, WeightFormat

BLOCK_UNITS = 8
"""Units of a block, most, unless a scale or a shared number is for more."""

SHARED_INPUTS = 256
"""Inputs that share a number where scales are in two levels, as in all of GGUF's formats."""


@dataclass(frozen=True)
class CpuQuantised:
    """A quantised weight in panels of 64 output columns (quantised.h): the only copy of it in memory."""

    record: Quantised
    packed: Tensor  # [panels * panel_bytes] uint8
    kept: tuple[Tensor, ...]  # what the record points to beside `packed`
    windows: dict[tuple[int, int], Quantised] = field(default_factory=dict)  # records of parts of its outputs

    @property
    def address(self) -> int:
        return ctypes.addressof(self.record)

    def panels(self, first: int, count: int) -> int:
        """Return the address of a record of `count` outputs from `first` on, both of whole panels."""
        if count == self.out_features:
            return self.address
        record = self.windows.get((first, count))
        if record is None:
            record = self.windows[first, count] = Quantised.from_buffer_copy(self.record)
            record.data += first // PANEL * record.panel_bytes
            record.columns_out = count
        return ctypes.addressof(record)

    @property
    def in_features(self) -> int:
        return int(self.record.columns_in)

    @property
    def out_features(self) -> int:
        return int(self.record.columns_out)


@dataclass(frozen=True)
class PanelLayout:
    """How a format's weight lies in panels: the fields of abi.Quantised that count."""

    bits: int
    unit: int
    units: int
    block_units: int
    group_units: int
    span: int
    block_bytes: int

    @property
    def panel_bytes(self) -> int:
        return self.units // self.block_units * self.block_bytes


def layout(form: WeightFormat, in_features: int) -> PanelLayout | None:
    """Lay out a panel of a weight with so many inputs; None where the kernels cannot keep its codes.

    They cannot where a group is not of whole 8 inputs, or where two levels do not share SHARED_INPUTS.
    """
    if form.group is None:
        unit, units = A8_GROUP, -(-in_features // A8_GROUP)
        group_units = units
    else:
        unit = gcd(form.group, A8_GROUP)
        units, group_units = in_features // unit, form.group // unit
        if unit < 8 or in_features % form.group:
            return None
    two = form.scale_bits == 8
    span = SHARED_INPUTS // form.group if two and form.group is not None else 1
    least = group_units * span
    if units % least or (two and span * (form.group or 0) != SHARED_INPUTS):
        return None
    block = max((n for n in range(least, BLOCK_UNITS + 1, least) if units % n == 0), default=least)
    bits = 4 if form.bits == 4 else 8
    numbers = 1 + form.has_offset
    groups = block // group_units
    number_bits = form.scale_bits * groups + (16 * (groups // span) if two else 0)
    return PanelLayout(
        bits, unit, units, block, group_units, span, PANEL * (numbers * number_bits + block * unit * bits) // 8
    )


def quantised_bytes(shape: PartShape) -> int | None:
    """Count the bytes of a packed part; None where it is packed dense."""
    out, columns, form = shape
    found = None if form is None else layout(form, columns)
    return None if found is None else -(-out // PANEL) * found.panel_bytes


def pack_quantised(
    weight: QuantizedWeight, activations: Activations, team: Team, take: Callable[[int], Tensor]
) -> CpuQuantised:
    """Pack a weight whose format has a layout. take: gives so many zero bytes, uint8.

    Raises ValueError where its scales are not what its format says.
    """
    form, (out, columns) = weight.format, weight.codes.shape
    found = layout(form, columns)
    assert found is not None, f"{form.name} of {columns} inputs is packed dense"
    packed = take(-(-out // PANEL) * found.panel_bytes)
    e4m3 = form.codebook is not None and _is_e4m3(form.codebook)
    codebook = None if form.codebook is None or e4m3 else torch.tensor(form.codebook, dtype=torch.float32)
    order = None if weight.order is None else weight.order.to(torch.int32)
    record = Quantised(
        codebook=_pointer(codebook),
        order=_pointer(order),
        columns_in=columns,
        columns_out=out,
        panel_bytes=found.panel_bytes,
        block_bytes=found.block_bytes,
        bits=found.bits,
        zero=form.zero,
        e4m3=e4m3,
        unit=found.unit,
        units=found.units,
        block_units=found.block_units,
        group_units=found.group_units,
        span=found.span,
        rounded=_rounded(form, columns, activations),
    )
    codes = weight.codes.contiguous()
    if codes.dtype == torch.int8:  # kernels multiply unsigned codes
        codes, record.zero = codes.view(torch.uint8) ^ 0x80, 128
    record.scale, scale, shared_scale = _stored(weight.scale, form)
    record.shared = NumberKind.NONE if shared_scale is None else NumberKind.FP16
    offset, shared_offset = None, None
    if weight.offset is not None:
        record.offset, offset, shared_offset = _stored(weight.offset, form)
    source = QuantisedSource(*map(_pointer, (codes, scale, shared_scale, offset, shared_offset)))
    op = Op(code=OpCode.PACK_QUANTISED, x=ctypes.addressof(source), w=ctypes.addressof(record), y=packed.data_ptr())
    team.emit(op, torch.float32)
    record.data = packed.data_ptr()
    return CpuQuantised(record, packed, tuple(kept for kept in (codebook, order) if kept is not None))


def _is_e4m3(codebook: tuple[float, ...]) -> bool:
    """Tell whether these are the values of float8_e4m3fn, its two NaN included."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return len(codebook) == 256 and torch.allclose(torch.tensor(codebook), values, rtol=0, atol=0, equal_nan=True)


def _rounded(form: WeightFormat, columns: int, activations: Activations) -> int:
    """Tell how inputs are rounded, as round_activations does: 0 not at all, 1 in groups, 2 in rows."""
    if activations is Activations.EXACT or (form.group is not None and columns % A8_GROUP):
        return 0
    return 1 if form.group is not None else 2


def _stored(numbers: GroupScales, form: WeightFormat) -> tuple[NumberKind, Tensor, Tensor | None]:
    """Find how numbers are stored: the kind and the numbers of groups, and what they share, fp16, if anything."""
    if form.scale_bits != 8:
        kind, dtype = (NumberKind.FP16, torch.float16) if form.scale_bits == 16 else (NumberKind.FP32, torch.float32)
        return kind, numbers.expanded().to(dtype).contiguous(), None
    if (
        numbers.codes is None
        or numbers.shared.dtype != torch.float16
        or numbers.span * (form.group or 0) != SHARED_INPUTS
    ):
        raise ValueError(
            f"{form.name} has scales of 8 bits: expected codes, and an fp16 number for every {SHARED_INPUTS} inputs"
        )
    kind = NumberKind.INT8 if numbers.codes.dtype == torch.int8 else NumberKind.UINT8
    return kind, numbers.codes.contiguous(), numbers.shared.contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
