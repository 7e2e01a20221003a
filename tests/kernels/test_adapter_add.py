"""adapter_add_ against fp64: mixed ranks, cut tiles, mixes and every popularity, in an arena that is NaN elsewhere.

The arena and the tile table are written here tile by tile, apart from the code that packs adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from loraplex.kernels.constants import ALIGN, BlockInput, Function, TileKind
from loraplex.kernels.ops import Backend
from loraplex.kernels.records import AdapterSegments, AdapterStep, TileTable
from tests.support.rounding import assert_near, exact, rounded

LAYERS = 3
PAGE_BYTES = 131072


@dataclass
class _LowRank:
    a: Tensor  # [r, in_len]
    b: Tensor  # [r, out_len]
    out_start: int
    in_start: int = 0


@dataclass
class _Bias:
    delta: Tensor  # [out_len]
    out_start: int


@dataclass
class _Scale:
    values: Tensor  # [out_len] fp32
    out_start: int


@dataclass
class _Dense:
    a: Tensor  # [out_len, in_len]
    out_start: int
    in_start: int = 0


@dataclass
class _Bottleneck:
    low_rank: _LowRank
    c: Tensor  # [r] fp32
    function: Function
    source: BlockInput


_Part = _LowRank | _Bias | _Scale | _Dense | _Bottleneck
_Adapter = list[_Part]  # what one slot does at one (layer, site)


class _Arena:
    """Writes tiles to random places; whatever is not a tile is NaN, and so is what pads a tile to 64 bytes."""

    def __init__(self, dtype: torch.dtype, num_pages: int, seed: int) -> None:
        self.dtype = dtype
        self.pages = torch.full((num_pages, PAGE_BYTES), 0xFF, dtype=torch.uint8)
        self._rng = np.random.default_rng(seed)
        self._next = [page * PAGE_BYTES for page in self._rng.permutation(num_pages).tolist()]
        self._room = [PAGE_BYTES] * num_pages

    def put(self, strip: Tensor, dtype: torch.dtype | None = None) -> int:
        """Returns the strip's offset in 64-byte units. dtype: what it is stored in, the compute dtype by default."""
        flat = strip.to(dtype or self.dtype).contiguous().view(-1).view(torch.uint8)
        size = -(-flat.numel() // ALIGN) * ALIGN
        candidates = [i for i, room in enumerate(self._room) if room >= size]
        i = candidates[int(self._rng.integers(len(candidates)))]
        offset = self._next[i]
        self.pages.view(-1)[offset : offset + flat.numel()] = flat
        self._next[i] += size
        self._room[i] -= size
        return offset // ALIGN


def _rows_of(part: _Part, arena: _Arena, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Rows of TileTable.tiles for one part, cut at random: ranks at most 16 at once, and sometimes B by columns."""
    if isinstance(part, _Bias):
        return [(-1, arena.put(part.delta), 1, part.out_start, len(part.delta), TileKind.BIAS, 0, 0)]
    if isinstance(part, _Scale):
        cuts = sorted({0, len(part.values), *rng.integers(0, len(part.values) + 1, size=1).tolist()})
        return [
            (-1, arena.put(part.values[a:b], torch.float32), 1, part.out_start + a, b - a, TileKind.SCALE, 0, 0)
            for a, b in pairwise(cuts)
        ]
    if isinstance(part, _Dense):
        cuts = sorted({*range(0, len(part.a), int(rng.integers(1, 17))), len(part.a)})
        window = (TileKind.DENSE, part.in_start, part.a.shape[1])
        return [(arena.put(part.a[a:b]), -1, b - a, part.out_start + a, b - a, *window) for a, b in pairwise(cuts)]
    if isinstance(part, _Bottleneck):
        c, first, rows = arena.put(part.c, torch.float32), 0, []
        for row in _rows_of(part.low_rank, arena, rng):
            rows += [(-1, c, part.source, 0, 0, TileKind.ACTIVATION, part.function, first), row]
            first += row[2] if row[3] + row[4] == part.low_rank.out_start + part.low_rank.b.shape[1] else 0
        return rows
    rows = []
    rank, out = part.b.shape
    first = 0
    while first < rank:
        n = int(min(rank - first, rng.integers(1, 17)))
        a_off = arena.put(part.a[first : first + n])
        cuts = sorted({0, out, *rng.integers(0, out + 1, size=int(rng.integers(0, 3))).tolist()})
        for begin, end in pairwise(cuts):
            b_off = arena.put(part.b[first : first + n, begin:end])
            out_window, in_window = (part.out_start + begin, end - begin), (part.in_start, part.a.shape[1])
            rows.append((a_off, b_off, n, *out_window, TileKind.LOW_RANK, *in_window))
        first += n
    return rows


@dataclass
class _World:
    arena: Tensor
    table: TileTable
    adapters: dict[int, _Adapter]  # by slot, at (LAYER, SITE)

    def step(self, segments: AdapterSegments) -> AdapterStep:
        return AdapterStep(self.arena, self.table, segments)


LAYER, SITE, NUM_SITES = 1, 5, 7  # as many sites as the table says, which is the base's affair


def _world(backend: Backend, dtype: torch.dtype, adapters: dict[int, _Adapter], num_slots: int, seed: int) -> _World:
    rng = np.random.default_rng(seed)
    arena = _Arena(dtype, 40, seed)
    ranges = np.zeros((num_slots, LAYERS, NUM_SITES, 2), dtype=np.int32)
    nobodys = (2**31 - 1, 2**31 - 1, 1, 0, 1, TileKind.LOW_RANK, 0, 1)  # reading one would crash
    rows: list[tuple[int, ...]] = [nobodys] * 3
    for slot in rng.permutation(sorted(adapters)).tolist():
        begin = len(rows)
        for part in adapters[slot]:
            rows += _rows_of(part, arena, rng)
        ranges[slot, LAYER, SITE] = begin, len(rows)
    tiles = torch.tensor(rows, dtype=torch.int32)
    table = TileTable(
        torch.from_numpy(ranges).to(backend.device), tiles.to(backend.device), torch.from_numpy(ranges), tiles
    )
    return _World(arena.pages.to(backend.device), table, adapters)


def _segments(
    backend: Backend, segments: list[tuple[int, tuple[tuple[int, float], ...]]], num_decode: int
) -> AdapterSegments:
    """From (tokens, mix) per segment."""

    def tensor(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=backend.device)

    bounds = [0, *np.cumsum([n for n, _ in segments]).tolist()]
    return AdapterSegments(
        indptr=tensor(bounds, torch.int32),
        mix_ptr=tensor([0, *np.cumsum([len(mix) for _, mix in segments]).tolist()], torch.int32),
        mix_slot=tensor([slot for _, mix in segments for slot, _ in mix], torch.int32),
        mix_weight=tensor([w for _, mix in segments for _, w in mix], torch.float32),
        bounds=tuple(bounds),
        mixes=tuple(mix for _, mix in segments),
        num_decode_segments=num_decode,
    )


def _check(
    backend: Backend,
    dtype: torch.dtype,
    world: _World,
    segments: list[tuple[int, tuple[tuple[int, float], ...]]],
    shape: tuple[int, int],
    base_rows: int = 3,
    num_decode: int = 0,
    at_block: bool = False,
) -> None:
    """Runs the op and compares every row with the formula in fp64; rows of no segment must keep their bits.

    at_block: y is x, and there is a residual.
    """
    n_in, n_out = shape
    generator = torch.Generator().manual_seed(7)
    tokens = sum(n for n, _ in segments) + base_rows
    x = torch.randn(tokens, n_in, generator=generator).to(dtype)
    y = x if at_block else torch.randn(tokens, n_out, generator=generator).to(dtype)
    residual = torch.randn(tokens, n_in, generator=generator).to(dtype)
    sources = [exact(x), exact(x + residual), exact(residual)]  # copies: y may be x
    y[-1, 0] = -0.0
    expected, terms, wobble = exact(y), np.zeros((tokens, n_out)), np.zeros((tokens, n_out))
    touched = np.zeros((tokens, n_out), dtype=bool)
    first = 0
    for n, mix in segments:
        rows = slice(first, first + n)
        first += n
        for slot, w in mix:
            w32 = float(np.float32(w))
            for part in world.adapters[slot]:
                if isinstance(part, _Bias):
                    columns = slice(part.out_start, part.out_start + len(part.delta))
                    added = np.broadcast_to(w32 * exact(part.delta.to(dtype)), (n, len(part.delta)))
                    terms[rows, columns] += np.abs(added)
                elif isinstance(part, _Scale):
                    columns = slice(part.out_start, part.out_start + len(part.values))
                    added = w32 * (exact(part.values) - 1) * exact(y[rows, columns])
                    terms[rows, columns] += np.abs(added) + np.abs(exact(y[rows, columns]))
                elif isinstance(part, _Bottleneck):
                    a, b = exact(part.low_rank.a.to(dtype)), exact(part.low_rank.b.to(dtype))
                    columns = slice(part.low_rank.out_start, part.low_rank.out_start + b.shape[1])
                    seen = sources[part.source][rows]
                    raw = _FUNCTIONS[part.function](torch.from_numpy(seen @ a.T + exact(part.c))).numpy()
                    u = rounded(raw, dtype)
                    added = w32 * (u @ b)
                    least = np.abs(seen) @ np.abs(a).T + np.abs(exact(part.c))
                    terms[rows, columns] += abs(w32) * (least @ np.abs(b))
                    wobble[rows, columns] += 0.1 * abs(w32) * (np.abs(u) @ np.abs(b))
                else:
                    b = np.eye(len(part.a)) if isinstance(part, _Dense) else exact(part.b.to(dtype))
                    columns = slice(part.out_start, part.out_start + b.shape[1])
                    a = exact(part.a.to(dtype))
                    seen = exact(x[rows, part.in_start : part.in_start + a.shape[1]])
                    u = rounded(seen @ a.T, dtype)
                    added = w32 * (u @ b)
                    terms[rows, columns] += abs(w32) * (np.abs(seen) @ np.abs(a).T @ np.abs(b))
                    # An element of u that is rounded the other way: at most one in a few, so a tenth of all at once;
                    # what is dense has one alone.
                    wobble[rows, columns] += (
                        (1.0 if isinstance(part, _Dense) else 0.1) * abs(w32) * (np.abs(u) @ np.abs(b))
                    )
                expected[rows, columns] += added
                touched[rows, columns] = True
    before = y.clone()
    result = y.clone().to(backend.device)
    step = world.step(_segments(backend, segments, num_decode))
    if at_block:
        out = backend.adapter_add_(result, result, LAYER, SITE, step, residual.to(backend.device))
    else:
        out = backend.adapter_add_(result, x.to(backend.device), LAYER, SITE, step)
    assert out.data_ptr() == result.data_ptr(), "not in place"
    assert_near(out, expected, terms, wobble)
    same = (out.cpu().view(torch.uint8) == before.view(torch.uint8)).view(tokens, n_out, -1).all(-1).numpy()
    assert bool(same[~touched.any(1)].all()), "a row without tiles has changed"
    assert bool((exact(out)[~touched] == exact(before)[~touched]).all()), "a column without tiles has changed"


def _low_rank(
    rng: np.random.Generator, rank: int, n_in: int, out_len: int, out_start: int = 0, in_start: int = 0
) -> _LowRank:
    a = torch.from_numpy(rng.standard_normal((rank, n_in)) / np.sqrt(n_in))
    b = torch.from_numpy(rng.standard_normal((rank, out_len)))
    return _LowRank(a, b, out_start, in_start)


def _one(slot: int) -> tuple[tuple[int, float], ...]:
    return ((slot, 1.0),)


SHAPES = [(64, 96), (33, 7), (576, 1536), (100, 3), (1, 1), (130, 257)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 8, 16, 17, 64])
def test_ranks_and_shapes(backend: Backend, dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    rng = np.random.default_rng(rank)
    world = _world(backend, dtype, {2: [_low_rank(rng, rank, *shape)]}, 4, seed=rank)
    _check(backend, dtype, world, [(1, _one(2)), (5, _one(2))], shape, num_decode=1)


@pytest.mark.parametrize("num_decode", [0, 1])
def test_tokens_between_that_wear_nothing(backend: Backend, dtype: torch.dtype, num_decode: int) -> None:
    """Before an invocation a sequence has none, beside others that do: its rows keep their bits."""
    rng = np.random.default_rng(3)
    world = _world(backend, dtype, {2: [_low_rank(rng, 17, 64, 96)], 0: [_low_rank(rng, 3, 64, 96)]}, 4, seed=3)
    segments = [(1, _one(2)), (70, ()), (2, _one(2)), (5, ()), (9, ((0, 0.5), (2, 1.0)))]
    _check(backend, dtype, world, segments, (64, 96), num_decode=num_decode)


POPULARITY = ["identical", "distinct", "uniform", "zipf", "skewed"]


def _slots_of(popularity: str, rows: int, rng: np.random.Generator) -> list[int]:
    if popularity == "identical":
        return [3] * rows
    if popularity == "distinct":
        return list(range(rows))
    if popularity == "uniform":
        return rng.integers(0, 5, rows).tolist()
    if popularity == "zipf":
        return (np.minimum(rng.zipf(1.5, rows), rows) - 1).tolist()
    return [0] * (rows // 2) + list(range(1, rows - rows // 2 + 1))


@pytest.mark.parametrize("popularity", POPULARITY)
def test_popularity_with_mixed_ranks(backend: Backend, dtype: torch.dtype, popularity: str) -> None:
    """Decode rows merged into one segment per adapter, then prefill chunks, then base rows."""
    rng = np.random.default_rng(11)
    rows, shape = 24, (96, 160)
    ranks = [1, 2, 4, 8, 16, 24, 32, 64]
    adapters: dict[int, _Adapter] = {
        slot: [_low_rank(rng, ranks[int(rng.integers(8))], *shape)] for slot in range(rows)
    }
    world = _world(backend, dtype, adapters, 32, seed=11)
    decode = sorted(_slots_of(popularity, rows, rng))
    segments = [(decode.count(slot), _one(slot)) for slot in sorted(set(decode))]
    chunks = [(int(rng.integers(1, 40)), _one(slot)) for slot in _slots_of(popularity, 4, rng)]
    _check(backend, dtype, world, segments + chunks, shape, num_decode=len(segments))


def test_ranks_from_1_to_256_in_one_call(backend: Backend, dtype: torch.dtype) -> None:
    """With empty segments between them, and segments of one row on both paths."""
    rng = np.random.default_rng(12)
    shape = (80, 72)
    adapters: dict[int, _Adapter] = {
        slot: [_low_rank(rng, rank, *shape)] for slot, rank in enumerate((1, 3, 16, 33, 128, 256))
    }
    world = _world(backend, dtype, adapters, 6, seed=12)
    order = [5, 0, 3, 4, 1, 2]
    decode = [(n, _one(slot)) for slot, n in zip(order, (1, 2, 0, 1, 1, 3), strict=True)]
    chunks = [(n, _one(slot)) for slot, n in zip(order, (1, 40, 0, 7, 1, 20), strict=True)]
    _check(backend, dtype, world, decode + chunks, shape, num_decode=len(decode))


def test_projections_keep_their_columns_of_a_fused_site(backend: Backend, dtype: torch.dtype) -> None:
    """q and v of a fused qkv: the columns of k stay as they are, and ranks may differ."""
    rng = np.random.default_rng(3)
    adapters: dict[int, _Adapter] = {
        0: [_low_rank(rng, 8, 64, 64, 0), _low_rank(rng, 20, 64, 32, 96)],
        1: [_low_rank(rng, 4, 64, 32, 64)],
        2: [_low_rank(rng, 16, 64, 128, 0)],  # one B over the whole range, as fused checkpoints have
    }
    world = _world(backend, dtype, adapters, 3, seed=3)
    segments = [(2, _one(0)), (1, _one(1)), (4, _one(2)), (3, _one(0))]
    _check(backend, dtype, world, segments, (64, 128), num_decode=2)


def test_mixes_are_weighted_sums(backend: Backend, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(4)
    shape = (64, 48)
    adapters: dict[int, _Adapter] = {slot: [_low_rank(rng, 2 + 5 * slot, *shape)] for slot in range(4)}
    adapters[1].append(_Bias(torch.from_numpy(rng.standard_normal(20)), 9))
    world = _world(backend, dtype, adapters, 4, seed=4)
    segments = [
        (2, ((0, 0.5), (1, 0.25), (2, -1.5))),
        (1, ((3, 1.0), (3, 1.0))),
        (3, ((1, 0.3),)),
        (5, ((2, 1.0), (0, 1.0))),
    ]
    _check(backend, dtype, world, segments, shape, num_decode=2)


def test_biases(backend: Backend, dtype: torch.dtype) -> None:
    """Alone, beside a low rank, and cut in two."""
    rng = np.random.default_rng(5)

    def bias(n: int, start: int) -> _Bias:
        return _Bias(torch.from_numpy(rng.standard_normal(n)), start)

    adapters: dict[int, _Adapter] = {
        0: [bias(48, 0)],
        1: [_low_rank(rng, 8, 64, 48), bias(48, 0)],
        2: [bias(30, 0), bias(18, 30)],
    }
    world = _world(backend, dtype, adapters, 3, seed=5)
    _check(backend, dtype, world, [(2, _one(0)), (3, _one(1)), (1, _one(2))], (64, 48), num_decode=1)


@pytest.mark.parametrize(("n_in", "cuts"), [(96, (32, 64)), (75, (3, 50)), (640, (129, 600))])
def test_windows_of_the_input(backend: Backend, dtype: torch.dtype, n_in: int, cuts: tuple[int, int]) -> None:
    """Blocks of the input for blocks of the output, one for all of it, beside a whole one; odd starts and widths."""
    rng = np.random.default_rng(n_in)
    first, second = cuts
    adapters: dict[int, _Adapter] = {
        0: [_low_rank(rng, 4, first, 20), _low_rank(rng, 17, second - first, 28, 20, first)],
        1: [_low_rank(rng, 8, n_in - second, 48, 0, second), _low_rank(rng, 3, first, 48), _scale(rng, 48, 0)],
        2: [_low_rank(rng, 16, n_in, 48), _low_rank(rng, 2, 1, 30, 5, second)],
    }
    world = _world(backend, dtype, adapters, 3, seed=n_in)
    decode = [(1, _one(0)), (2, _one(1)), (1, ((2, 0.5), (0, 1.0)))]
    chunks = [(9, _one(0)), (3, _one(2)), (30, ((1, -0.5), (2, 1.0)))]
    _check(backend, dtype, world, decode + chunks, (n_in, 48), num_decode=3)


def _dense(rng: np.random.Generator, n_in: int, out_len: int, out_start: int = 0, in_start: int = 0) -> _Dense:
    return _Dense(torch.from_numpy(rng.standard_normal((out_len, n_in)) / np.sqrt(n_in)), out_start, in_start)


@pytest.mark.parametrize(("n_in", "out"), [(64, 96), (33, 7), (130, 257), (576, 192), (32, 1100)])
def test_dense_rows(backend: Backend, dtype: torch.dtype, n_in: int, out: int) -> None:
    """Alone, on a part of the columns, of a window of the input, beside all other kinds, and in mixes."""
    rng = np.random.default_rng(out)
    part, bias = out // 2, _Bias(torch.from_numpy(rng.standard_normal(out)), 0)
    adapters: dict[int, _Adapter] = {
        0: [_dense(rng, n_in, out)],
        1: [_dense(rng, n_in - 5, part, out - part, 5), _low_rank(rng, 17, n_in, out), bias, _scale(rng, out, 0)],
        2: [_low_rank(rng, 8, n_in, out)],
    }
    world = _world(backend, dtype, adapters, 3, seed=out)
    decode = [(2, _one(0)), (1, _one(1)), (1, ((0, 0.5), (1, -1.5))), (1, _one(2))]
    chunks = [(9, _one(1)), (33, _one(0)), (3, ((2, 0.25), (0, 1.0))), (2, _one(2))]
    _check(backend, dtype, world, decode + chunks, (n_in, out), num_decode=4)


_FUNCTIONS = {
    Function.IDENTITY: lambda u: u,
    Function.RELU: torch.relu,
    Function.GELU: lambda u: u * 0.5 * (1 + torch.erf(u / 2**0.5)),
    Function.GELU_TANH: lambda u: 0.5 * u * (1 + torch.tanh((2 / np.pi) ** 0.5 * (u + 0.044715 * u**3))),
    Function.SILU: lambda u: u / (1 + torch.exp(-u)),
    Function.TANH: torch.tanh,
    Function.LEAKY_RELU: lambda u: torch.where(u > 0, u, 0.01 * u),
}


@pytest.mark.parametrize("function", Function)
@pytest.mark.parametrize("width", [48, 130, 600])
def test_bottlenecks(backend: Backend, dtype: torch.dtype, width: int, function: Function) -> None:
    """Of each source, two of one site, beside a bias and other tiles, in mixes; of columns cut and of ranks."""
    rng = np.random.default_rng(width)

    def bottleneck(rank: int, source: BlockInput, function: Function = function) -> _Bottleneck:
        c = torch.from_numpy(rng.standard_normal(rank)).float()
        return _Bottleneck(_low_rank(rng, rank, width, width), c, function, source)

    bias = _Bias(torch.from_numpy(rng.standard_normal(width)), 0)
    adapters: dict[int, _Adapter] = {
        0: [bottleneck(12, BlockInput.BRANCH), bias],
        1: [
            bottleneck(33, BlockInput.SUM),
            bottleneck(33, BlockInput.SUM, Function.IDENTITY),
        ],  # as a ReFT with a function
        2: [bottleneck(16, BlockInput.RESIDUAL), _low_rank(rng, 3, width, width)],
        3: [_low_rank(rng, 8, width, width)],
    }
    world = _world(backend, dtype, adapters, 4, seed=width)
    decode = [(1, _one(0)), (2, _one(1)), (1, _one(3)), (1, ((2, 0.5), (0, -1.5), (1, 1.0)))]
    chunks = [(9, _one(1)), (33, _one(0)), (3, ((2, 0.25), (1, 1.0))), (2, _one(3)), (1, _one(2))]
    _check(backend, dtype, world, decode + chunks, (width, width), num_decode=4, at_block=True)


def _scale(rng: np.random.Generator, n: int, start: int) -> _Scale:
    """Values as trained ones are, near 1, but for a zero and one that is far off."""
    values = torch.from_numpy(1 + 0.3 * rng.standard_normal(n)).float()
    values[0], values[-1] = 0.0, -4.0
    return _Scale(values, start)


@pytest.mark.parametrize("width", [7, 48, 128, 200])
@pytest.mark.parametrize("num_decode", [0, 3])
def test_scales(backend: Backend, dtype: torch.dtype, width: int, num_decode: int) -> None:
    """Alone, beside low ranks and a bias, and on a part of the columns; next to rows of low ranks and base rows."""
    rng = np.random.default_rng(width)
    part = width // 2
    adapters: dict[int, _Adapter] = {
        0: [_scale(rng, width, 0)],
        1: [_scale(rng, part, width - part)],
        2: [_low_rank(rng, 20, 64, width), _scale(rng, width, 0), _Bias(torch.from_numpy(rng.standard_normal(5)), 1)],
        3: [_low_rank(rng, 8, 64, width)],
    }
    world = _world(backend, dtype, adapters, 4, seed=width)
    decode = [(2, _one(0)), (1, _one(3)), (1, _one(1))][:num_decode]
    chunks = [(40, _one(1)), (3, _one(0)), (1, _one(2)), (5, _one(3)), (9, _one(2))]
    _check(backend, dtype, world, decode + chunks, (64, width), num_decode=len(decode))


def test_scales_in_mixes_are_one_plus_weighted_differences(backend: Backend, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(15)
    adapters: dict[int, _Adapter] = {
        0: [_scale(rng, 96, 0)],
        1: [_scale(rng, 40, 30), _low_rank(rng, 3, 64, 96)],
        2: [_low_rank(rng, 16, 64, 96)],
    }
    world = _world(backend, dtype, adapters, 3, seed=15)
    segments = [
        (2, ((0, 0.5), (2, 1.0))),
        (1, ((0, 0.25), (1, -1.5), (2, 0.3))),
        (4, ((1, 2.0), (0, 1.0))),
        (6, ((2, 1.0), (0, -0.5), (0, 1.5))),
    ]
    _check(backend, dtype, world, segments, (64, 96), num_decode=2)


def test_scale_is_not_rounded_to_the_compute_dtype(backend: Backend, dtype: torch.dtype) -> None:
    """In bf16 1.0035 would be 1, and 1.0035 times the number below 2 would be that number, not 2."""
    values = torch.full((64,), 1.0035)
    values[:32] = 0.5
    world = _world(backend, dtype, {0: [_Scale(values, 0)]}, 1, seed=16)
    start = 2.0 - 2.0**-7
    y = torch.full((2, 64), start).to(backend.device, dtype)
    x = torch.ones(2, 4, device=backend.device, dtype=dtype)
    segments = _segments(backend, [(1, _one(0)), (1, _one(0))], 1)
    backend.adapter_add_(y, x, LAYER, SITE, world.step(segments))
    assert np.array_equal(exact(y[:, :32]), np.full((2, 32), start / 2))
    once = rounded(np.float64(np.float32(1.0035)) * start, dtype)
    assert np.abs(exact(y[:, 32:]) - once).max() <= 2.0**-21
    assert once != start


def test_rows_without_scales_keep_their_bits_beside_them(backend: Backend, dtype: torch.dtype) -> None:
    """A row of low ranks is the same to the bit whether its neighbours, or other columns, are scaled or not."""
    rng = np.random.default_rng(17)
    plain = [_low_rank(rng, 8, 64, 64, 0), _low_rank(rng, 20, 64, 32, 96)]
    adapters: dict[int, _Adapter] = {0: plain, 1: [_scale(rng, 128, 0)], 2: [*plain, _scale(rng, 32, 64)]}
    world = _world(backend, dtype, adapters, 3, seed=17)
    x, y = torch.randn(8, 64).to(backend.device, dtype), torch.randn(8, 128).to(backend.device, dtype)
    for decode in (True, False):

        def add(slots: tuple[int, int], decode: bool = decode) -> Tensor:
            segments = _segments(backend, [(4, _one(slots[0])), (4, _one(slots[1]))], 2 * decode)
            return backend.adapter_add_(y.clone(), x, LAYER, SITE, world.step(segments))

        alone, beside = add((0, 0)), add((0, 1))
        assert torch.equal(alone[:4], beside[:4])
        assert not torch.equal(alone[4:], beside[4:])


def test_nothing_to_do_changes_no_bit(backend: Backend, dtype: torch.dtype) -> None:
    """Empty segments, mixes of nobody, slots without tiles here: -0.0 and NaN keep their bits."""
    rng = np.random.default_rng(6)
    world = _world(backend, dtype, {0: [_low_rank(rng, 4, 16, 24)], 1: []}, 3, seed=6)
    y = torch.randn(6, 24).to(backend.device, dtype)
    y[0], y[1] = -0.0, torch.nan
    before = y.clone()
    x = torch.full((6, 16), torch.nan, device=backend.device, dtype=dtype)
    cases: list[list[tuple[int, tuple[tuple[int, float], ...]]]] = [
        [],
        [(0, _one(0)), (3, _one(1)), (0, _one(0))],
        [(2, ()), (2, _one(2)), (2, ((1, 0.5), (2, 1.0)))],
    ]
    for segments in cases:
        backend.adapter_add_(y, x, LAYER, SITE, world.step(_segments(backend, segments, 0)))
        assert torch.equal(y.view(torch.uint8), before.view(torch.uint8))
    for layer, site in ((0, SITE), (2, SITE), (LAYER, 3)):  # the adapter has tiles, but not there
        backend.adapter_add_(y, x, layer, site, world.step(_segments(backend, [(6, _one(0))], 0)))
        assert torch.equal(y.view(torch.uint8), before.view(torch.uint8))


def test_terms_that_cancel_are_summed_before_rounding(backend: Backend, dtype: torch.dtype) -> None:
    """1000 - 1000 + 1/8 in fp32 is 1/8; with a rounding in between, the 16-bit dtypes lose it."""
    ones = torch.ones(1, 1)
    adapters: dict[int, _Adapter] = {
        0: [_LowRank(ones, torch.full((1, 4), 1000.0), 0)],
        1: [_LowRank(ones, torch.full((1, 4), 0.125), 0)],
    }
    world = _world(backend, dtype, adapters, 2, seed=8)
    y = torch.zeros(1, 4, device=backend.device, dtype=dtype)
    x = torch.ones(1, 1, device=backend.device, dtype=dtype)
    segments = _segments(backend, [(1, ((0, 1.0), (1, 1.0), (0, -1.0)))], 1)
    backend.adapter_add_(y, x, LAYER, SITE, world.step(segments))
    assert np.array_equal(exact(y), np.full((1, 4), 0.125))


def test_u_is_rounded_to_the_compute_dtype(backend: Backend) -> None:
    """u = 1 + 2^-9 is 1 in bf16: it must be rounded there on every backend, for all to agree."""
    adapters: dict[int, _Adapter] = {0: [_LowRank(torch.ones(1, 2), torch.full((1, 4), 256.0), 0)]}
    world = _world(backend, torch.bfloat16, adapters, 1, seed=9)
    x = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16, device=backend.device)
    y = torch.full((1, 4), -256.0, dtype=torch.bfloat16, device=backend.device)
    backend.adapter_add_(y, x, LAYER, SITE, world.step(_segments(backend, [(1, _one(0))], 1)))
    assert np.array_equal(exact(y), np.zeros((1, 4)))


@pytest.mark.parametrize("num_decode", [0, 40])
def test_what_is_no_number_stays_so_and_alone(backend: Backend, dtype: torch.dtype, num_decode: int) -> None:
    """Its neighbours, which share registers with it, have the bits that they have without it."""
    rng = np.random.default_rng(11)
    world = _world(backend, dtype, {0: [_low_rank(rng, 5, 16, 71)]}, 1, seed=11)
    x = torch.from_numpy(rng.standard_normal((40, 16))).to(backend.device, dtype)
    clean = torch.from_numpy(rng.standard_normal((40, 71))).to(dtype)
    lost = torch.zeros(40, 71, dtype=torch.bool)
    lost[3, 7] = lost[20, 0] = lost[20, 1] = lost[39, 70] = True
    dirty = clean.masked_fill(lost, torch.nan)
    segments = _segments(backend, [(1, _one(0))] * num_decode or [(40, _one(0))], num_decode)
    outs = [
        backend.adapter_add_(y.clone().to(backend.device), x, LAYER, SITE, world.step(segments)).cpu()
        for y in (clean, dirty)
    ]
    assert torch.equal(outs[1].isnan(), lost)
    assert torch.equal(outs[0][~lost], outs[1][~lost])
