"""Which adapters are on the device: their slots, pages and rows of the tile table (tile_rows.py).

An adapter comes in slices: begin() takes slot and pages, advance() copies some bytes, and with the last byte its tiles
enter the table. Until then its slot's ranges are empty, so what computes with it adds nothing. What nobody pins is idle
and the Reclaimer's to evict. Used by the engine thread alone, between steps. Adapters are known by the digest of their
version.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loraplex.adapters.image.tile_rows import TileRows
from loraplex.adapters.image.tiles import AdapterImage, BaseLayout
from loraplex.adapters.tiers.arena_pages import ArenaPages
from loraplex.adapters.tiers.copying import CopyQueue, Resident
from loraplex.adapters.tiers.eviction import Frequency, Reclaimer
from loraplex.adapters.tiers.pages import PagePool
from loraplex.kernels.constants import ALIGN
from loraplex.kernels.records import TileTable

OWNER = "adapter"
"""Our name in the page pool and at the Reclaimer."""


class DeviceTier:
    """Copies adapters to the device and keeps them there while somebody pins them, and for as long as there is room."""

    def __init__(
        self,
        arena: Tensor,
        pool: PagePool,
        layout: BaseLayout,
        num_slots: int = 256,
        reclaimer: Reclaimer | None = None,
    ) -> None:
        """arena [num_pages, page_bytes] uint8, contiguous; `pool` hands out its pages, also to others.

        `reclaimer` evicts idle adapters, and other owners' things; None: one for these adapters alone.
        """
        num_pages, page_bytes = arena.shape
        if page_bytes != layout.page_bytes or num_pages != pool.num_pages:
            raise ValueError(
                f"the arena has {num_pages} pages of {page_bytes} bytes; expected {pool.num_pages} of "
                f"{layout.page_bytes}, as the pool and the layout say"
            )
        if num_pages * page_bytes // ALIGN > torch.iinfo(torch.int32).max:
            raise ValueError(f"the arena has {num_pages * page_bytes} bytes; tile offsets reach {ALIGN} * 2**31")
        self.on_evict: Callable[[str], None] = lambda digest: None
        """Called with what is about to be evicted, while it can still be read back."""
        self.reclaimer = reclaimer or Reclaimer()
        self.evictions = 0
        self._memory = ArenaPages(arena)
        self.copies = CopyQueue(self._memory, self._complete)
        self._pool = pool
        self._layout = layout
        self._residents: dict[str, Resident] = {}
        self._forever: set[str] = set()
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._tiles = TileRows(num_slots, layout, arena.device)
        self._idle = self.reclaimer.owner(OWNER, self._evict)
        self._frequency = Frequency()

    @property
    def table(self) -> TileTable:
        """Return the tile table as it is now. Its tensors change in place between steps; growth replaces it."""
        return self._tiles.table

    @property
    def layout(self) -> BaseLayout:
        """Return the layout that the adapters are for."""
        return self._layout

    @property
    def is_copying(self) -> bool:
        """Return whether any adapter still has bytes to be copied."""
        return bool(self.copies.waiting)

    def is_resident(self, digest: str) -> bool:
        """Return whether the adapter has its slot and pages; is_ready() says whether it can be used."""
        return digest in self._residents

    def is_ready(self, digest: str) -> bool:
        """Return whether the adapter is on the device with all its bytes."""
        resident = self._residents.get(digest)
        return resident is not None and resident.rows is not None

    def slot_of(self, digest: str, unit: int = 0) -> int | None:
        """The adapter's slot, or the row of TileTable.ranges of its second unit (1); None when it has none."""
        resident = self._residents.get(digest)
        return None if resident is None else resident.slot + unit * self._num_slots

    def pins(self, digest: str) -> int:
        """Count the adapter's pins. Raises KeyError when it is not there."""
        return self._residents[digest].pins

    def loaded(self) -> tuple[str, ...]:
        """List the digests of all adapters that have a slot."""
        return tuple(self._residents)

    def page_owners(self) -> tuple[str | None, ...]:
        """List the owner of each page of the pool, others' pages included."""
        return self._pool.owners()

    def held_pages(self) -> dict[str, list[int]]:
        """Map the digest of each adapter that has a slot to its pages."""
        return {digest: resident.pages for digest, resident in self._residents.items()}

    @property
    def pinned_forever(self) -> frozenset[str]:
        """Return the digests that the operator wants to stay."""
        return frozenset(self._forever)

    def pages_needed(self, image: AdapterImage) -> int:
        """Count the pages that begin() will take for `image`."""
        return image.pages.shape[0]

    # -- coming --------------------------------------------------------------------------------------------------------

    def begin(self, digest: str, image: AdapterImage, seconds: float = 0.0) -> bool:
        """Take slot and pages for `image`, unpinned; advance() copies it. False, nothing changed: there are not enough.

        An adapter that is there already stays, and is not dropped at its last unpin. `seconds`: what bringing the
        image to host memory took, 0 where it was there.
        """
        if digest in self._residents:
            self._residents[digest].doomed = False
            return True
        if image.pages.shape[1:] != (self._layout.page_bytes,):
            raise ValueError(f"{digest}: packed into pages of {image.pages.shape[1]} bytes, not of this base's layout")
        if not self._free_slots:
            return False
        pages = self._pool.alloc(self.pages_needed(image), OWNER)
        if pages is None:
            return False
        resident = self._residents[digest] = Resident(self._free_slots.pop(), pages, image, seconds)
        self.copies.waiting[digest] = resident
        self._reprice(digest)
        return True

    def advance(self, max_bytes: int | None = None) -> int:
        """Copy up to `max_bytes` of what has begun; None: all. Returns the bytes copied."""
        return self.copies.advance(max_bytes)

    def load(self, digest: str, image: AdapterImage) -> bool:
        """begin() and all the copying there is to do. False, and nothing changed: no slot, or too few pages."""
        if not self.begin(digest, image):
            return False
        self.advance()
        return True

    def host_bytes(self, digest: str) -> int:
        """Count the bytes of host memory that read_back() takes. Raises KeyError."""
        resident = self._residents[digest]
        return len(resident.pages) * self._layout.page_bytes + resident.image.tiles.nbytes

    def read_back(self, digest: str) -> AdapterImage:
        """Return the adapter as it was given to begin(), with its pages in new host memory. Raises KeyError."""
        resident = self._residents[digest]
        image = resident.image
        if resident.rows is None:
            return image
        pages = self._memory.read(resident.pages)
        return AdapterImage(pages=pages, tiles=image.tiles, nbytes=image.nbytes, extent=image.extent)

    def pages_of(self, slot: int) -> list[Tensor]:
        """Return the pages [page_bytes] uint8 of the adapter in `slot`, views of the arena. Raises KeyError."""
        for resident in self._residents.values():
            if resident.slot == slot:
                return self._memory.views(resident.pages)
        raise KeyError(slot)

    # -- staying and going ---------------------------------------------------------------------------------------------

    def pin(self, digest: str) -> None:
        """Keep the adapter on the device until as many unpins. Raises KeyError when it is not there."""
        self._residents[digest].pins += 1
        self._idle.remove(digest)

    def unpin(self, digest: str) -> None:
        """Undo one pin; the last one drops the adapter if that was asked for. Raises ValueError when not pinned."""
        resident = self._residents[digest]
        if resident.pins == 0:
            raise ValueError(f"{digest} is unpinned more often than it was pinned")
        resident.pins -= 1
        if resident.doomed and not resident.pins:
            self._remove(digest)
        else:
            self._reprice(digest)

    def pin_forever(self, digest: str) -> None:
        """Never evict the adapter, from now on or from when it comes. Dropping it is still possible."""
        self._forever.add(digest)
        self._idle.remove(digest)

    def may_pin_forever(self, digest: str, pages: int) -> bool:
        """Return whether one more of so many pages leaves half of the pages, and a slot, for what comes and goes."""
        pinned = self._forever - {digest}
        held = sum(len(self._residents[other].pages) for other in pinned if other in self._residents)
        return (
            len(pinned) + 1 < len(self._free_slots) + len(self._residents) and held + pages <= self._pool.num_pages / 2
        )

    def unpin_forever(self, digest: str) -> None:
        """Let the adapter be evicted again when it is idle."""
        self._forever.discard(digest)
        self._reprice(digest)

    def count_use(self, digest: str, uses: int = 1) -> None:
        """Count so many requests for the adapter, there or not; what is often wanted is kept longer."""
        self._frequency.count(digest, uses)
        self._reprice(digest)

    def make_room(self, pages: int) -> bool:
        """Have so many pages free, by evicting what is idle. False, with less evicted than could be: there are not."""
        short = pages - self._pool.num_free
        if short > self.reclaimer.idle_pages:
            return False
        if short > 0:
            self.reclaimer.reclaim(short)
        return self._pool.num_free >= pages

    def evict_one(self) -> bool:
        """Evict the cheapest idle adapter, for its slot. False when none is idle."""
        if not self._idle:
            return False
        self._idle.evict_first()
        return True

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
        """Raise AssertionError unless slots, pages, rows and tiles have one owner each and all counts agree."""
        residents = self._residents.values()
        pages = [page for resident in residents for page in resident.pages]
        assert len(set(pages)) == len(pages), "a page belongs to two adapters"
        assert len(pages) == self._pool.used_by(OWNER), f"{len(pages)} pages held, pool: {self._pool.used_by(OWNER)}"
        slots = [resident.slot for resident in residents] + self._free_slots
        assert sorted(slots) == list(range(self._num_slots)), "a slot is lost or taken twice"
        ready = [(r.slot, r.rows, r.pages) for r in residents if r.rows is not None]
        self._tiles.check_integrity(ready)
        copying = {digest for digest, resident in self._residents.items() if resident.rows is None}
        assert copying == set(self.copies.waiting), "an adapter is neither ready nor being copied"
        for digest, resident in self._residents.items():
            idle = not resident.pins and digest not in self._forever
            assert (digest in self._idle) == idle, f"{digest} has {resident.pins} pins and its eviction is wrongly set"
            assert resident.pins or not resident.doomed, f"{digest} is to be dropped and nobody holds it"
        assert len(self._idle) <= len(self._residents), "an adapter that is gone can be evicted"

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _complete(self, resident: Resident) -> None:
        """Enter the tiles of an adapter whose bytes are all there into the table, and let the host's bytes go."""
        image = resident.image
        resident.rows = self._tiles.write(resident.slot, image, resident.pages)
        resident.image = AdapterImage(image.pages.new_empty(0, 0), image.tiles, image.nbytes, image.extent)

    def _reprice(self, digest: str) -> None:
        """Tell the Reclaimer what the adapter is worth, if it is idle."""
        resident = self._residents.get(digest)
        if resident is not None and not resident.pins and digest not in self._forever:
            cost = resident.image.extent * self.copies.seconds_per_byte
            self._idle.add(digest, len(resident.pages), cost, max(1.0, self._frequency.of(digest)))

    def _evict(self, digest: str) -> int:
        """Evict one adapter, for the Reclaimer. Returns its pages."""
        self.on_evict(digest)
        self.evictions += 1
        return self._remove(digest)

    def _remove(self, digest: str) -> int:
        resident = self._residents.pop(digest)
        self._idle.remove(digest)
        self.copies.waiting.pop(digest, None)
        self._pool.free(resident.pages)
        self._free_slots.append(resident.slot)
        if resident.rows is not None:
            self._tiles.clear(resident.slot, resident.rows)
        return len(resident.pages)
