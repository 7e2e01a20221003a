"""Pack the base's weights into panels, in memory that is taken once, and count what they take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from loraplex.kernels.constants import ALIGN, OpCode
from loraplex.kernels.cpu.abi import Op
from loraplex.kernels.cpu.quantised import CpuQuantised, pack_quantised, quantised_bytes
from loraplex.kernels.cpu.team import Team
from loraplex.kernels.hugepages import HUGE_PAGE, huge_zeros
from loraplex.kernels.ops import PackedLinear
from loraplex.kernels.quantized import Activations, PartShape, QuantizedWeight, dequantize

REGION = 64 << 20
"""Bytes of huge pages taken at a time for weights; resident only as far as they are written."""


@dataclass(frozen=True)
class CpuLinear:
    """A weight in panels of 64 output columns (linear.h): the only copy of it in memory."""

    packed: Tensor  # [ceil(out / 16) * 16 * in] compute dtype
    in_features: int
    out_features: int

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def address(self) -> int:
        return self.packed.data_ptr()

    def panels(self, first: int, count: int) -> int:
        """Return the address of the weight of `count` outputs from `first` on, both of whole panels."""
        return self.address + first * self.in_features * self.packed.element_size()


@dataclass(frozen=True)
class CpuParts:
    """A weight of one input whose parts' outputs lie one behind the other, some of them quantised."""

    parts: tuple[CpuLinear | CpuQuantised, ...]
    dtype: torch.dtype  # the compute dtype

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)


class WeightPacker:
    """Pack weights one behind the other."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._region = torch.empty(0, dtype=torch.uint8)  # what the next weights are packed into

    def take(self, nbytes: int) -> Tensor:
        """Take zeros [nbytes] uint8 for a weight, behind the last: huge pages of its own cost 1 MiB on average."""
        nbytes = -(-nbytes // ALIGN) * ALIGN
        if nbytes > self._region.numel():
            self._region = huge_zeros(max(nbytes, REGION))
        taken, self._region = self._region[:nbytes], self._region[nbytes:]
        return taken

    def dense(self, weight: Tensor) -> CpuLinear:
        """Pack a weight [out, in] in its own dtype."""
        out, columns = weight.shape
        if columns % 2:
            raise ValueError(f"a weight of {columns} input features; the CPU backend packs them in pairs")
        packed = self.take(-(-out // 16) * 16 * columns * weight.element_size()).view(weight.dtype)
        op = Op(
            code=OpCode.PACK,
            x=weight.contiguous().data_ptr(),
            y=packed.data_ptr(),
            columns_in=columns,
            columns_out=out,
        )
        self._team.emit(op, weight.dtype)
        return CpuLinear(packed, columns, out)

    def parts(
        self, parts: Sequence[Tensor | QuantizedWeight], dtype: torch.dtype, activations: Activations
    ) -> PackedLinear:
        """Pack the parts of a weight of one input; neighbours without quantised kernels become one dense part."""
        packed: list[CpuLinear | CpuQuantised] = []
        for dense, run in groupby(parts, _is_packed_dense):
            if dense:
                whole = [part if isinstance(part, Tensor) else dequantize(part) for part in run]
                packed.append(self.dense(torch.cat([part.to(dtype) for part in whole])))
            else:
                packed += (
                    pack_quantised(part, activations, self._team, self.take)
                    for part in run
                    if isinstance(part, QuantizedWeight)
                )
        first = packed[0]
        return first if len(packed) == 1 and isinstance(first, CpuLinear) else CpuParts(tuple(packed), dtype)


def packed_bytes(linears: Iterable[Sequence[PartShape]], dtype: torch.dtype) -> int:
    """Count the bytes of the huge pages that the packed parts of so many linears touch."""
    total = used = room = 0
    for nbytes in (nbytes for parts in linears for nbytes in _taken(parts, dtype)):
        if nbytes > room:  # as take(): what is left of a region is never written
            total += -(-used // HUGE_PAGE) * HUGE_PAGE
            used, room = 0, max(nbytes, REGION)
        used, room = used + nbytes, room - nbytes
    return total + -(-used // HUGE_PAGE) * HUGE_PAGE


def _taken(parts: Sequence[PartShape], dtype: torch.dtype) -> Iterator[int]:
    """List the bytes that pack_parts takes for each of its packed parts."""
    for dense, run in groupby(parts, lambda part: quantised_bytes(part) is None):
        if dense:
            shapes = [(out, columns) for out, columns, _ in run]
            out = sum(out for out, _ in shapes)
            yield -(-(-(-out // 16) * 16 * shapes[0][1] * dtype.itemsize) // ALIGN) * ALIGN
        else:
            yield from (quantised_bytes(part) or 0 for part in run)


def _is_packed_dense(part: Tensor | QuantizedWeight) -> bool:
    return isinstance(part, Tensor) or quantised_bytes((*part.codes.shape, part.format)) is None
