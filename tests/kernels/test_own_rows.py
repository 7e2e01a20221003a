"""What adapters have outside the linears of layers, against fp64, in an arena that is NaN elsewhere.

adapter_norm_, adapter_embed_, adapter_head_ and the norms of rope_store_kv: rows in place of the base's, and low-rank
changes of the embedding and the head.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from loraplex.kernels.constants import ALIGN, BLOCK_SIZE, QUERY_NORM, Own, TableSite, TileKind
from loraplex.kernels.ops import Backend
from loraplex.kernels.records import (
    AdapterSegments,
    AdapterStep,
    AttentionParams,
    KVLayer,
    OwnPlaces,
    OwnTable,
    QKNorm,
    TileTable,
)
from tests.support.kv_pages import read_tokens
from tests.support.rounding import assert_near, exact, rounded

PLACES = OwnPlaces(2)
NORM, QUERY, KEY = (PLACES.norm(1, number) for number in (2, QUERY_NORM, QUERY_NORM + 1))
WIDTH, VOCAB, DIM = 96, 50, 32
Mix = tuple[tuple[int, float], ...]
MIXES: tuple[Mix, ...] = (((0, 1.0),), ((1, 1.0),), (), ((0, 0.5), (2, 0.5)), ((2, 1.0),))
COUNTS = (3, 1, 2, 2, 3)
WORN = [0, 0, 0, 1, -1, -1, -1, -1, 2, 2, 2, -1, -1]  # slot of each token; two base rows at the end
IDS = {0: [(3, 2), (40, 1), (48, 5)], 2: [(0, 16), (16, 16), (32, 1)]}  # by slot: (first, count) of runs of rows
PIECES = {1: [(5, [(0, 30), (30, 20)])], 2: [(16, [(0, 50)]), (3, [(0, 16), (16, 34)])]}
"""By slot: (ranks, pieces of the columns as (first, count)) of the tiles of a low-rank change of a table."""


class _World:
    """Slots 0 and 2 have norms, rows of the embedding and of the head; slots 1 and 2 low-rank changes of both."""

    def __init__(self, backend: Backend, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(7)
        self.rows: dict[tuple[int, int, int], Tensor] = {}  # (slot, place, number) -> the row as it is stored
        strips: list[Tensor] = [torch.full((ALIGN,), 0xFF, dtype=torch.uint8)]
        tiles: list[list[int]] = [[2**31 - 1] * 8]  # nobody's: reading it would crash
        ranges = torch.zeros(3, PLACES.count, 2, dtype=torch.int32)
        for slot, runs in IDS.items():
            for place in (NORM, QUERY, KEY, PLACES.embed, PLACES.head):
                first, is_norm = len(tiles), place < PLACES.last_norm
                width = DIM if place in (QUERY, KEY) else WIDTH
                for start, count in [(0, 1)] if is_norm else runs:
                    values = torch.randn(count, width, generator=generator).to(torch.float32 if is_norm else dtype)
                    self.rows |= {(slot, place, start + i): row for i, row in enumerate(values)}
                    tiles.append([_put(strips, values), -1, count, start, count, TileKind.OWN, 0, width])
                ranges[slot, place] = torch.tensor([first, len(tiles)])
        linears = torch.zeros(3, 2 + 1, 4, 2, dtype=torch.int32)
        self.factors: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for slot, parts in PIECES.items():
            for site in TableSite:
                first, factors = len(tiles), self.factors.setdefault((slot, site), [])
                for rank, pieces in parts:
                    a = torch.randn(rank, WIDTH, generator=generator).div(10).to(dtype)
                    b = torch.randn(rank, VOCAB, generator=generator).to(dtype)
                    at = _put(strips, a)
                    factors.append((a, b))
                    for start, count in pieces:
                        b_at = _put(strips, b[:, start : start + count].contiguous())
                        tiles.append([at, b_at, rank, start, count, TileKind.LOW_RANK, 0, WIDTH])
                linears[slot, 2, site] = torch.tensor([first, len(tiles)])
        arena = torch.cat(strips)
        arena = torch.cat((arena, arena.new_full((-len(arena) % 4096,), 0xFF))).view(-1, 4096).to(backend.device)
        table = torch.tensor(tiles, dtype=torch.int32)
        wearers = {0: Own.NORM | Own.EMBED | Own.HEAD, 1: Own.EMBED | Own.HEAD, 2: Own.NORM | Own.EMBED | Own.HEAD}
        own = OwnTable(ranges.to(backend.device), ranges, wearers)
        device = backend.device
        self.table = TileTable(linears.to(device), table.to(device), linears, table, own)
        self.arena = arena
        self.step = self.worn(MIXES, COUNTS, 2)

    def worn(self, mixes: tuple[Mix, ...], counts: tuple[int, ...], num_decode: int) -> AdapterStep:
        device, members = self.arena.device, [member for mix in mixes for member in mix]
        bounds = tuple(accumulate(counts, initial=0))
        segments = AdapterSegments(
            indptr=torch.tensor(bounds, dtype=torch.int32, device=device),
            mix_ptr=torch.tensor(list(accumulate(map(len, mixes), initial=0)), dtype=torch.int32, device=device),
            mix_slot=torch.tensor([slot for slot, _ in members], dtype=torch.int32, device=device),
            mix_weight=torch.tensor([weight for _, weight in members], dtype=torch.float32, device=device),
            bounds=bounds,
            mixes=mixes,
            num_decode_segments=num_decode,
        )
        return AdapterStep(self.arena, self.table, segments)


def _put(strips: list[Tensor], values: Tensor) -> int:
    """Put values behind the strips, with a gap; where they begin, in units of ALIGN."""
    at = sum(strip.numel() for strip in strips) // ALIGN
    flat = values.view(torch.uint8).flatten()
    strips += [flat, torch.full((-flat.numel() % ALIGN + ALIGN,), 0xFF, dtype=torch.uint8)]
    return at


def _mix_of(token: int) -> Mix:
    ends = list(accumulate(COUNTS))
    return next((mix for mix, end in zip(MIXES, ends, strict=True) if token < end), ())


def _randn(backend: Backend, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(backend.device, dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("taken", [False, True])
def test_norms(backend: Backend, dtype: torch.dtype, offset: float, taken: bool) -> None:
    world = _World(backend, dtype)
    tokens = [12, 3, 0, 9, 9, 5] if taken else list(range(len(WORN)))
    rows = torch.tensor(tokens, device=backend.device) if taken else None
    r, base = _randn(backend, dtype, len(tokens), WIDTH) * 3, _randn(backend, dtype, WIDTH, seed=1)
    y, total = backend.rms_norm(r, base, 1e-5, None, offset)
    before = y.clone()
    y = backend.adapter_norm_(y, total, 1e-5, offset, NORM, world.step, rows)
    normed = exact(r) / np.sqrt(np.mean(exact(r) ** 2, -1, keepdims=True) + 1e-5)
    for i, token in enumerate(tokens):
        weight = world.rows.get((WORN[token], NORM, 0))
        if weight is None:
            assert torch.equal(y[i], before[i])
        else:
            w = exact(weight)
            assert_near(y[i], w * rounded(normed[i], dtype) if offset == 0.0 else normed[i] * (1.0 + w), ulps=3.0)
    other = backend.adapter_norm_(before.clone(), total, 1e-5, offset, PLACES.last_norm, world.step, rows)
    assert torch.equal(other, before)


def test_embeddings(backend: Backend, dtype: torch.dtype) -> None:
    world, table = _World(backend, dtype), _randn(backend, dtype, VOCAB, WIDTH)
    wanted = [3, 5, 52, 3, 3, 40, 3, 3, 33, 0, 31, 49, 4]
    ids = torch.tensor(wanted, device=backend.device)
    packed = backend.pack_linear(table.clone())
    y = backend.embed(ids, packed, 2.0, table[:0])
    y = backend.adapter_embed_(y, ids, PLACES.embed, world.step)
    for i, (token, slot) in enumerate(zip(wanted, WORN, strict=True)):
        own = world.rows.get((slot, PLACES.embed, token))
        row = table[token] * 2 if own is None else own.to(backend.device)
        change, terms = np.zeros(WIDTH), np.zeros(WIDTH)
        for worn, weight in _mix_of(i) if token < VOCAB else ():
            for a, b in world.factors.get((worn, TableSite.EMBED), ()):
                change += weight * exact(b)[:, token] @ exact(a)
                terms += np.abs(weight * exact(b)[:, token]) @ np.abs(exact(a))
        if terms.any():
            assert_near(y[i], exact(row) + change, terms)
        else:
            assert torch.equal(y[i], row)


def test_heads(backend: Backend, dtype: torch.dtype) -> None:
    """Rows of one adapter beside each other and apart, of one with a change alone, of both in a mix, and of nobody."""
    world, x = _World(backend, dtype), _randn(backend, dtype, 8, WIDTH)
    mixes: tuple[Mix, ...] = (((0, 1.0),), (), ((2, 1.0),), ((0, 1.0),), ((1, 1.0),), ((1, 0.5), (2, -2.0)), ())
    counts = (1, 1, 2, 1, 1, 1, 1)
    logits = torch.full((8, VOCAB + 3), 7.0, device=backend.device)
    backend.adapter_head_(logits, x, PLACES.head, world.worn(mixes, counts, len(mixes)))
    row_mixes = [mix for mix, count in zip(mixes, counts, strict=True) for _ in range(count)]
    within = 2e-6 if dtype == torch.float32 else 5e-3
    for i, mix in enumerate(row_mixes):
        wanted, terms = np.full(VOCAB + 3, 7.0), np.zeros(VOCAB + 3)
        for token in range(VOCAB + 3):
            own = world.rows.get((mix[0][0], PLACES.head, token)) if len(mix) == 1 else None
            if own is not None:
                wanted[token] = exact(own) @ exact(x[i])
                terms[token] = np.abs(exact(own) * exact(x[i])).sum()
        for slot, weight in mix:
            for a, b in world.factors.get((slot, TableSite.HEAD), ()):
                u = rounded(exact(a) @ exact(x[i]), dtype)
                wanted[:VOCAB] += weight * u @ exact(b)
                terms[:VOCAB] += np.abs(weight * u) @ np.abs(exact(b))
        assert (np.abs(exact(logits[i]) - wanted) <= within * terms).all(), mix
    nobody = torch.full_like(logits, 7.0)
    backend.adapter_head_(nobody, x, PLACES.head, world.worn(((),), (8,), 1))
    assert (nobody == 7.0).all()


def test_a_row_of_logits_does_not_depend_on_others(backend: Backend, dtype: torch.dtype) -> None:
    world, x = _World(backend, dtype), _randn(backend, dtype, 70, WIDTH)
    mix: Mix = ((2, 1.0),)
    logits = torch.zeros(70, VOCAB, device=backend.device)
    backend.adapter_head_(logits, x, PLACES.head, world.worn((mix,), (70,), 1))
    for i in (0, 5, 63, 64, 69):
        alone = torch.zeros(1, VOCAB, device=backend.device)
        backend.adapter_head_(alone, x[i : i + 1], PLACES.head, world.worn((mix,), (1,), 1))
        if backend.name == "reference":
            assert torch.allclose(alone[0], logits[i], atol=1e-2)
        else:
            assert torch.equal(alone[0], logits[i])


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_of_heads(backend: Backend, dtype: torch.dtype, offset: float) -> None:
    """With an angle of 0, queries and stored keys are as they are normed."""
    world, tokens = _World(backend, dtype), len(WORN)
    params = AttentionParams(4, 2, DIM, 1.0, None, None)
    planes = torch.zeros(2, 2, 2, BLOCK_SIZE, DIM, dtype=dtype, device=backend.device)
    layer = KVLayer(planes[:, 0], planes[:, 1], 0)
    norms = [_randn(backend, dtype, DIM, seed=seed) for seed in (3, 4)]
    qkv = _randn(backend, dtype, tokens, 8 * DIM) * 3
    index = torch.arange(tokens, device=backend.device)
    cos = torch.ones(tokens, DIM, device=backend.device)
    norm = QKNorm(norms[0], norms[1], 1e-5, offset, QUERY)
    q = backend.rope_store_kv(qkv, cos, torch.zeros_like(cos), layer, index, params, norm, world.step)
    keys, _ = read_tokens(backend, layer, index // BLOCK_SIZE, index % BLOCK_SIZE)
    heads = exact(qkv).reshape(tokens, 8, DIM)
    normed = heads / np.sqrt(np.mean(heads**2, -1, keepdims=True) + 1e-5)
    for i in range(tokens):
        for place, found, base, x in ((QUERY, q[i], norms[0], normed[i, :4]), (KEY, keys[i], norms[1], normed[i, 4:6])):
            w = exact(world.rows.get((WORN[i], place, 0), base))
            assert_near(found, w * rounded(x, dtype) if offset == 0.0 else x * (1.0 + w), ulps=3.0)
