"""Which adapters are on the device: their slots, pages and rows of the tile table. The one writer of all three.

Used by the engine thread alone, between steps. Adapters are known by the digest of their version.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.adapters.pages import PagePool
from loraplex.adapters.tiles import AdapterImage, BaseLayout
from loraplex.kernels.metadata import ALIGN, NUM_SITES, TileTable

OWNER = "adapter"
"""Our name in the page pool."""

_FIRST_ROWS = 1024
"""Rows of a new tile table: 16 KiB, a handful of adapters on every linear; it doubles as needed."""


@dataclass
class _Resident:
    """An adapter on the device."""

    slot: int
    pages: list[int]
    rows: slice  # of the tile table
    pins: int = 0
    doomed: bool = False  # to be dropped at the last unpin


class Residency:
    """Loads, pins and evicts adapters. Never evicts on its own: who needs room decides (evict_idle, evict_one)."""

    def __init__(self, arena: Tensor, pool: PagePool, layout: BaseLayout, num_slots: int = 256) -> None:
        """arena [num_pages, page_bytes] uint8, contiguous; `pool` hands out its pages, also to others."""
        num_pages, page_bytes = arena.shape
        if page_bytes != layout.page_bytes or num_pages != pool.num_pages:
            raise ValueError(
                f"the arena has {num_pages} pages of {page_bytes} bytes; expected {pool.num_pages} of "
                f"{layout.page_bytes}, as the pool and the layout say"
            )
        if num_pages * page_bytes // ALIGN > torch.iinfo(torch.int32).max:
            raise ValueError(f"the arena has {num_pages * page_bytes} bytes; tile offsets reach {ALIGN} * 2**31")
        self._arena = arena
        self._pool = pool
        self._layout = layout
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._tiles = _TileRows(num_slots, layout, arena.device)
        self.loads = 0
        self.evictions = 0
        self.bytes_loaded = 0

    @property
    def table(self) -> TileTable:
        """The tile table as it is now. Its tensors change in place between steps; growth replaces it."""
        return self._tiles.table

    @property
    def num_free_slots(self) -> int:
        """Adapters that fit beside those loaded, as far as slots go."""
        return len(self._free_slots)

    @property
    def idle_pages(self) -> int:
        """Pages evict_idle could free now."""
        return sum(len(resident.pages) for resident in self._residents.values() if not resident.pins)

    def is_resident(self, digest: str) -> bool:
        """Whether the adapter is on the device."""
        return digest in self._residents

    def slot_of(self, digest: str) -> int | None:
        """The adapter's slot; None when it is not on the device."""
        resident = self._residents.get(digest)
        return None if resident is None else resident.slot

    def loaded(self) -> tuple[str, ...]:
        """Digests of all adapters on the device, least recently used first."""
        return tuple(self._residents)

    def pages_needed(self, image: AdapterImage) -> int:
        """Pages `load` will take for `image`."""
        return image.pages.shape[0]

    def load(self, digest: str, image: AdapterImage) -> bool:
        """Copy `image` to the device, unpinned. False, and nothing changed, when no slot or too few pages are free.

        An adapter that is there already stays, most recently used now, and is not dropped at its last unpin.
        """
        if digest in self._residents:
            self._residents[digest].doomed = False
            self._residents.move_to_end(digest)
            return True
        if image.pages.shape[1:] != (self._layout.page_bytes,):
            raise ValueError(f"{digest}: packed into pages of {image.pages.shape[1]} bytes, not of this base's layout")
        if not self._free_slots:
            return False
        pages = self._pool.alloc(self.pages_needed(image), OWNER)
        if pages is None:
            return False
        left = image.extent
        for source, page in zip(image.pages, pages, strict=True):
            n = min(left, self._layout.page_bytes)  # the last page may be used in part
            self._arena[page, :n].copy_(source[:n])
            left -= n
        slot = self._free_slots.pop()
        self._residents[digest] = _Resident(slot, pages, self._tiles.write(slot, image, pages))
        self.loads += 1
        self.bytes_loaded += image.extent
        return True

    def pin(self, digest: str) -> None:
        """Keep the adapter on the device until as many unpins. Raises KeyError when it is not there."""
        self._residents[digest].pins += 1
        self._residents.move_to_end(digest)

    def unpin(self, digest: str) -> None:
        """Undo one pin; the last one drops the adapter if that was asked for. Raises ValueError when not pinned."""
        resident = self._residents[digest]
        if resident.pins == 0:
            raise ValueError(f"{digest} is unpinned more often than it was pinned")
        resident.pins -= 1
        self._residents.move_to_end(digest)
        if resident.doomed and not resident.pins:
            self._remove(digest)

    def evict_idle(self, pages: int) -> int:
        """Evict unpinned adapters, least recently used first, until `pages` are freed. Returns how many were."""
        freed = 0
        for digest, resident in list(self._residents.items()):
            if freed >= pages:
                break
            if not resident.pins:
                freed += len(resident.pages)
                self._evict(digest)
        return freed

    def evict_one(self) -> bool:
        """Evict the least recently used unpinned adapter, for its slot. False when all are pinned."""
        for digest, resident in self._residents.items():
            if not resident.pins:
                self._evict(digest)
                return True
        return False

    def drop(self, digest: str) -> None:
        """Remove the adapter if it is there: at once, or at its last unpin while it is pinned."""
        resident = self._residents.get(digest)
        if resident is None:
            return
        if resident.pins:
            resident.doomed = True
        else:
            self._remove(digest)

    def check_integrity(self) -> None:
        """Raises AssertionError unless slots, pages, rows and tiles have one owner each and all counts agree."""
        residents = self._residents.values()
        pages = [page for resident in residents for page in resident.pages]
        assert len(set(pages)) == len(pages), "a page belongs to two adapters"
        assert len(pages) == self._pool.used_by(OWNER), f"{len(pages)} pages held, pool: {self._pool.used_by(OWNER)}"
        slots = [resident.slot for resident in residents] + self._free_slots
        assert sorted(slots) == list(range(self.table.ranges_host.shape[0])), "a slot is lost or taken twice"
        self._tiles.check_integrity([(resident.slot, resident.rows, resident.pages) for resident in residents])

    def _evict(self, digest: str) -> None:
        self._remove(digest)
        self.evictions += 1

    def _remove(self, digest: str) -> None:
        resident = self._residents.pop(digest)
        self._pool.free(resident.pages)
        self._free_slots.append(resident.slot)
        self._tiles.clear(resident.slot, resident.rows)


