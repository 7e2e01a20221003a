"""Adapters for one site in an arena on huge pages: as many sets of them as a measurement needs to stay cold.

Set i is what the kernels call layer i, so that one program runs an op over every set in turn.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.kernels.constants import TILE_RANKS, OpCode, TileKind
from loraplex.kernels.cpu.abi import AdapterArgs, Op, Step
from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.cpu.op_records import fill_adapters
from loraplex.kernels.hugepages import huge_zeros
from loraplex.kernels.records import AdapterSegments, AdapterStep, TileTable
from loraplex.server.models.config import Site

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A site: its input and the outputs of its projections, side by side; each has an adapter of rank `rank`."""

    n_in: int
    n_out: tuple[int, ...]
    rank: int

    @property
    def elements(self) -> int:
        """Of one adapter."""
        return self.rank * sum(self.n_in + n for n in self.n_out)

    @property
    def width(self) -> int:
        return sum(self.n_out)

    def __str__(self) -> str:
        outs = "+".join(str(n) for n in self.n_out)
        return f"{self.n_in}->{self.rank}->{outs}"


@dataclass(frozen=True)
class World:
    """`adapters` distinct adapters in each of `sets` sets, at random places of the arena."""

    shape: Shape
    sets: int
    adapters: int
    arena: Tensor  # [sets * adapters, bytes of one] uint8
    place: Tensor  # [sets, adapters] int64: row of the arena
    table: TileTable

    def factors(self, one: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A [n, r, in] and B [n, r, out] per projection, of rows [n, elements] of the arena."""
        result, at, rank = [], 0, self.shape.rank
        for n_out in self.shape.n_out:
            a = one[:, at : at + rank * self.shape.n_in].unflatten(1, (rank, -1))
            at += rank * self.shape.n_in
            result.append((a, one[:, at : at + rank * n_out].unflatten(1, (rank, n_out))))
            at += rank * n_out
        return result


def make_world(shape: Shape, adapters: int, nbytes: int) -> World:
    """About `nbytes` of adapters, at most 256 sets."""
    size = shape.elements * 2
    sets = max(1, min(256, nbytes // (size * adapters)))
    arena = huge_zeros(sets * adapters * size)
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(DTYPE).view(torch.uint8)
    for start in range(0, arena.numel(), noise.numel()):
        arena[start : start + noise.numel()] = noise[: arena.numel() - start]
    place = torch.randperm(sets * adapters, generator=torch.Generator().manual_seed(1)).view(sets, adapters)
    ranges = torch.zeros(adapters, sets, len(Site), 2, dtype=torch.int32)
    rows: list[tuple[int, ...]] = []
    for layer in range(sets):
        for slot in range(adapters):
            first = len(rows)
            rows += _tiles(shape, int(place[layer, slot]) * size)
            ranges[slot, layer, Site.QKV] = torch.tensor([first, len(rows)])
    tiles = torch.tensor(rows, dtype=torch.int32)
    table = TileTable(ranges, tiles, ranges, tiles)
    return World(shape, sets, adapters, arena.view(-1, size), place, table)


def _tiles(shape: Shape, at: int) -> list[tuple[int, ...]]:
    """Rows of the table for an adapter at byte `at`: per projection A [r, in], B [r, out], cut every 16 ranks."""
    rows: list[tuple[int, ...]] = []
    start = 0
    for n_out in shape.n_out:
        for first in range(0, shape.rank, TILE_RANKS):
            a = at + first * shape.n_in * 2
            b = at + (shape.rank * shape.n_in + first * n_out) * 2
            rows.append(
                (a // 64, b // 64, min(TILE_RANKS, shape.rank - first), start, n_out, TileKind.LOW_RANK, 0, shape.n_in)
            )
        at += shape.rank * (shape.n_in + n_out) * 2
        start += n_out
    return rows


@dataclass(frozen=True)
class AdapterProgram:
    """adapter_add_ over every set of a world, by one call."""

    ops: CpuBackend
    program: ctypes.Array[Op]
    step: Step
    keep: tuple[object, ...]  # memory that step and program point to

    def run(self) -> None:
        self.ops.team.run(self.program, self.step, DTYPE)


def adapter_program(world: World, x: Tensor, y: Tensor, counts: Sequence[int], decode: bool) -> AdapterProgram:
    """counts[i] rows of x [T, in] and y [T, width] wear adapter i; as decode rows or as prefill chunks."""
    ops = CpuBackend()
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    segments = AdapterSegments(
        indptr=torch.tensor(bounds, dtype=torch.int32),
        mix_ptr=torch.arange(len(bounds), dtype=torch.int32),
        mix_slot=torch.arange(len(counts), dtype=torch.int32),
        mix_weight=torch.ones(len(counts)),
        bounds=tuple(bounds),
        mixes=tuple(((slot, 1.0),) for slot in range(len(counts))),
        num_decode_segments=len(counts) if decode else 0,
    )
    step = Step()
    fill_adapters(step, AdapterStep(world.arena, world.table, segments))
    program = (Op * world.sets)(
        *(
            Op(
                code=OpCode.ADAPTER,
                rows=x.shape[0],
                x=x.data_ptr(),
                y=y.data_ptr(),
                columns_in=x.shape[1],
                columns_out=y.shape[1],
                adapter=AdapterArgs(layer, Site.QKV),
            )
            for layer in range(world.sets)
        )
    )
    return AdapterProgram(ops, program, step, (segments, world, x, y))
