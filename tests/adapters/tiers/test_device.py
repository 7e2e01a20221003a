"""DeviceTier against a plain model of it, in random order, in an arena shared with a KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from loraplex.adapters.image.tiles import AdapterImage, BaseLayout, BiasDelta, LowRank, Part
from loraplex.adapters.image.writing import pack
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.adapters.tiers.pages import PagePool
from loraplex.kernels.constants import ALIGN, TILE_COLUMNS
from loraplex.kernels.records import Projection
from tests.support.counted_clock import counted_clock

_PROJECTIONS = (
    Projection("self_attn.q_proj", 0, 64, 0, 64, False),
    Projection("self_attn.v_proj", 0, 64, 96, 32, False),
    Projection("mlp.down_proj", 6, 96, 0, 64, False),  # the base's config counts sites: there may be any number
)
_LAYOUT = BaseLayout("tiny", 3, _PROJECTIONS, 2048, torch.float32)
_NUM_PAGES = 40


def _image(seed: int) -> AdapterImage:
    """An adapter on some layers and projections, rank 1 to 40: 2 to 22 pages of 2 KiB, 3 to 32 tiles."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    rank = 1 + draw(6) if seed % 3 else 1 + draw(40)
    parts: list[Part] = []
    for layer in range(_LAYOUT.num_layers):
        for projection in _PROJECTIONS:
            if draw(3) == 0 or (layer, projection.site) == (1, 6):
                a = torch.randn(rank, projection.in_features, generator=generator)
                b = torch.randn(projection.out_features, rank, generator=generator)
                parts.append(LowRank(layer, projection, a, b, 0.5))
            if draw(6) == 0:
                parts.append(BiasDelta(layer, projection, torch.randn(projection.out_features, generator=generator)))
    return pack(parts, _LAYOUT)


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[None]:
    with counted_clock("loraplex.adapters.tiers.copying"):
        yield


def _with_second_unit(image: AdapterImage) -> AdapterImage:
    """The same with all tiles again, for the second unit: at sites that are greater by as many as there are."""
    again = image.tiles.clone()
    again[:, 1] += _LAYOUT.num_sites
    tiles = torch.cat((image.tiles, again))
    order = sorted(range(len(tiles)), key=lambda at: tiles[at, :2].tolist())
    return replace(image, tiles=tiles[order])


_IMAGES = {f"digest-{seed}": _with_second_unit(_image(seed)) if seed % 4 == 2 else _image(seed) for seed in range(9)}


def _in_features(site: int) -> int:
    return next(p.in_features for p in _PROJECTIONS if p.site == site)


def _read(units: Tensor, offset: int, elements: int) -> Tensor:
    """`units` [n, 64] uint8."""
    return units.reshape(-1)[offset * ALIGN :][: elements * 4]


def _check_on_device(residency: DeviceTier, arena: Tensor, digest: str) -> None:
    """What a kernel finds through the table is, byte for byte, what the image holds."""
    image, table = _IMAGES[digest], residency.table
    want: dict[tuple[int, int], list[list[int]]] = {}
    for row in image.tiles.tolist():
        want.setdefault((row[0], row[1]), []).append(row[2:])
    for layer in range(_LAYOUT.num_layers):
        for unit, site in product(range(2), range(7)):
            slot = residency.slot_of(digest, unit)
            assert slot is not None
            first, last = table.ranges[slot, layer, site].tolist()
            expected = want.get((layer, site + 7 * unit), [])
            assert last - first == len(expected)
            if not expected:
                assert (first, last) == (0, 0)
            for found, tile in zip(table.tiles[first:last].tolist(), expected, strict=True):
                assert found[2:] == tile[2:]  # n, out_start, out_len, kind, in_start, in_len
                n, _, out_len, *_ = found[2:]
                strips = [(found[1], tile[1], n * out_len)]
                if tile[0] == -1:
                    assert found[0] == -1
                else:
                    strips.append((found[0], tile[0], n * _in_features(site)))
                for offset, position, elements in strips:
                    assert torch.equal(_read(arena, offset, elements), _read(image.pages, position, elements))


@dataclass
class _Model:
    left: int  # bytes to be copied
    pins: int = 0
    doomed: bool = False


