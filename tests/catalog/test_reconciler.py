"""The operator's wishes kept: a folder, a list and named adapters, with sources that are slow, broken and gone."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from loraplex.adapters.errors import AdapterNotFound, AdapterUnavailable, InvalidAdapterName
from loraplex.adapters.image.tiles import BaseLayout
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry
from loraplex.adapters.sources.downloads import Downloads
from loraplex.adapters.sources.sources import Source
from loraplex.adapters.tiers.loader import LoadedContent, Loader
from loraplex.adapters.tiers.reader import AdapterReader
from loraplex.adapters.version import AdapterVersion
from loraplex.kernels.records import Projection
from loraplex.server.catalog.adapter_list import AdapterListError, DesiredAdapter, parse_list
from loraplex.server.catalog.manager import AdapterManager
from loraplex.server.catalog.reconciler import Reconciler
from loraplex.server.models.config import Site
from tests.catalog.test_manager import Reader
from tests.support.adapter_reading import without_weights, write_adapter
from tests.support.refusals import refused
from tests.support.waiting import LIMIT, wait_for

LAYOUT = BaseLayout("tiny-base", 2, (Projection("self_attn.q_proj", Site.QKV, 32, 0, 32, False),), 1024, torch.float32)


class Sources(Downloads):
    """Remote sources that come when the test says so."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.waiting: dict[str, Future[Path]] = {}

    def fetch(self, source: Source, *, stale: bool = False) -> Future[Path]:
        assert stale
        self.asked.append(source.text)
        self.waiting[source.text] = Future()
        return self.waiting[source.text]

    def close(self) -> None:
        pass


class Pins:
    def __init__(self) -> None:
        self.now: list[AdapterVersion] = []

    def pin_adapter(self, version: AdapterVersion, pinned: bool) -> None:
        self.now.append(version) if pinned else self.now.remove(version)


class World:
    """A follower over a reader that finds a number in a file; ticks are the test's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 0.0
        self.registry, self.sources, self.pins = Registry(), Sources(), Pins()
        reader = Reader()
        reader.examine = self._off_main(reader.examine)  # type: ignore[method-assign]
        self.loader = Loader(self._read(reader), lambda digest, image: None, self.registry)
        self.manager = AdapterManager(self.registry, self.loader, reader.examine, self.sources, self.pins.pin_adapter)
        self.list_file = folder / "adapters.yaml"
        self.directory = folder / "adapters"
        self.directory.mkdir()

    def follow(self, *, named: tuple[DesiredAdapter, ...] = ()) -> Reconciler:
        listed = self.list_file if self.list_file.exists() else None
        return Reconciler(self.manager, directory=self.directory, list_file=listed, named=named, clock=lambda: self.now)

    def adapter(self, name: str, text: str = "3", where: Path | None = None) -> Path:
        folder = (where or self.directory) / name
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "adapter_config.json").write_text(text)
        return folder

    def write_list(self, text: str) -> None:
        other = self.list_file.with_suffix(".new")
        other.write_text(text)
        other.replace(self.list_file)

    def names(self) -> list[str]:
        return [version.name for version in self.registry.list()]

    @staticmethod
    def _off_main(examine: Callable[[str], object]) -> Callable[[str], object]:
        """The follower's thread is the test's here."""
        pool = ThreadPoolExecutor(1)
        return lambda source: pool.submit(examine, source).result()

    def _read(self, reader: Reader) -> Callable[..., object]:
        def read(reading: object) -> object:
            source = reading.source  # type: ignore[attr-defined]
            if source.startswith("hf://"):
                return LoadedContent(AdapterInfo(4, ("q_proj",), 2, 100, f"digest of {source}"), object())
            return reader.read(reading)  # type: ignore[arg-type]

        return read


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.manager.close()


def until(reconciler: Reconciler, condition: Callable[[], bool]) -> None:
    def found() -> bool:
        reconciler.tick()
        return condition()

    wait_for(found)


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_folder_is_followed(world: World) -> None:
    world.adapter("a")
    world.adapter("bad", "nonsense")
    reconciler = world.follow()
    until(reconciler, lambda: world.names() == ["a"])
    assert set(world.registry.refused) == {"bad"}
    world.adapter("b", "4")
    world.adapter("bad", "5")
    until(reconciler, lambda: world.names() == ["a", "b", "bad"])
    assert world.registry.refused == {}
    shutil.rmtree(world.directory / "a")
    until(reconciler, lambda: world.names() == ["b", "bad"])


def test_a_changed_adapter_gets_the_name(world: World) -> None:
    folder = world.adapter("a", "3")
    reconciler = world.follow()
    until(reconciler, lambda: world.names() == ["a"])
    first = world.registry.lease("a")
    world.adapter("a", "4")
    until(reconciler, lambda: world.registry.get("a") is not first.version)
    assert [world.registry.get("a").info.num_pages, first.version.info.num_pages] == [4, 3]  # type: ignore[union-attr]
    world.loader.ensure(world.registry.get("a")).result(20)  # type: ignore[arg-type]  # it has been used
    world.adapter("a", "5")
    until(reconciler, lambda: world.registry.get("a").digest == "digest-5")  # type: ignore[union-attr]
    used = world.registry.get("a")
    os.utime(folder / "adapter_config.json")  # another date, the same content
    loads = world.loader.stats().loads
    until(reconciler, lambda: world.loader.stats().loads > loads)
    assert world.registry.get("a") is used
    world.adapter("a", "broken")
    until(reconciler, lambda: "a" in world.registry.refused)
    assert world.registry.get("a") is used, "what is in memory is served on"


def test_names_of_others_are_left_alone(world: World) -> None:
    reconciler = world.follow()
    other = world.adapter("elsewhere", "3", world.folder)
    asyncio.run(world.manager.register("a", str(other)))
    folder = world.adapter("a", "4")
    for _ in range(4):
        reconciler.tick()
    shutil.rmtree(folder)
    for _ in range(4):
        reconciler.tick()
    assert world.registry.get("a").source == str(other)  # type: ignore[union-attr]


def test_no_door_gives_an_adapter_the_bases_name(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Through the folder, the list and a registration alike: it would be listed, and the base would answer."""
    world.registry._taken = frozenset({"base", "alias"})
    for name in ("base", "a"):
        world.adapter(name)
    elsewhere = world.adapter("b", "3", world.folder)
    world.write_list(f"ensurePresent: [{{name: alias, source: {elsewhere}}}, {{name: c, source: {elsewhere}}}]")
    reconciler = world.follow()
    until(reconciler, lambda: world.names() == ["a", "c"])
    with pytest.raises(InvalidAdapterName, match="is the base's own"):
        asyncio.run(world.manager.register("base", str(elsewhere), replace=True))
    assert "'base' is the base's own" in caplog.text
    assert "'alias' is the base's own" in caplog.text
    assert not world.registry.refused, "nor is it listed as refused"


