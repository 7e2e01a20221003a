"""Adapters on their way from source to host to device, over a real loader, host store and residency."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.host_store import HostStore
from loraplex.adapters.loader import Loader, ParsedImage
from loraplex.adapters.pages import PagePool
from loraplex.adapters.registry import AdapterVersion, Registry
from loraplex.adapters.residency import Residency
from loraplex.adapters.tiles import BaseLayout, LowRank, pack
from loraplex.kernels.metadata import Projection, Site
from loraplex.server.engine.placement import AdapterPlacement

Q = Projection("self_attn.q_proj", Site.QKV, 32, 0, 32, False)
LAYOUT = BaseLayout("tiny", 1, (Q,), 256, torch.float32)


@dataclass
class Rig:
    """Sources are ranks written as text: the adapter "3" takes 3 pages (a row of A and one of B are 256 bytes)."""

    placement: AdapterPlacement
    residency: Residency
    store: HostStore
    registry: Registry
    broken: set[str] = field(default_factory=set)
    read: list[str] = field(default_factory=list)
    ready: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    gate: threading.Event = field(default_factory=threading.Event)

    def parse(self, source: str) -> ParsedImage:
        self.read.append(source)
        assert self.gate.wait(30)
        if source in self.broken:
            raise AdapterRefused("bad_file", f"{source} is broken")
        rank = int(source)
        image = pack([LowRank(0, Q, torch.ones(rank, 32), torch.ones(32, rank), 1.0)], LAYOUT)
        return ParsedImage(f"digest-{source}", rank, ("q_proj",), image.pages.shape[0], image.nbytes, image)

    def version(self, source: str, name: str = "") -> AdapterVersion:
        rank = int(source)
        return self.registry.register(
            name or source,
            digest=f"digest-{source}",
            source=source,
            rank=rank,
            targets=("q_proj",),
            num_pages=rank,
            nbytes=256 * rank,
        )

    def wait(self) -> None:
        assert self.ready.acquire(timeout=30)


@pytest.fixture
def rig() -> Iterator[Rig]:
    pool = PagePool(8)
    residency = Residency(torch.zeros(8, 256, dtype=torch.uint8), pool, LAYOUT, num_slots=4)
    store, registry = HostStore(256 * 6), Registry()
    loader = Loader(lambda source: result.parse(source), store)
    placement = AdapterPlacement(residency, store, loader, registry)
    result = Rig(placement, residency, store, registry)
    result.gate.set()
    placement.on_ready = lambda: result.ready.release()
    yield result
    result.gate.set()
    loader.shutdown()
    residency.check_integrity()


def test_from_source_to_device(rig: Rig) -> None:
    version = rig.version("2")
    rig.placement.request(version)
    rig.wait()
    assert rig.placement.missing_pages([version]) == [2]
    assert rig.placement.load(version)
    assert rig.placement.missing_pages([version]) == [0]
    assert rig.placement.idle_pages() == 2
    rig.placement.pin(version.digest)
    assert rig.placement.idle_pages() == 0
    assert not rig.placement.evict_one()
    rig.placement.unpin(version.digest)
    assert rig.placement.evict_idle(1) == 2
    assert (rig.placement.loads, rig.placement.evictions) == (1, 1)
    assert rig.placement.missing_pages([version]) == [2], "still in host memory"
    assert rig.read == ["2"]


def test_asked_once_for_all_who_wait(rig: Rig) -> None:
    rig.gate.clear()
    version = rig.version("2")
    for _ in range(5):
        rig.placement.request(version)
        assert rig.placement.missing_pages([version]) is None
    rig.gate.set()
    rig.wait()
    assert rig.placement.missing_pages([version]) == [2]
    assert rig.read == ["2"]


def test_all_of_a_mix_are_asked_for_at_once(rig: Rig) -> None:
    rig.gate.clear()
    versions = [rig.version("1"), rig.version("2")]
    assert rig.placement.missing_pages(versions) is None
    rig.gate.set()
    rig.wait()
    rig.wait()
    assert sorted(rig.read) == ["1", "2"]
    assert rig.placement.missing_pages(versions) == [1, 2]


def test_a_failure_reaches_all_who_wait_and_the_next_request_tries_again(rig: Rig) -> None:
    version = rig.version("2")
    rig.broken.add("2")
    rig.placement.request(version)
    rig.wait()
    for _ in range(2):
        with pytest.raises(AdapterRefused, match="2 is broken"):
            rig.placement.missing_pages([version])
    assert rig.read == ["2"]
    rig.broken.clear()
    rig.placement.request(version)
    rig.wait()
    assert rig.placement.missing_pages([version]) == [2]


def test_what_the_host_store_pushed_out_is_read_again(rig: Rig) -> None:
    small, large = rig.version("2"), rig.version("5")
    rig.placement.request(small)
    rig.wait()
    rig.placement.request(large)
    rig.wait()
    assert rig.placement.missing_pages([large]) == [5]
    assert rig.placement.missing_pages([small]) is None
    rig.wait()
    assert rig.placement.missing_pages([small]) == [2]
    assert rig.read == ["2", "5", "2"]


def test_an_image_asked_about_is_held_until_it_is_loaded(rig: Rig) -> None:
    version = rig.version("2")
    rig.placement.request(version)
    rig.wait()
    assert rig.placement.missing_pages([version]) == [2]
    rig.store.discard(version.digest)  # as a loader's thread may, at any time
    assert rig.placement.load(version)


def test_no_room_on_the_device(rig: Rig) -> None:
    versions = [rig.version(source) for source in ("4", "5")]
    for version in versions:
        rig.placement.request(version)
        rig.wait()
        rig.placement.missing_pages([version])
        assert rig.placement.load(version) == (version is versions[0])
    assert rig.placement.evict_idle(1) == 4
    assert rig.placement.load(versions[1])


@pytest.mark.parametrize("shared", [False, True])
def test_a_drained_adapter_goes_unless_another_name_has_the_same_bytes(rig: Rig, shared: bool) -> None:
    version = rig.version("2")
    if shared:
        rig.version("2", name="alias")
    rig.placement.request(version)
    rig.wait()
    rig.placement.missing_pages([version])
    rig.placement.load(version)
    rig.registry.unregister("2")
    rig.placement.forget(version)
    assert rig.placement.loaded() == ((version.digest,) if shared else ())
    assert (rig.store.get(version.digest) is not None) == shared