class ResidencyMachine(RuleBasedStateMachine):
    @initialize(num_slots=st.integers(2, 6), digests=st.permutations(sorted(_IMAGES)), pinned=st.integers(0, 3))
    def start(self, num_slots: int, digests: list[str], pinned: int) -> None:
        """Begin with work to do: a few adapters, some of them pinned."""
        self.num_slots = num_slots
        self.pool = PagePool(_NUM_PAGES)
        self.arena = torch.full((_NUM_PAGES, _LAYOUT.page_bytes), 0xFF, dtype=torch.uint8)
        self.residency = DeviceTier(self.arena, self.pool, _LAYOUT, num_slots)
        self.residency.on_evict = self.sees_eviction
        self.evicted: list[str] = []
        self.forever: set[str] = set()
        self.model: dict[str, _Model] = {}  # in the order of begin()
        self.kv: list[int] = []
        for digest in digests[:num_slots]:
            self.load(digest)
        for digest in list(self.model)[:pinned]:
            self.pin_it(digest)

    def sees_eviction(self, digest: str) -> None:
        """Called while it is still all there."""
        image, found = _IMAGES[digest], self.residency.read_back(digest)
        assert found.pages.view(-1)[: image.extent].equal(image.pages.view(-1)[: image.extent])
        assert found.tiles.equal(image.tiles)
        assert (found.nbytes, found.extent) == (image.nbytes, image.extent)
        self.evicted.append(digest)

    def _idle(self) -> set[str]:
        return {d for d, state in self.model.items() if not state.pins and d not in self.forever}

    @rule(digest=st.sampled_from(sorted(_IMAGES)))
    def load(self, digest: str) -> None:
        self.begin(digest)
        self.advance(None)

    @rule(digest=st.sampled_from(sorted(_IMAGES)))
    def begin(self, digest: str) -> None:
        image = _IMAGES[digest]
        free = self.pool.num_free
        needed = self.residency.pages_needed(image)
        assert needed == len(image.pages)
        fits = digest in self.model or (len(self.model) < self.num_slots and needed <= free)
        done = self.residency.begin(digest, image)
        assert done == fits
        if digest in self.model:
            self.model[digest].doomed = False
            assert self.pool.num_free == free
        elif done:
            self.model[digest] = _Model(image.extent)
            assert self.pool.num_free == free - needed
        else:
            assert self.pool.num_free == free

    @rule(nbytes=st.none() | st.integers(0, 9000))
    def advance(self, nbytes: int | None) -> None:
        """First begun, first copied; never more bytes than allowed."""
        copied = 0
        for state in self.model.values():
            part = state.left if nbytes is None else min(state.left, nbytes - copied)
            state.left -= part
            copied += part
        assert self.residency.advance(nbytes) == copied

    def pin_it(self, digest: str) -> None:
        self.residency.pin(digest)
        self.model[digest].pins += 1

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        self.pin_it(data.draw(st.sampled_from(sorted(self.model))))

    @precondition(lambda self: any(state.pins for state in self.model.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(digest for digest, state in self.model.items() if state.pins)))
        self.residency.unpin(digest)
        state = self.model[digest]
        state.pins -= 1
        if state.doomed and not state.pins:
            del self.model[digest]

    @rule(digest=st.sampled_from(sorted(_IMAGES)))
    def operator(self, digest: str) -> None:
        """Pins for good, and undoes it; the adapter need not be there."""
        if digest in self.forever:
            self.residency.unpin_forever(digest)
        else:
            self.residency.pin_forever(digest)
        self.forever ^= {digest}

    @rule(digest=st.sampled_from(sorted(_IMAGES)))
    def count_use(self, digest: str) -> None:
        self.residency.count_use(digest)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.model)))
        self.residency.drop(digest)
        if self.model[digest].pins:
            self.model[digest].doomed = True
        else:
            del self.model[digest]

    @rule(pages=st.integers(0, 20))
    def reclaim(self, pages: int) -> None:
        """Who goes first is the Reclaimer's affair (test_eviction.py); here: nobody in use, and no more than needed."""
        idle, free = self._idle(), self.pool.num_free
        assert self.residency.reclaimer.idle_pages == sum(len(_IMAGES[digest].pages) for digest in idle)
        evictions = self.residency.evictions
        freed = self.residency.reclaimer.reclaim(pages)
        gone = [digest for digest in self.evicted if digest in self.model]
        sizes = [len(_IMAGES[digest].pages) for digest in gone]
        assert set(gone) <= idle
        assert freed == sum(sizes) == self.pool.num_free - free
        assert freed >= pages or set(gone) == idle
        assert sum(sizes[:-1]) < max(pages, 1), "the last one had to go, too"
        assert self.residency.evictions == evictions + len(gone)
        self._forget_evicted()

    @precondition(lambda self: len(self.model) == self.num_slots)
    @rule()
    def evict_one(self) -> None:
        idle = self._idle()
        assert self.residency.evict_one() == bool(idle)
        assert len(self.evicted) == bool(idle)
        assert set(self.evicted) <= idle
        self._forget_evicted()

    def _forget_evicted(self) -> None:
        for digest in self.evicted:
            del self.model[digest]
        self.evicted.clear()

    @rule(n=st.integers(1, 12))
    def kv_grows(self, n: int) -> None:
        pages = self.pool.alloc(n, "kv")
        if pages is not None:
            self.arena[pages] = 0xAB
            self.kv += pages

    @precondition(lambda self: self.kv)
    @rule(data=st.data())
    def kv_shrinks(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.kv)))
        self.pool.free(self.kv[:n])
        del self.kv[:n]

    @invariant()
    def agrees(self) -> None:
        self.residency.check_integrity()
        self.residency.reclaimer.check_integrity()
        self.pool.check_integrity()
        assert set(self.residency.loaded()) == self.model.keys()
        assert self.residency.is_copying == any(state.left for state in self.model.values())
        assert bool((self.arena[self.kv] == 0xAB).all()), "a page of the KV cache was written to"
        for digest in _IMAGES:
            assert self.residency.is_resident(digest) == (digest in self.model)
            assert (self.residency.slot_of(digest) is None) == (digest not in self.model)
            assert self.residency.is_ready(digest) == (digest in self.model and not self.model[digest].left)
        for digest, state in self.model.items():
            if state.left:
                assert not self.residency.table.ranges[self.residency.slot_of(digest)].any(), "half an adapter is used"
            else:
                _check_on_device(self.residency, self.arena, digest)


