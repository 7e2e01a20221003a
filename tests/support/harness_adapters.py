"""Random adapters written into a harness's arena tile by tile, apart from the code that packs adapters.

tiles = write_adapters(harness, slots=2)
harness.step([(a, 5), (b, 1)], adapters=wearing([(5, ((0, 1.0),)), (1, ((1, 0.5),))]), tiles=tiles)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from loraplex.kernels.constants import TILE_RANKS, Own, TileKind
from loraplex.kernels.records import AdapterSegments, OwnPlaces, OwnTable, TileTable
from loraplex.server.models.config import Site
from tests.support.harness import Harness

Mix = tuple[tuple[int, float], ...]


def write_adapters(harness: Harness, slots: int) -> TileTable:
    """Tiles on the whole of every qkv and down site: one in slot 0, two in slot 1, and so on."""
    config, dtype = harness.config, harness.weights.dtype
    generator = torch.Generator().manual_seed(5)
    ranges = torch.zeros(slots, config.num_layers + 1, config.num_sites, 2, dtype=torch.int32)
    rows: list[list[int]] = []
    for slot in range(slots):
        for layer in range(config.num_layers):
            for site in (Site.QKV, Site.DOWN):
                parts = [p for p in config.projections() if p.site == site]
                n_in, n_out = parts[0].in_features, sum(p.out_features for p in parts)
                first = len(rows)
                for _ in range(slot + 1):
                    at = []
                    for width in (n_in, n_out):
                        page = harness.take_pages(1)[0]
                        matrix = torch.randn(TILE_RANKS, width, generator=generator).mul_(0.1).to(dtype)
                        raw = matrix.view(torch.uint8).flatten()
                        harness.arena[page, : raw.numel()] = raw
                        at.append(page * harness.page_bytes // 64)
                    rows.append([*at, TILE_RANKS, 0, n_out, TileKind.LOW_RANK, 0, n_in])
                ranges[slot, layer, site] = torch.tensor([first, len(rows)])
    tiles = torch.tensor(rows, dtype=torch.int32)
    return TileTable(ranges, tiles, ranges, tiles)


def write_own_rows(harness: Harness, table: TileTable, slot: int, ids: Sequence[int]) -> TileTable:
    """`table`, in which `slot` has a norm of layer 0, the last norm, and rows of both tables for `ids` of its own.

    It turns the input of the second linear of layer 0, k_proj, by one block of 8 for all inputs.
    """
    config, generator = harness.config, torch.Generator().manual_seed(6)
    places = OwnPlaces(config.num_layers)
    ranges = torch.zeros(table.ranges_host.shape[0], places.count, 2, dtype=torch.int32)
    rows: list[list[int]] = table.tiles_host.tolist()
    for place in (places.norm(0, 2), places.last_norm, places.embed, places.head):
        is_norm, first = place <= places.last_norm, len(rows)
        for number in [0] if is_norm else sorted(ids):
            row = torch.randn(config.hidden_size, generator=generator).to(
                torch.float32 if is_norm else harness.weights.dtype
            )
            page, raw = harness.take_pages(1)[0], row.view(torch.uint8)
            harness.arena[page, : raw.numel()] = raw
            at = page * harness.page_bytes // 64
            rows.append([at, -1, 1, number, 1, TileKind.OWN, 0, config.hidden_size])
        ranges[slot, place] = torch.tensor([first, len(rows)])
    block = torch.randn(8, 8, generator=generator).mul_(0.3).to(harness.weights.dtype)
    page, raw = harness.take_pages(1)[0], block.view(torch.uint8).flatten()
    harness.arena[page, : raw.numel()] = raw
    ranges[slot, places.input(0, 1)] = torch.tensor([len(rows), len(rows) + 1])
    rows.append([page * harness.page_bytes // 64, -1, 8, 0, config.hidden_size // 8, TileKind.TURN, 0, 8])
    tiles = torch.tensor(rows, dtype=torch.int32)
    own = OwnTable(ranges, ranges, {slot: Own.NORM | Own.EMBED | Own.HEAD | Own.INPUT})
    return replace(table, tiles=tiles, tiles_host=tiles, own=own)


def wearing(segments: Sequence[tuple[int, Mix]], num_decode: int = 0) -> AdapterSegments:
    """Segments of (tokens, mix) from the step's first token on; the first `num_decode` of them are decode rows."""
    bounds = tuple(accumulate((tokens for tokens, _ in segments), initial=0))
    mixes = tuple(mix for _, mix in segments)
    return AdapterSegments(
        indptr=torch.tensor(bounds, dtype=torch.int32),
        mix_ptr=torch.tensor(list(accumulate(map(len, mixes), initial=0)), dtype=torch.int32),
        mix_slot=torch.tensor([slot for mix in mixes for slot, _ in mix], dtype=torch.int32),
        mix_weight=torch.tensor([weight for mix in mixes for _, weight in mix]),
        bounds=bounds,
        mixes=mixes,
        num_decode_segments=num_decode,
    )
