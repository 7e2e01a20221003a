"""Rows of the tile table: which are free, and where an adapter's tiles stand. DeviceTier alone changes them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex.adapters.image.tiles import AdapterImage, BaseLayout, table_layer
from loraplex.kernels.constants import ALIGN, TILE_COLUMNS, Own, TableSite
from loraplex.kernels.records import OwnPlaces, OwnTable, TileTable

FIRST_ROWS = 1024
"""Rows of a new tile table: 32 KiB, a handful of adapters on every linear; it doubles as needed."""


class TileRows:
    """The tile table and which of its rows are free."""

    def __init__(self, num_slots: int, layout: BaseLayout, device: torch.device) -> None:
        self._shape = (table_layer(layout.num_layers) + 1, layout.num_sites, 2)  # of one slot's ranges
        self._page_units = layout.page_bytes // ALIGN
        self._free = [(0, FIRST_ROWS)]  # spans (first, past the last), ascending, never touching
        self._num_slots = num_slots
        ranges_host = torch.zeros(2 * num_slots, *self._shape, dtype=torch.int32)
        tiles_host = torch.zeros(FIRST_ROWS, TILE_COLUMNS, dtype=torch.int32)
        self._places = OwnPlaces(layout.num_layers)
        self._wearers: dict[int, int] = {}
        self._twofold: set[int] = set()  # slots whose adapter has a second unit
        own_host = torch.zeros(2 * num_slots, self._places.count, 2, dtype=torch.int32)
        # On CPU .to() returns the tensor itself: table and mirror are one.
        own = OwnTable(own_host.to(device), own_host, self._wearers)
        self.table = TileTable(ranges_host.to(device), tiles_host.to(device), ranges_host, tiles_host, own)

    def write(self, slot: int, image: AdapterImage, pages: list[int]) -> slice:
        """Write the image's tiles with their offsets in `pages`, and `slot`'s ranges. Returns the rows taken."""
        image_tiles = image.tiles.numpy()  # numpy: its calls take 1 us, torch's 5, and there are a dozen
        num_rows = image_tiles.shape[0]
        first = self._take(num_rows)
        units = np.array(pages, dtype=np.int32) * self._page_units
        rows = slice(first, first + num_rows)
        tiles = self.table.tiles_host.numpy()[rows]
        tiles[:] = image_tiles[:, 2:]
        for column in (0, 1):  # A's and B's offsets: within the image; -1 where there is none
            offset = tiles[:, column]
            page, within = np.divmod(offset, self._page_units)
            np.copyto(offset, units[page] + within, where=offset >= 0)
        num_layers, num_sites, _ = self._shape
        linears = int(np.searchsorted(image_tiles[:, 0], num_layers))  # what is left are rows of its own
        layers, sites = image_tiles[:linears, 0], image_tiles[:linears, 1]
        ranges = self.table.ranges_host.numpy()
        if linears and sites.max() >= num_sites:
            self._twofold.add(slot)
            units = np.zeros((num_layers, 2, num_sites, 2), dtype=np.int32)
            _write_ranges(units, layers * (2 * num_sites) + sites, first)
            ranges[slot], ranges[slot + self._num_slots] = units[:, 0], units[:, 1]
        else:
            _write_ranges(ranges[slot], layers * num_sites + sites, first)
        places = image_tiles[linears:, 1]
        if linears < num_rows:
            _write_ranges(self._own.ranges_host.numpy()[slot], places, first + linears)
        tables = image_tiles[:linears, 1][image_tiles[:linears, 0] == num_layers - 1]
        if places.size or tables.size:
            self._wearers[slot] = self._worn(places, tables)
        self._publish(slot, rows)
        return rows

    def clear(self, slot: int, rows: slice) -> None:
        """Forget `slot` and give its rows back."""
        self._give(rows.start, rows.stop)
        self.table.ranges_host[slot] = 0
        if slot in self._twofold:
            self.table.ranges_host[slot + self._num_slots] = 0
        if self._wearers.pop(slot, 0):
            self._own.ranges_host[slot] = 0
        self._publish(slot, slice(0, 0))
        self._twofold.discard(slot)

    def check_integrity(self, residents: list[tuple[int, slice, list[int]]]) -> None:
        """Hold the table against (slot, rows, pages) of every adapter there is. Raises AssertionError."""
        table = self.table
        spans = sorted(self._free + [(rows.start, rows.stop) for _, rows, _ in residents if rows.start < rows.stop])
        starts = [first for first, _ in spans] + [table.tiles_host.shape[0]]
        ends = [0] + [last for _, last in spans]
        assert starts == ends, f"rows of the tile table overlap or are lost: {spans}"
        empty = torch.ones(table.ranges_host.shape[0], dtype=torch.bool)
        empty[[slot for slot, _, _ in residents]] = False
        empty[[slot + self._num_slots for slot in self._twofold]] = False
        assert not table.ranges_host[empty].any(), "a slot without an adapter has tiles"
        assert not self._own.ranges_host[empty].any(), "a slot without an adapter has rows of its own"
        assert torch.equal(table.ranges.cpu(), table.ranges_host), "the device's ranges differ from the host's"
        assert torch.equal(self._own.ranges.cpu(), self._own.ranges_host), "the device's own ranges differ"
        for slot, rows, pages in residents:
            row = rows.start
            own = self._own.ranges_host[slot]
            outside = bool(own.any() or table.ranges_host[slot, -1].any())
            assert outside == (slot in self._wearers), f"slot {slot}: what it has outside the linears is not known"
            units = torch.stack((table.ranges_host[slot], table.ranges_host[slot + self._num_slots]), 1)
            ranges = torch.cat((units.view(-1, 2), own))
            for first, last in ranges[ranges[:, 1] > 0].tolist():  # by layer and site: one after the other
                assert first == row < last, f"slot {slot}: rows {first} to {last} do not follow row {row}"
                row = last
            assert row == rows.stop, f"slot {slot}: {rows.stop - row} tiles are in no range"
            tiles = table.tiles_host[rows]
            assert torch.equal(table.tiles[rows].cpu(), tiles), "the device's tiles differ from the host's"
            touched = set((tiles[:, :2][tiles[:, :2] >= 0] // self._page_units).tolist())
            whole = set(pages) if rows.start < rows.stop else set()  # what stands in front of a prompt has no tiles
            assert touched == whole, f"slot {slot}: tiles lie in pages {touched}; its own are {pages}"

    @property
    def _own(self) -> OwnTable:
        assert self.table.own is not None, "it was made with one"
        return self.table.own

    def _worn(self, places: NDArray[np.int32], tables: NDArray[np.int32]) -> int:
        """Return the bits of Own for rows at `places` and tiles at the sites `tables` of the tables."""
        worn = Own.NORM if (places <= self._places.last_norm).any() else 0
        worn |= Own.EMBED if (places == self._places.embed).any() or (tables == TableSite.EMBED).any() else 0
        worn |= Own.INPUT if (places > self._places.head).any() else 0
        return int(worn | (Own.HEAD if (places == self._places.head).any() or (tables == TableSite.HEAD).any() else 0))

    def _publish(self, slot: int, rows: slice) -> None:
        """Bring the device's copy up to date."""
        table = self.table
        if table.ranges is not table.ranges_host:
            table.tiles[rows] = table.tiles_host[rows].to(table.tiles.device)
            for row in (slot, slot + self._num_slots)[: 1 + (slot in self._twofold)]:
                table.ranges[row] = table.ranges_host[row].to(table.ranges.device)
            self._own.ranges[slot] = self._own.ranges_host[slot].to(table.ranges.device)

    def _take(self, n: int) -> int:
        """Take `n` rows in a row from the first free span that is long enough; the table grows if none is."""
        if n == 0:
            return 0
        while True:
            for i, (first, last) in enumerate(self._free):
                if last - first >= n:
                    self._free[i : i + 1] = [(first + n, last)] if first + n < last else []
                    return first
            self._grow()

    def _give(self, first: int, last: int) -> None:
        spans: list[tuple[int, int]] = []
        for begin, end in sorted([*self._free, (first, last)]):
            if spans and spans[-1][1] == begin:
                spans[-1] = (spans[-1][0], end)
            elif begin < end:
                spans.append((begin, end))
        self._free = spans

    def _grow(self) -> None:
        """Double the rows, in new tensors: a step under way keeps the old ones."""
        old = self.table
        capacity = old.tiles_host.shape[0]
        tiles_host = torch.cat((old.tiles_host, torch.zeros_like(old.tiles_host)))
        self.table = TileTable(old.ranges, tiles_host.to(old.tiles.device), old.ranges_host, tiles_host, old.own)
        self._give(capacity, 2 * capacity)


def _write_ranges(ranges: NDArray[np.int32], keys: NDArray[np.int32], first: int) -> None:
    """Write to ranges [..., 2] where the rows of each key are that begin at `first`; keys are ascending."""
    flat = ranges.reshape(-1, 2)
    counts = np.bincount(keys, minlength=len(flat))
    ends = first + counts.cumsum()
    flat[:, 0] = np.where(counts > 0, ends - counts, 0)
    flat[:, 1] = np.where(counts > 0, ends, 0)