TestResidency = ResidencyMachine.TestCase
TestResidency.settings = settings(max_examples=40, stateful_step_count=30)


def _residency(num_slots: int = 4, num_pages: int = 400) -> tuple[DeviceTier, Tensor]:
    arena = torch.full((num_pages, _LAYOUT.page_bytes), 0xFF, dtype=torch.uint8)
    return DeviceTier(arena, PagePool(num_pages), _LAYOUT, num_slots), arena


def test_only_the_used_part_of_the_last_page_is_copied() -> None:
    residency, arena = _residency()
    image = pack([LowRank(0, _PROJECTIONS[0], torch.ones(1, 64), torch.ones(64, 1), 1.0)], _LAYOUT)
    assert residency.load("a", image)
    assert residency.copies.bytes_loaded == image.extent == 512
    [page] = set((residency.table.tiles[0, :2] * ALIGN // _LAYOUT.page_bytes).tolist())
    assert bool((arena[page, 512:] == 0xFF).all())
    assert bool((arena[page, :512].view(torch.float32) == 1.0).all())


def test_the_tile_table_doubles_and_its_rows_are_used_again() -> None:
    """Each adapter has 480 tiles: rows of A of which one fits a page."""
    layout = BaseLayout("tiny", 120, (Projection("mlp.down_proj", 0, 16, 0, 16, False),), 64, torch.float32)
    arena = torch.zeros(4000, 64, dtype=torch.uint8)
    residency = DeviceTier(arena, PagePool(4000), layout, 8)

    def image(seed: int) -> AdapterImage:
        generator = torch.Generator().manual_seed(seed)
        return pack(
            [
                LowRank(layer, layout.projections[0], torch.randn(4, 16, generator=generator), torch.ones(16, 4), 1.0)
                for layer in range(120)
            ],
            layout,
        )

    first = residency.table
    assert first.tiles.shape == (1024, TILE_COLUMNS)
    for seed in range(4):
        assert residency.load(str(seed), image(seed))
        residency.check_integrity()
    assert residency.table.tiles.shape == (2048, TILE_COLUMNS)
    assert residency.table.ranges is first.ranges  # slots do not grow: the same tensor
    assert residency.table.tiles is residency.table.tiles_host  # on CPU there is one table
    for round_ in range(10):
        residency.drop(str(round_ % 4))
        assert residency.load(str(round_ % 4), image(round_))
        residency.check_integrity()
    assert residency.table.tiles.shape == (2048, TILE_COLUMNS)
    assert residency.copies.loads == 14
    assert residency.evictions == 0  # a drop is not an eviction


def test_a_dropped_adapter_stays_while_pinned_and_may_be_asked_for_again() -> None:
    residency, _ = _residency()
    image = _IMAGES["digest-0"]
    assert residency.load("a", image)
    residency.pin("a")
    residency.pin("a")
    residency.drop("a")
    residency.unpin("a")
    assert residency.is_resident("a")
    residency.unpin("a")
    assert not residency.is_resident("a")
    assert residency.load("a", image)
    residency.pin("a")
    residency.drop("a")
    assert residency.load("a", image)  # wanted again before the last unpin
    residency.unpin("a")
    assert residency.is_resident("a")
    assert residency.copies.loads == 2


def test_pins_protect_from_eviction() -> None:
    residency, _ = _residency()
    residency.drop("digest-0")  # not there: nothing happens
    for digest in ("digest-0", "digest-1"):
        assert residency.load(digest, _IMAGES[digest])
    residency.pin("digest-0")
    assert residency.reclaimer.reclaim(10**6) == len(_IMAGES["digest-1"].pages)
    assert not residency.evict_one()
    assert residency.loaded() == ("digest-0",)


def test_operator_pins_hold_before_and_after_the_adapter_comes() -> None:
    residency, _ = _residency()
    residency.pin_forever("digest-0")
    for digest in ("digest-0", "digest-1"):
        assert residency.load(digest, _IMAGES[digest])
        residency.pin(digest)
        residency.unpin(digest)
    residency.pin_forever("digest-1")
    assert residency.reclaimer.idle_pages == 0
    assert not residency.evict_one()
    residency.unpin_forever("digest-1")
    assert residency.evict_one()
    assert residency.loaded() == ("digest-0",)
    residency.drop("digest-0")  # unloading it is the operator's own wish
    assert residency.loaded() == ()
    residency.check_integrity()


def test_what_is_wanted_more_often_stays() -> None:
    residency, _ = _residency()
    for digest, uses in (("digest-0", 1), ("digest-1", 5), ("digest-2", 3)):
        residency.count_use(digest, uses)  # by requests that came before it was there
        assert residency.load(digest, _IMAGES[digest])
    gone: list[str] = []
    residency.on_evict = gone.append
    residency.reclaimer.reclaim(1)
    residency.count_use("digest-2", 9)  # while it is idle
    assert residency.load("digest-0", _IMAGES["digest-0"])
    residency.count_use("digest-0", 50)
    residency.reclaimer.reclaim(1)
    residency.reclaimer.reclaim(1)
    assert gone == ["digest-0", "digest-1", "digest-2"]


def test_a_copy_under_way_can_be_dropped_but_not_evicted_while_pinned() -> None:
    residency, _ = _residency()
    image = _IMAGES["digest-0"]
    assert residency.begin("a", image)
    assert residency.advance(100) == 100
    residency.pin("a")
    assert residency.reclaimer.reclaim(1000) == 0
    residency.drop("a")
    assert residency.advance(100) == 100
    residency.unpin("a")  # nobody wants it any more: gone, half copied
    residency.check_integrity()
    assert not residency.is_copying
    assert residency.copies.loads == 0
    assert residency.begin("a", image)
    assert residency.advance() == image.extent, "from the start again"
    assert residency.is_ready("a")
    assert residency.begin("b", _IMAGES["digest-1"])
    assert residency.advance(10) == 10
    assert residency.reclaimer.reclaim(1000) == len(image.pages) + len(_IMAGES["digest-1"].pages)
    residency.check_integrity()
    assert residency.advance() == 0


def test_a_load_costs_what_loads_have_taken() -> None:
    residency, _ = _residency()
    image = _IMAGES["digest-0"]
    for number in range(60):
        assert residency.begin("a", image, seconds=2.0)  # the source's share; the copy's own is measured, microseconds
        residency.advance()
        residency.drop("a")
        assert residency.copies.loads == number + 1
    assert residency.copies.seconds_per_byte == pytest.approx(2.0 / image.extent, rel=0.2)
    assert residency.copies.bytes_loaded == 60 * image.extent
    assert 0 < residency.copies.durations.total < 60


def test_misuse_is_refused() -> None:
    residency, arena = _residency()
    assert residency.load("a", _IMAGES["digest-0"])
    with pytest.raises(ValueError, match="unpinned more often"):
        residency.unpin("a")
    with pytest.raises(KeyError):
        residency.pin("b")
    other = AdapterImage(torch.zeros(1, 4096, dtype=torch.uint8), torch.zeros(0, 7, dtype=torch.int32), 0, 0)
    with pytest.raises(ValueError, match="4096 bytes"):
        residency.load("b", other)
    with pytest.raises(ValueError, match="400 pages of 2048 bytes; expected 7 of 2048"):
        DeviceTier(arena, PagePool(7), _LAYOUT)


def test_an_adapter_without_tiles_takes_a_slot_and_no_page() -> None:
    residency, _ = _residency(num_slots=1)
    assert residency.load("a", pack([], _LAYOUT))
    residency.check_integrity()
    assert not residency.load("b", _IMAGES["digest-0"])  # no slot
    assert residency.reclaimer.reclaim(0) == 0  # no page was asked for,
    assert residency.evict_one()  # but a slot can be
    assert residency.load("b", _IMAGES["digest-0"])


def test_integrity_check_sees_damage() -> None:
    for damage in ("range", "tile", "page", "idle", "copying"):
        residency, _ = _residency()
        assert residency.load("a", _IMAGES["digest-0"])
        residency.check_integrity()
        if damage == "range":
            residency.table.ranges_host[3, 0, 0, 1] = 5
        elif damage == "tile":
            residency.table.tiles_host[0, 1] += 399 * _LAYOUT.page_bytes // ALIGN
        elif damage == "page":
            residency._pool.alloc(1, "adapter")
        elif damage == "idle":
            residency._idle.remove("a")
        else:
            residency.copies.waiting["a"] = residency._residents["a"]
        with pytest.raises(AssertionError):
            residency.check_integrity()