def test_what_somebody_unloads_stays_unloaded_until_it_changes(world: World) -> None:
    world.adapter("a")
    reconciler = world.follow()
    until(reconciler, lambda: world.names() == ["a"])
    world.manager.registry.unregister("a")
    for _ in range(4):
        reconciler.tick()
    assert world.names() == []
    world.adapter("a", "4")
    until(reconciler, lambda: world.names() == ["a"])


# ---- the list --------------------------------------------------------------------------------------------------------


def test_a_list_is_followed(world: World) -> None:
    one, two = (str(world.adapter(name, text, world.folder)) for name, text in (("one", "1"), ("two", "2")))
    world.write_list(f"ensurePresent: [{{name: x, source: {one}, pinned: true}}, {{name: y, source: {two}}}]")
    reconciler = world.follow()
    until(reconciler, lambda: world.names() == ["x", "y"] and world.pins.now == [world.registry.get("x")])
    world.write_list(f"ensurePresent: [{{name: x, source: {two}}}, {{name: z, source: {two}, pinned: true}}]")
    until(reconciler, lambda: world.names() == ["x", "z"] and world.registry.get("x").source == two)  # type: ignore[union-attr]
    until(reconciler, lambda: world.pins.now == [world.registry.get("z")])
    world.manager.registry.unregister("z")
    until(reconciler, lambda: world.pins.now == [world.registry.get("z")] and world.names() == ["x", "z"])
    world.write_list("ensureAbsent: [x, unknown]")
    until(reconciler, lambda: world.names() == [] and world.pins.now == [])
    asyncio.run(world.manager.register("x", one))
    until(reconciler, lambda: world.names() == [])


def test_a_configmap_that_is_exchanged_is_noticed(world: World) -> None:
    source = str(world.adapter("one", "1", world.folder))
    for name in ("old", "new"):
        (world.folder / f"..{name}").mkdir()
        (world.folder / f"..{name}" / "adapters.yaml").write_text(
            f"ensurePresent: [{{name: {name}, source: {source}}}]"
        )
    (world.folder / "..data").symlink_to("..old")
    world.list_file.symlink_to("..data/adapters.yaml")
    reconciler = world.follow()
    until(reconciler, lambda: world.names() == ["old"])
    (world.folder / "..tmp").symlink_to("..new")
    (world.folder / "..tmp").rename(world.folder / "..data")
    until(reconciler, lambda: world.names() == ["new"])