class _TileRows:
    """The tile table and which of its rows are free."""

    def __init__(self, num_slots: int, layout: BaseLayout, device: torch.device) -> None:
        self._shape = (layout.num_layers, NUM_SITES, 2)  # of one slot's ranges
        self._page_units = layout.page_bytes // ALIGN
        self._free = [(0, _FIRST_ROWS)]  # spans (first, past the last), ascending, never touching
        ranges_host = torch.zeros(num_slots, *self._shape, dtype=torch.int32)
        tiles_host = torch.zeros(_FIRST_ROWS, 5, dtype=torch.int32)
        # On CPU .to() returns the tensor itself: table and mirror are one.
        self.table = TileTable(ranges_host.to(device), tiles_host.to(device), ranges_host, tiles_host)

    def write(self, slot: int, image: AdapterImage, pages: list[int]) -> slice:
        """Write the image's tiles with their offsets in `pages`, and `slot`'s ranges. Returns the rows taken."""
        num_rows = image.tiles.shape[0]
        first = self._take(num_rows)
        units = torch.tensor(pages, dtype=torch.int32) * self._page_units
        tiles = image.tiles[:, 2:].clone()
        for offset in (tiles[:, 0], tiles[:, 1]):  # A's and B's: within the image; -1 where there is no A
            real = offset >= 0
            offset[real] = units[offset[real] // self._page_units] + offset[real] % self._page_units
        keys = image.tiles[:, 0].long() * NUM_SITES + image.tiles[:, 1]
        counts = torch.bincount(keys, minlength=self._shape[0] * NUM_SITES)
        ends = first + counts.cumsum(0)
        ranges = torch.stack((ends - counts, ends), -1) * (counts > 0).unsqueeze(-1)
        rows = slice(first, first + num_rows)
        self.table.tiles_host[rows] = tiles
        self.table.ranges_host[slot] = ranges.view(self._shape)
        self._publish(slot, rows)
        return rows

    def clear(self, slot: int, rows: slice) -> None:
        """Forget `slot` and give its rows back."""
        self._give(rows.start, rows.stop)
        self.table.ranges_host[slot] = 0
        self._publish(slot, slice(0, 0))

    def check_integrity(self, residents: list[tuple[int, slice, list[int]]]) -> None:
        """Against (slot, rows, pages) of every adapter there is."""
        table = self.table
        spans = sorted(self._free + [(rows.start, rows.stop) for _, rows, _ in residents if rows.start < rows.stop])
        starts = [first for first, _ in spans] + [table.tiles_host.shape[0]]
        ends = [0] + [last for _, last in spans]
        assert starts == ends, f"rows of the tile table overlap or are lost: {spans}"
        empty = torch.ones(table.ranges_host.shape[0], dtype=torch.bool)
        empty[[slot for slot, _, _ in residents]] = False
        assert not table.ranges_host[empty].any(), "a slot without an adapter has tiles"
        assert torch.equal(table.ranges.cpu(), table.ranges_host), "the device's ranges differ from the host's"
        for slot, rows, pages in residents:
            row = rows.start
            ranges = table.ranges_host[slot].view(-1, 2)
            for first, last in ranges[ranges[:, 1] > 0].tolist():  # by layer and site: one after the other
                assert first == row < last, f"slot {slot}: rows {first} to {last} do not follow row {row}"
                row = last
            assert row == rows.stop, f"slot {slot}: {rows.stop - row} tiles are in no range"
            tiles = table.tiles_host[rows]
            assert torch.equal(table.tiles[rows].cpu(), tiles), "the device's tiles differ from the host's"
            touched = set((tiles[:, :2][tiles[:, :2] >= 0] // self._page_units).tolist())
            assert touched == set(pages), f"slot {slot}: tiles lie in pages {touched}; its own are {pages}"

    def _publish(self, slot: int, rows: slice) -> None:
        """Bring the device's copy up to date."""
        table = self.table
        if table.ranges is not table.ranges_host:
            table.tiles[rows] = table.tiles_host[rows].to(table.tiles.device)
            table.ranges[slot] = table.ranges_host[slot].to(table.ranges.device)

    def _take(self, n: int) -> int:
        """First of `n` consecutive rows, from the first free span that is long enough; the table grows if none is."""
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
        """Twice the rows, in new tensors: a step under way keeps the old ones."""
        old = self.table
        capacity = old.tiles_host.shape[0]
        tiles_host = torch.cat((old.tiles_host, torch.zeros_like(old.tiles_host)))
        self.table = TileTable(old.ranges, tiles_host.to(old.tiles.device), old.ranges_host, tiles_host)
        self._give(capacity, 2 * capacity)
