"""adapter_norm_, adapter_embed_, adapter_head_: adapters' own rows, against fp64, in an arena that is NaN elsewhere."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from loraplex.kernels.constants import ALIGN, Own, TileKind
from loraplex.kernels.ops import Backend
from loraplex.kernels.records import AdapterSegments, AdapterStep, OwnPlaces, OwnTable, TileTable
from tests.support.rounding import assert_near, exact, rounded

PLACES = OwnPlaces(2)
NORM = PLACES.norm(1, 2)
WIDTH, VOCAB = 96, 50
MIXES: tuple[tuple[tuple[int, float], ...], ...] = (((0, 1.0),), ((1, 1.0),), (), ((0, 0.5), (2, 0.5)), ((2, 1.0),))
COUNTS = (3, 1, 2, 2, 3)
WORN = [0, 0, 0, 1, -1, -1, -1, -1, 2, 2, 2, -1, -1]  # slot of each token; two base rows at the end
IDS = {0: [(3, 2), (40, 1), (48, 5)], 2: [(0, 16), (16, 16), (32, 1)]}  # by slot: (first, count) of runs of rows


class _World:
    """Slots 0 and 2 have a norm, rows of the embedding and of the head; slot 1 has nothing."""

    def __init__(self, backend: Backend, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(7)
        self.rows: dict[tuple[int, int, int], Tensor] = {}  # (slot, place, number) -> the row as it is stored
        strips: list[Tensor] = [torch.full((ALIGN,), 0xFF, dtype=torch.uint8)]
        tiles: list[list[int]] = [[2**31 - 1] * 8]  # nobody's: reading it would crash
        ranges = torch.zeros(3, PLACES.count, 2, dtype=torch.int32)
        for slot, runs in IDS.items():
            for place in (NORM, PLACES.embed, PLACES.head):
                first = len(tiles)
                for start, count in [(0, 1)] if place == NORM else runs:
                    kept = torch.float32 if place == NORM else dtype
                    values = torch.randn(count, WIDTH, generator=generator).to(kept)
                    self.rows |= {(slot, place, start + i): row for i, row in enumerate(values)}
                    at = sum(strip.numel() for strip in strips) // ALIGN
                    tiles.append([at, -1, count, start, count, TileKind.OWN, 0, WIDTH])
                    flat = values.view(torch.uint8).flatten()
                    gap = torch.full((-flat.numel() % ALIGN + ALIGN,), 0xFF, dtype=torch.uint8)
                    strips += [flat, gap]
                ranges[slot, place] = torch.tensor([first, len(tiles)])
        arena = torch.cat(strips)
        arena = torch.cat((arena, arena.new_full((-len(arena) % 4096,), 0xFF))).view(-1, 4096).to(backend.device)
        table = torch.tensor(tiles, dtype=torch.int32)
        nothing = torch.zeros(3, 2, 4, 2, dtype=torch.int32)
        own = OwnTable(ranges.to(backend.device), ranges, dict.fromkeys(IDS, Own.NORM | Own.EMBED | Own.HEAD))
        device = backend.device
        self.table = TileTable(nothing.to(device), table.to(device), nothing, table, own)
        self.step = AdapterStep(arena, self.table, _segments(device))


def _segments(device: torch.device) -> AdapterSegments:
    bounds = tuple(accumulate(COUNTS, initial=0))
    members = [member for mix in MIXES for member in mix]
    return AdapterSegments(
        indptr=torch.tensor(bounds, dtype=torch.int32, device=device),
        mix_ptr=torch.tensor(list(accumulate(map(len, MIXES), initial=0)), dtype=torch.int32, device=device),
        mix_slot=torch.tensor([slot for slot, _ in members], dtype=torch.int32, device=device),
        mix_weight=torch.tensor([weight for _, weight in members], device=device),
        bounds=bounds,
        mixes=MIXES,
        num_decode_segments=2,
    )


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
        assert torch.equal(y[i], table[token] * 2 if own is None else own.to(backend.device))


def test_heads(backend: Backend, dtype: torch.dtype) -> None:
    world, x = _World(backend, dtype), _randn(backend, dtype, 5, WIDTH)
    slots = [0, -1, 2, 0, 1]
    logits = torch.full((5, VOCAB + 3), 7.0, device=backend.device)
    taken = torch.tensor(slots, dtype=torch.int32)
    backend.adapter_head_(logits, x, taken, PLACES.head, world.step.arena, world.table)
    for i, slot in enumerate(slots):
        for token in range(VOCAB + 3):
            own = world.rows.get((slot, PLACES.head, token))
            if own is None:
                assert logits[i, token] == 7.0
            else:
                product = exact(own) * exact(x[i])
                within = np.abs(product).sum() * (2e-6 if dtype == torch.float32 else 5e-3)
                assert abs(float(logits[i, token]) - product.sum()) <= within
    nobody = torch.full_like(logits, 7.0)
    backend.adapter_head_(
        nobody, x, torch.tensor([-1] * 5, dtype=torch.int32), PLACES.head, world.step.arena, world.table
    )
    assert (nobody == 7.0).all()