def test_a_list_that_cannot_be_read_changes_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    source = str(world.adapter("one", "1", world.folder))
    good = f"ensurePresent: [{{name: x, source: {source}}}]"
    world.write_list("ensurePresent: {")
    with pytest.raises(AdapterListError, match="no YAML"):
        world.follow()
    world.write_list(good)
    reconciler = world.follow()
    until(reconciler, lambda: world.names() == ["x"])
    world.write_list("ensurePresent: [{name: x}]")
    for _ in range(5):
        reconciler.tick()
    world.list_file.unlink()
    for _ in range(5):
        reconciler.tick()
    assert world.names() == ["x"]
    assert len([record for record in caplog.records if "stays as it was" in record.message]) == 2, "each said once"
    world.write_list("")
    until(reconciler, lambda: world.names() == [])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "is a list; expected the keys"),
        ("ensurePresent: x", "is a str; expected a list"),
        ("ensurepresent: []", "unknown key 'ensurepresent'"),
        ("ensurePresent: [x]", r"ensurePresent\[0\] is a str"),
        ("ensurePresent: [{name: a}]", "source is None"),
        ("ensurePresent: [{name: a, source: b, pin: true}]", "unknown key 'pin'"),
        ("ensurePresent: [{name: a, source: b, pinned: 1}]", "pinned is 1"),
        ("ensurePresent: [{name: 7, source: b}]", "name is 7"),
        ("ensurePresent: [{name: a b, source: b}]", "cannot be used"),
        ("ensurePresent: [{name: a, source: b}, {name: a, source: c}]", "twice"),
        ("ensurePresent: [{name: a, source: b}]\nensureAbsent: [a]", "and in ensureAbsent"),
        ("ensureAbsent: [../a]", "cannot be used"),
        ("a: b: c", r"line 1"),
        ("!!python/object/apply:os.getcwd []", "no YAML"),
    ],
)
def test_lists_that_are_none(text: str, match: str) -> None:
    with pytest.raises(AdapterListError, match=match) as caught:
        parse_list(text)
    assert "\n" not in str(caught.value)


def test_what_the_chart_writes_is_a_list() -> None:
    found = parse_list("ensurePresent:\n- name: sql\n  pinned: true\n  source: s3://models/sql\nensureAbsent: []\n")
    assert found.present == (DesiredAdapter("sql", "s3://models/sql", True),)
    assert parse_list("").present == parse_list("ensurePresent:\nensureAbsent:\n").present == ()


# ---- remote ----------------------------------------------------------------------------------------------------------


async def test_requests_wait_for_what_is_on_its_way(world: World) -> None:
    reconciler = world.follow(named=(DesiredAdapter("sql", "acme/sql", enforced=False),))
    reconciler.tick()
    assert world.sources.asked == ["hf://acme/sql"]
    waiting = [asyncio.create_task(world.manager.arrival("sql")) for _ in range(100)]
    gone = asyncio.create_task(world.manager.arrival("sql"))
    await asyncio.wait_for(world.manager.arrival("other"), LIMIT)  # nobody else waits
    await asyncio.sleep(0)
    gone.cancel()
    world.sources.waiting["hf://acme/sql"].set_result(world.folder)
    await asyncio.wait_for(asyncio.gather(*waiting), LIMIT)
    with world.registry.lease("sql") as lease:
        assert lease.version.source == "hf://acme/sql"
    world.manager.registry.unregister("sql")
    for _ in range(3):
        reconciler.tick()
    assert world.names() == [], "named on the command line, it is loaded once"
    assert world.sources.asked == ["hf://acme/sql"]


