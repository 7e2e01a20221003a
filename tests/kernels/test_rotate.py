"""adapter_linear: inputs that adapters turn, against fp64, in an arena that is NaN elsewhere."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from loraplex.kernels.constants import ALIGN, Own, TileKind
from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.ops import Backend
from loraplex.kernels.quantized import Activations, dequantize
from loraplex.kernels.records import AdapterSegments, AdapterStep, OwnInput, OwnPlaces, OwnTable, TileTable
from tests.support.quantized import random_weight
from tests.support.rounding import Exact, assert_near, exact, rounded

PLACES = OwnPlaces(2)
ENDS = {1: 80, 2: 120, 4: 144}  # outputs of three projections by the index of their inputs; none begins a panel of 64
INPUTS = tuple(
    OwnInput(PLACES.input(1, index), start, stop)
    for (index, stop), start in zip(ENDS.items(), (0, *ENDS.values()), strict=False)
)
WIDTH = 96
MIXES: tuple[tuple[tuple[int, float], ...], ...] = (
    ((0, 1.0),),
    ((1, 1.0),),
    (),
    ((0, 0.5), (2, -0.75)),
    ((2, 1.0),),
    ((0, 1.0),),
)
COUNTS = (1, 1, 2, 3, 1, 9)  # two decode rows; the last two tokens wear nothing
BLOCKS = {  # (slot, index of the input): (size, whether all inputs share a block, rows of the tiles it is cut into)
    (0, 1): (32, False, (96,)),
    (0, 2): (4, False, (24, 72)),
    (2, 1): (96, False, (40, 56)),
    (2, 4): (48, True, (20, 28)),
    (2, 2): (6, True, (6,)),
}


class _World:
    """Slot 0 turns the inputs of two projections, slot 2 those of three; slot 1 turns none."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(5)
        self.matrices: dict[tuple[int, int], Exact] = {}
        strips = [torch.full((ALIGN,), 0xFF, dtype=torch.uint8)]
        tiles = [[2**31 - 1] * 8]  # nobody's: reading it would crash
        ranges = torch.zeros(3, PLACES.count, 2, dtype=torch.int32)
        for (slot, index), (size, shared, cuts) in BLOCKS.items():
            rows = torch.randn(size if shared else WIDTH, size, generator=generator).mul(size**-0.5).to(dtype)
            whole = exact(rows.repeat(WIDTH // size, 1) if shared else rows)
            matrix = np.zeros((WIDTH, WIDTH))
            for row in range(WIDTH):
                start = row // size * size
                matrix[row, start : start + size] = whole[row]
            self.matrices[slot, index] = matrix
            first = len(tiles)
            for start, piece in zip((0, *accumulate(cuts)), rows.split(list(cuts)), strict=False):
                at = sum(strip.numel() for strip in strips) // ALIGN
                tiles.append([at, -1, len(piece), start, WIDTH // size if shared else 1, TileKind.TURN, 0, size])
                flat = piece.contiguous().view(torch.uint8).flatten()
                strips += [flat, torch.full((-flat.numel() % ALIGN + ALIGN,), 0xFF, dtype=torch.uint8)]
            ranges[slot, PLACES.input(1, index)] = torch.tensor([first, len(tiles)])
        arena = torch.cat(strips)
        arena = torch.cat((arena, arena.new_full((-len(arena) % 4096,), 0xFF))).view(-1, 4096).to(device)
        table, nothing = torch.tensor(tiles, dtype=torch.int32), torch.zeros(3, 2, 4, 2, dtype=torch.int32)
        own = OwnTable(ranges.to(device), ranges, {0: Own.INPUT, 2: Own.INPUT})
        self.step = AdapterStep(
            arena,
            TileTable(nothing.to(device), table.to(device), nothing, table, own),
            _segments(COUNTS, MIXES, device),
        )

    def turned(self, x: Tensor, index: int) -> tuple[Exact, Exact]:
        """x as it is turned for the projection `index`, and the sum of the terms' magnitudes."""
        found, terms = exact(x), np.abs(exact(x))
        for s, mix in enumerate(MIXES):
            rows = slice(sum(COUNTS[:s]), sum(COUNTS[: s + 1]))
            for slot, weight in mix:
                matrix = self.matrices.get((slot, index), np.zeros((WIDTH, WIDTH)))
                found[rows] += weight * exact(x[rows]) @ matrix
                terms[rows] += abs(weight) * np.abs(exact(x[rows])) @ np.abs(matrix)
        return found, terms


def _segments(
    counts: tuple[int, ...], mixes: tuple[tuple[tuple[int, float], ...], ...], device: torch.device, decoding: int = 2
) -> AdapterSegments:
    bounds = tuple(accumulate(counts, initial=0))
    members = [member for mix in mixes for member in mix]
    return AdapterSegments(
        indptr=torch.tensor(bounds, dtype=torch.int32, device=device),
        mix_ptr=torch.tensor(list(accumulate(map(len, mixes), initial=0)), dtype=torch.int32, device=device),
        mix_slot=torch.tensor([slot for slot, _ in members], dtype=torch.int32, device=device),
        mix_weight=torch.tensor([weight for _, weight in members], device=device),
        bounds=bounds,
        mixes=mixes,
        num_decode_segments=decoding,
    )


def _inputs(backend: Backend, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(COUNTS) + 2, WIDTH, generator=generator)
    w = torch.randn(max(ENDS.values()), WIDTH, generator=generator) * WIDTH**-0.5
    return x.to(backend.device, dtype), w.to(backend.device, dtype)


def test_turned_inputs(backend: Backend, dtype: torch.dtype) -> None:
    world, (x, w) = _World(backend.device, dtype), _inputs(backend, dtype)
    packed = backend.pack_linear(w.clone())
    y, plain = backend.adapter_linear(x, packed, INPUTS, world.step), backend.linear(x, packed)
    for each, index in zip(INPUTS, ENDS, strict=True):
        columns = slice(each.start, each.stop)
        turned, terms = world.turned(x, index)
        size = np.abs(rounded(turned, dtype)) + terms * 1e-6
        weight = exact(w)[columns]
        wobble = 0.6 * np.sqrt(size**2 @ weight.T**2)  # each input may be rounded the other way
        assert_near(y[:, columns], rounded(turned, dtype) @ weight.T, size @ np.abs(weight).T, wobble)
        apart = (turned != exact(x)).any(1)
        assert 0 < apart.sum() < len(x)
        if backend.name == "cpu":
            assert torch.equal(y[~apart][:, columns], plain[~apart][:, columns])
        assert (y[apart][:, columns] != plain[apart][:, columns]).any()


def test_a_quantised_base(backend: Backend, dtype: torch.dtype) -> None:
    """Its projections are one weight, or of two formats; in fp32 they are the dense weight that they stand for."""
    world, (x, _) = _World(backend.device, dtype), _inputs(backend, dtype)
    for name, other in (("Q8_0", None), ("Q4_0", "Q8_0"), ("Q8_0", "dense")):
        parts = [random_weight(name, ENDS[2] if other else ENDS[4], WIDTH)]
        if other == "dense":
            parts.append(torch.randn(ENDS[4] - ENDS[2], WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype))
        elif other is not None:
            parts.append(random_weight(other, ENDS[4] - ENDS[2], WIDTH))
        packed = backend.pack_parts([part.to(backend.device) for part in parts], dtype, Activations.EXACT)
        dense = np.concatenate([exact(p if isinstance(p, Tensor) else dequantize(p)) for p in parts])
        y, plain = backend.adapter_linear(x, packed, INPUTS, world.step), backend.linear(x, packed)
        for each, index in zip(INPUTS, ENDS, strict=True):
            turned, _ = world.turned(x, index)
            weight = dense[each.start : each.stop]
            size = np.abs(rounded(turned, dtype)) + 1e-6
            wobble = 1.5 * np.sqrt(size**2 @ weight.T**2)
            assert_near(
                y[:, each.start : each.stop], rounded(turned, dtype) @ weight.T, size @ np.abs(weight).T, wobble
            )
        if backend.name == "cpu":
            assert torch.equal(y[2:4], plain[2:4])
            assert torch.equal(y[-2:], plain[-2:])


def test_bits_of_a_row_alone(backend: Backend, dtype: torch.dtype) -> None:
    """However a prompt is cut, whichever rows are beside it, and for whatever number of threads."""
    if not isinstance(backend, CpuBackend):
        return
    world, (x, w) = _World(backend.device, dtype), _inputs(backend, dtype)
    for threads in (1, 2, 3):
        ops = CpuBackend(backend.team.isa, threads)
        packed = ops.pack_linear(w.clone())
        whole = ops.adapter_linear(x, packed, INPUTS, world.step)
        token = 0
        for mix, count in zip(MIXES, COUNTS, strict=True):
            for here in range(token, token + count):
                segments = _segments((1,), (mix,), backend.device, 0)
                alone = ops.adapter_linear(x[here : here + 1], packed, INPUTS, replace(world.step, segments=segments))
                assert torch.equal(alone, whole[here : here + 1])
            token += count
