"""Adding, replacing and removing adapters by name, over a reader that finds a number in a file."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from loraplex.adapters.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterRefused,
    InvalidAdapterName,
)
from loraplex.adapters.registry import Registry
from loraplex.adapters.tiers.loader import LoadedContent, Loader, Reading
from loraplex.adapters.tiers.reader import AdapterInfo
from loraplex.adapters.version import AdapterVersion
from loraplex.server.catalog.manager import AdapterManager
from tests.support.refusals import refused
from tests.support.version_world import register_all


class Reader:
    """The number is the pages of the adapter; up to 10 can be had. Those that end with 7 have bad values."""

    def __init__(self) -> None:
        self.read_whole: list[str] = []

    def examine(self, source: str) -> AdapterInfo:
        assert threading.current_thread() is not threading.main_thread(), "files are the background's work"
        path = Path(source) / "adapter_config.json"
        if not path.exists():
            raise AdapterNotFound(f"there is no folder {source!r}")
        text = path.read_text()
        if not text.isdecimal():
            raise AdapterRefused("bad_config", f"{source}: {text!r} is no number")
        if int(text) > 10:
            raise AdapterRefused("too_large", f"{source} takes {text} pages, but only 10 can be had")
        return AdapterInfo(4, ("q_proj",), int(text), 100)

    def read(self, reading: Reading) -> LoadedContent:
        self.read_whole.append(Path(reading.source).name)
        info = self.examine(reading.source)
        if info.num_pages == 7:
            raise AdapterRefused("not_finite", f"{reading.source} has NaN")
        return LoadedContent(replace(info, digest=f"digest-{info.num_pages}"), object())


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def manager(reader: Reader) -> Iterator[AdapterManager]:
    registry = Registry()
    result = AdapterManager(registry, Loader(reader.read, lambda digest, image: None, registry), reader.examine)
    yield result
    result.close()


def adapter(folder: Path, name: str, text: str = "3") -> str:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "adapter_config.json").write_text(text)
    return str(folder / name)


async def test_register_and_unregister(manager: AdapterManager, tmp_path: Path) -> None:
    source = adapter(tmp_path, "a")
    version = await manager.register("tenant/a", source)
    assert (version.name, version.digest, version.source, version.info.num_pages) == ("tenant/a", "digest-3", source, 3)
    assert manager.registry.list() == (version,)
    assert manager.registry.unregister("tenant/a") == version
    assert manager.registry.list() == ()
    with pytest.raises(AdapterNotFound):
        manager.registry.unregister("tenant/a")


async def test_a_taken_name(manager: AdapterManager, tmp_path: Path) -> None:
    first = await manager.register("a", adapter(tmp_path, "a", "3"))
    other = adapter(tmp_path, "b", "4")
    with pytest.raises(AdapterExists, match="'a' is already loaded"):
        await manager.register("a", other)
    assert manager.registry.get("a") == first
    assert (await manager.register("a", other, replace=True)).digest == "digest-4"
    adapter(tmp_path, "b", "5")
    assert (await manager.register("a", other, replace=True)).digest == "digest-5", "the files are read again"


async def test_what_is_expected_is_on_its_way_until_it_is_there_or_fails(
    manager: AdapterManager, tmp_path: Path
) -> None:
    coming: list[Future[AdapterVersion]] = [Future(), Future()]
    for name, future in zip(("acme/a", "acme/b"), coming, strict=True):
        manager.expect(name, future)
    assert set(manager.coming()) == {"acme/a", "acme/b"}
    coming[0].set_result(await manager.register("acme/a", adapter(tmp_path, "a")))
    assert manager.coming() == ("acme/b",)
    coming[1].set_exception(AdapterNotFound("gone"))
    assert manager.coming() == ()


@pytest.mark.parametrize(("text", "code"), [("not a number", "bad_config"), ("11", "too_large"), ("7", "not_finite")])
async def test_nothing_is_registered_when_it_is_refused(
    manager: AdapterManager, tmp_path: Path, text: str, code: str
) -> None:
    with refused(code):
        await manager.register("a", adapter(tmp_path, "folder", text))
    assert manager.registry.list() == ()
    assert manager.registry.refusals.counts()[code] == 1


async def test_what_is_no_name_and_what_is_no_folder(manager: AdapterManager, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapterName):
        await manager.register("no spaces", adapter(tmp_path, "folder"))
    with pytest.raises(AdapterNotFound):
        await manager.register("a", str(tmp_path / "nowhere"))
    assert manager.registry.list() == ()
    assert not any(manager.registry.refusals.counts().values())


async def test_a_folder_of_adapters(manager: AdapterManager, reader: Reader, tmp_path: Path) -> None:
    for name, text in (("b", "2"), ("a", "1"), ("bad", "x"), ("huge", "99"), ("no name", "1"), ("nan", "7")):
        adapter(tmp_path, name, text)
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    versions = await asyncio.to_thread(register_all, manager, tmp_path)
    assert [version.name for version in versions] == ["a", "b", "nan"]
    assert [version.digest for version in versions] == [None, None, None]
    assert reader.read_whole == [], "a folder of thousands is not read"
    assert {name: error.code for name, error in manager.registry.refused.items()} == {
        "bad": "bad_config",
        "huge": "too_large",
    }
    with refused("bad_config", "is no number"):
        manager.registry.lease("bad")
    assert await asyncio.to_thread(register_all, manager, tmp_path) == [], "those there are stay as they are"
    assert [version.name for version in manager.registry.list()] == ["a", "b", "nan"]


async def test_what_is_wrong_with_the_values_fails_who_wants_them(
    manager: AdapterManager, reader: Reader, tmp_path: Path
) -> None:
    source = adapter(tmp_path, "nan", "7")
    (version,) = await asyncio.to_thread(register_all, manager, tmp_path)
    with refused("not_finite"):
        await asyncio.wrap_future(manager.loader.ensure(version))
    with refused("not_finite"):
        await manager.register("other", source)
    assert [version.name for version in manager.registry.list()] == ["nan"]


async def test_each_refusal_is_counted_once_by_its_reason(manager: AdapterManager, tmp_path: Path) -> None:
    adapter(tmp_path, "a", "7")
    adapter(tmp_path, "b", "12")
    (version,) = await asyncio.to_thread(register_all, manager, tmp_path)  # "a" by its header alone; "b" is refused
    with refused("not_finite"):
        await asyncio.wrap_future(manager.loader.ensure(version))
    counts = {reason: count for reason, count in manager.registry.refusals.counts().items() if count}
    assert counts == {"too_large": 1, "not_finite": 1}
