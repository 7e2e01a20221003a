"""An AdapterCache over sources whose files change, with requests that are admitted as the scheduler does it."""

from __future__ import annotations

import weakref
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.image.tiles import AdapterImage, BaseLayout, LowRank
from loraplex.adapters.image.writing import pack
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry
from loraplex.adapters.tiers.cache import AdapterCache
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.adapters.tiers.eviction import Reclaimer
from loraplex.adapters.tiers.inbox import Inbox, host_bytes
from loraplex.adapters.tiers.loader import LoadedContent, Loader, Priority, Reading
from loraplex.adapters.tiers.pages import PagePool
from loraplex.adapters.tiers.settle import changed, renew, settle
from loraplex.adapters.version import AdapterLease, AdapterVersion
from loraplex.kernels.records import Projection
from loraplex.server.models.config import Site

Q = Projection("self_attn.q_proj", Site.QKV, 32, 0, 32, False)
LAYOUT = BaseLayout("tiny", 1, (Q,), 256, torch.float32)
IMAGE = 256 + 40
"""Bytes of host memory that a rank takes: a page, and a row of the tile table."""

NAMES = ("1-a", "2-b", "3-c", "2-d", "3-e", "3-f")
"""Rank and letter: so many pages each."""


def image_of(source: str, value: float) -> AdapterImage:
    """The source "3-c" has rank 3: three pages, of a row of A and one of B each. All its A is `value`."""
    rank = int(source.split("-")[0])
    return pack([LowRank(0, Q, torch.full((rank, 32), value), torch.ones(32, rank), 1.0)], LAYOUT)


def info_of(source: str, digest: str | None = None) -> AdapterInfo:
    rank = int(source.split("-")[0])
    return AdapterInfo(rank, ("q_proj",), rank, 256 * rank, digest, num_tiles=rank + 4 * (rank - 1))


def value_on_device(device: DeviceTier, arena: torch.Tensor, version: AdapterVersion) -> float:
    """What a kernel would read of it: all its A, which must be of one value."""
    slot = device.slot_of(version.digest or "")
    assert slot is not None
    first, last = device.table.ranges[slot, 0, Site.QKV].tolist()
    found: set[float] = set()
    for a_off, _, n, *_ in device.table.tiles[first:last].tolist():
        found.update(arena.view(-1)[a_off * 64 :][: n * 128].view(torch.float32).tolist())
    (value,) = found
    return value