async def test_a_source_that_fails_is_tried_again_and_requests_are_told(world: World) -> None:
    reconciler = world.follow(named=(DesiredAdapter("sql", "acme/sql"),))
    reconciler.tick()
    waiting = asyncio.create_task(world.manager.arrival("sql"))
    await asyncio.sleep(0)
    world.sources.waiting["hf://acme/sql"].set_exception(AdapterUnavailable("the Hub cannot be reached"))
    await asyncio.wait_for(waiting, LIMIT)
    with refused("unavailable", "cannot be reached"):
        world.registry.lease("sql")
    reconciler.tick()
    times = []
    for second in range(1, 60):
        world.now = float(second)
        reconciler.tick()
        if len(world.sources.asked) > len(times) + 1:
            times.append(second)
            await asyncio.wait_for(world.manager.arrival("sql"), LIMIT)  # from now on requests are told at once
            world.sources.waiting["hf://acme/sql"].set_exception(AdapterNotFound("gone"))
            reconciler.tick()
    assert times == [5, 15, 35]
    world.now = 1000.0
    reconciler.tick()
    world.sources.waiting["hf://acme/sql"].set_result(world.folder)
    until(reconciler, lambda: world.names() == ["sql"])
    assert world.registry.refused == {}


def test_a_wish_taken_back_while_it_comes(world: World) -> None:
    world.write_list("ensurePresent: [{name: sql, source: acme/sql}]")
    reconciler = world.follow()
    reconciler.tick()
    coming = world.sources.waiting["hf://acme/sql"]
    world.write_list("ensurePresent: [{name: sql, source: acme/other}]")
    reconciler.tick()
    assert coming.cancelled()
    world.sources.waiting["hf://acme/other"].set_result(world.folder)
    until(reconciler, lambda: world.names() == ["sql"])
    assert world.registry.get("sql").source == "hf://acme/other"  # type: ignore[union-attr]


def test_the_thread_follows_by_itself(world: World) -> None:
    reconciler = Reconciler(world.manager, directory=world.directory, interval=0.02)
    reconciler.start()
    try:
        world.adapter("a")
        wait_for(lambda: world.names() == ["a"])
    finally:
        reconciler.stop()


def test_what_takes_long_to_register_does_not_keep_it_from_looking(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking has its share of a core; 5,000 adapters that took 25 s to register had 20 minutes of rest after them."""
    pauses: list[float] = []
    register = world.manager.register_unread
    reconciler = Reconciler(world.manager, directory=world.directory, interval=0.02)
    wait = reconciler._stop.wait
    monkeypatch.setattr(reconciler._stop, "wait", lambda pause: (pauses.append(pause), wait(min(pause, 0.02)))[1])

    def slowly(folder: Path) -> AdapterVersion | None:
        threading.Event().wait(0.5)
        return register(folder)

    monkeypatch.setattr(world.manager, "register_unread", slowly)
    reconciler.start()
    try:
        world.adapter("a")
        wait_for(lambda: world.names() == ["a"])
        world.adapter("b")
        wait_for(lambda: world.names() == ["a", "b"])
    finally:
        reconciler.stop()
    assert max(pauses) < 10, "half a second of registering was 25 s of it"


def test_links_in_the_folder_are_followed_as_far_as_it_goes(tmp_path: Path) -> None:
    """With real files: as Kubernetes lays them out, an operator's own within the folder, and one out of it."""
    watched, elsewhere = tmp_path / "adapters", tmp_path / "elsewhere"
    reader = AdapterReader(without_weights(LAYOUT), 1000)
    registry = Registry()
    manager = AdapterManager(registry, Loader(reader.read, lambda digest, image: None, registry), reader.examine)
    write_adapter(watched / "..2026_11_29" / "sql", LAYOUT)
    write_adapter(watched / "..2026_11_30" / "sql", LAYOUT, seed=2)
    (watched / "..data").symlink_to("..2026_11_29")
    (watched / "sql").symlink_to("..data/sql")
    write_adapter(watched / "v3", LAYOUT)
    (watched / "latest").symlink_to(watched / "v3")
    write_adapter(elsewhere, LAYOUT)
    (watched / "out").symlink_to(elsewhere)
    reconciler = Reconciler(manager, directory=watched)
    try:
        until(reconciler, lambda: len(registry.list()) == 3)
        assert [version.name for version in registry.list()] == ["latest", "sql", "v3"]
        refused = registry.refused["out"]
        assert refused.code == "forbidden"
        assert "a link leads out of the folder" in str(refused)
        version = registry.get("sql")
        assert version is not None
        assert version.origin == f"{watched}/sql"
        first = manager.loader.ensure(version).result(LIMIT).digest
        (watched / "..tmp").symlink_to("..2026_11_30")
        (watched / "..tmp").rename(watched / "..data")

        def digest() -> str | None:
            now = registry.get("sql")
            return None if now is None else now.digest

        until(reconciler, lambda: digest() not in (None, first))
        (watched / "out").unlink()
        write_adapter(watched / "out", LAYOUT)
        until(reconciler, lambda: registry.get("out") is not None)
    finally:
        manager.close()