class Count:
    """The images there are: each is counted from the moment it is made until nobody refers to it."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._images: list[tuple[weakref.ref[torch.Tensor], int]] = []

    def made(self, image: AdapterImage) -> AdapterImage:
        self._images.append((weakref.ref(image.pages), host_bytes(image)))
        self.check()
        return image

    def check(self) -> None:
        self._images = [entry for entry in self._images if entry[0]() is not None]
        found = sum(nbytes for _, nbytes in self._images)
        assert found <= self.capacity_bytes, f"{found} bytes of images, {self.capacity_bytes} are given"


class CountedDevice(DeviceTier):
    count: Count

    def read_back(self, digest: str) -> AdapterImage:
        return self.count.made(super().read_back(digest))


class Source(Loader):
    """A loader without waiting: what was asked for comes when the test says so."""

    def __init__(self, world: World) -> None:
        super().__init__(self.parse, world.put, world.registry, threads=1)
        self.values = dict.fromkeys(NAMES, 1.0)
        self.asked: list[tuple[AdapterVersion, Future[LoadedContent]]] = []
        self._world = world

    def parse(self, reading: Reading) -> LoadedContent:
        found = self.fresh(reading.source)
        self._world.count.made(found.image)
        return found

    def fresh(self, source: str) -> LoadedContent:
        value = self.values[source]
        image = image_of(source, value)
        return LoadedContent(info_of(source, f"{source}-{value}"), image)

    def ensure(self, version: AdapterVersion, priority: Priority = Priority.URGENT) -> Future[LoadedContent]:
        future: Future[LoadedContent] = Future()
        self.asked.append((version, future))
        return future

    def come(self, index: int) -> None:
        version, future = self.asked.pop(index)
        if not future.set_running_or_notify_cancel():
            return
        found = self.parse(Reading(version.source, False, lambda: None))
        if settle(self._world.registry, version, found):
            self._world.put(found.digest, found.image)
            future.set_result(found)
        else:
            renew(self._world.registry, version, found)
            future.set_exception(changed(version, found))

    def come_all(self) -> None:
        while self.asked:
            self.come(0)


@dataclass(eq=False)
class Request:
    lease: AdapterLease
    is_running: bool = False
    has_begun: bool = False
    is_safe: bool = False  # its version was seen to be old while its bytes were there: they may not be lost

    @property
    def version(self) -> AdapterVersion:
        return self.lease.version


class World:
    """Requests over adapters whose files change."""

    def __init__(self, host_ranks: int, num_pages: int = 8, num_slots: int = 4, exclusive: bool = True) -> None:
        self.count = Count(host_ranks * IMAGE)
        self.pool = PagePool(num_pages)
        self.reclaimer = Reclaimer()
        self.arena = torch.zeros(num_pages, 256, dtype=torch.uint8)
        self.device = CountedDevice(self.arena, self.pool, LAYOUT, num_slots, self.reclaimer)
        self.device.count = self.count
        self.registry = Registry()
        self.source = Source(self)
        self.build(exclusive)
        self.cache.copy_budget = 300
        self.registry.on_drained = self.cache.forget
        self.requests: list[Request] = []
        self.lost = 0
        for name in NAMES:
            self.registry.register(name, name, info_of(name))

    def build(self, exclusive: bool) -> None:
        self.inbox = Inbox(self.count.capacity_bytes)
        self.cache = AdapterCache(self.device, self.inbox, self.source, self.registry, exclusive=exclusive)

    def put(self, digest: str, image: AdapterImage) -> None:
        """As a loader's thread does."""
        self.inbox.put(digest, image)

    def host_digests(self) -> tuple[str, ...]:
        """Of the images in host memory, least recently used first."""
        self.cache.host.receive()
        return self.cache.host.digests()

    def host_figures(self) -> tuple[int, int, int, int, int]:
        """Bytes used, held, reserved, of fetches; evictions."""
        host = self.cache.host
        return (host.used_bytes, host.held_bytes, host.reserved_bytes, host.fetch_bytes, host.counts.evictions)

    def close(self) -> None:
        self.source.shutdown()

    def arrive(self, name: str) -> Request:
        request = Request(self.registry.lease(name))
        self.cache.request(request.version)
        self.requests.append(request)
        return request

    def pin(self, name: str, pinned: bool) -> None:
        """As the operator does."""
        version = self.registry.get(name)
        assert version is not None
        self.cache.pin_forever(version, pinned)

    def notice(self, name: str) -> None:
        """As who watches the folders: files that changed get the name."""
        version, digest = self.registry.get(name), f"{name}-{self.source.values[name]}"
        assert version is not None
        if version.digest not in (None, digest):
            renew(self.registry, version, LoadedContent(info_of(name, digest), None))

    def step(self, busy: bool = False) -> None:
        self.cache.start_step(busy)
        draining, there = {version.uid for version in self.registry.draining()}, self.host_digests()
        for request in self.requests:
            digest = request.version.digest or ""
            is_there = self.device.is_ready(digest) or digest in there
            if request.has_begun and request.version.uid in draining and is_there:
                request.is_safe = True
        for request in tuple(self.requests):
            if not request.is_running:
                self._admit(request)

    def _admit(self, request: Request) -> None:
        version = request.version
        try:
            missing = self.cache.missing_pages([version])
        except AdapterRefused as error:
            assert error.code == "changed"  # noqa: PT017
            assert not request.is_safe, "an old version was lost"
            self.lost += request.has_begun
            self.end(request)
            return
        if missing is None or missing[0] > self.pool.num_free + self.reclaimer.idle_pages:
            return
        assert version.digest is not None
        if missing[0]:
            self.reclaimer.reclaim(missing[0] - self.pool.num_free)
            while not self.cache.load(version):
                if not self.cache.evict_for_slot():
                    return
        self.cache.pin(version.digest)
        request.is_running = request.has_begun = True

    def preempt(self, request: Request) -> None:
        assert request.version.digest is not None
        self.cache.unpin(request.version.digest)
        request.is_running = False

    def end(self, request: Request) -> None:
        self.requests.remove(request)
        if request.is_running:
            self.preempt(request)
        self.cache.cancel(request.version)
        request.lease.release()

    def run(self, name: str) -> Request:
        """Arrive and begin."""
        request = self.arrive(name)
        for _ in range(3):
            self.step()
            self.source.come_all()
        assert request.is_running
        return request

    def check(self) -> None:
        self.count.check()
        self.cache.check_integrity()
        self.reclaimer.check_integrity()
        self.pool.check_integrity()
        for request in self.requests:
            if request.is_running and self.cache.is_ready(request.version):
                assert f"{request.version.source}-{self.value(request.version)}" == request.version.digest

    def value(self, version: AdapterVersion) -> float:
        return value_on_device(self.device, self.arena, version)
