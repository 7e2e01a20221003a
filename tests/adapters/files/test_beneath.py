"""What is opened below a folder lies below it: whatever links there are, and while somebody exchanges them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from loraplex.adapters.errors import AdapterError, AdapterNotFound
from loraplex.adapters.files import beneath
from loraplex.adapters.files.beneath import below, opened, roots_of, shown
from loraplex.adapters.image.tiles import BaseLayout
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry
from loraplex.adapters.sources.watch import FolderWatch
from loraplex.adapters.tiers.loader import Reading
from loraplex.adapters.tiers.reader import AdapterReader
from loraplex.kernels.records import Projection
from loraplex.server.models.config import Site
from tests.support.adapter_reading import read, without_weights, write_adapter
from tests.support.exchanging import exchanging
from tests.support.refusals import refused

LAYOUT = BaseLayout("tiny-base", 2, (Projection("self_attn.q_proj", Site.QKV, 32, 0, 32, False),), 1024, torch.float32)
CONFIG = "adapter_config.json"
EXCHANGES = 300


@pytest.fixture(params=["openat2", "walk"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to open: in one call, and where a system has no such call."""
    if request.param == "walk":
        monkeypatch.setattr(beneath, "_has_openat2", lambda: False)
    elif not beneath._has_openat2():
        pytest.skip("this system has no openat2")
    return str(request.param)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a file in every place a link may lead to, and a secret beside it."""
    (tmp_path / "root" / "sql" / "..old").mkdir(parents=True)
    (tmp_path / "root" / "other").mkdir()
    (tmp_path / "root-2").mkdir()
    for place in ("root/sql", "root/sql/..old", "root/other", "root-2", "."):
        (tmp_path / place / "file").write_text("secret" if place in (".", "root-2") else "good")
    return tmp_path / "root"


def content(folder: Path, name: str, roots: tuple[Path, ...]) -> str:
    with opened(folder, roots) as place, place.open(name) as (handle, _):
        return os.read(handle, 100).decode()


@pytest.mark.parametrize("target", ["file", "..old/file", "../other/file", "ROOT/other/file"])
def test_links_that_stay_are_followed(root: Path, target: str, way: str) -> None:
    (root / "sql" / "link").symlink_to(target.replace("ROOT", str(root)))
    (root / "sql" / "again").symlink_to("./link")
    for name in ("link", "again"):
        assert content(root / "sql", name, (root,)) == "good"
        with opened(root / "sql", (root,)) as place:
            assert place.stat(name).st_size == 4
            assert place.has(name)


@pytest.mark.parametrize(
    "target", ["../../file", "ROOT/../file", "ROOT-2/file", "/proc/self/root/etc/hostname", "../../root/sql/file", "/"]
)
def test_links_that_leave_are_not(root: Path, target: str, way: str) -> None:
    (root / "sql" / "link").symlink_to(target.replace("ROOT", str(root)))
    (root / "sql" / "again").symlink_to("link")
    for name in ("link", "again", "../../file"):
        with pytest.raises(OSError, match="device link") as caught:
            content(root / "sql", name, (root,))
        assert caught.value.errno == errno.EXDEV
        with opened(root / "sql", (root,)) as place:
            assert not place.has(name)


def test_links_in_circles(root: Path, way: str) -> None:
    (root / "sql" / "one").symlink_to("two")
    (root / "sql" / "two").symlink_to("one")
    with pytest.raises(OSError, match="symbolic links"):
        content(root / "sql", "one", (root,))


def test_the_root_itself_may_be_a_link_and_what_is_below_a_second_one_none(root: Path, way: str) -> None:
    queue_limits = root.parent / "door"
    queue_limits.symlink_to(root)
    assert content(queue_limits / "sql", "file", (queue_limits,)) == "good"
    (root / "sql" / "absolute").symlink_to(queue_limits / "other" / "file")
    assert content(queue_limits / "sql", "absolute", (queue_limits,)) == "good"
    (root / "alias").symlink_to("other")
    assert content(queue_limits / "alias", "file", (queue_limits,)) == "good"
    assert content(queue_limits / "other", "file", (queue_limits, queue_limits / "other")) == "good"
    with pytest.raises(OSError, match="symbolic links"):
        content(queue_limits / "alias", "file", (queue_limits, queue_limits / "alias"))
    with pytest.raises(OSError, match="device link"):
        content(queue_limits / "sql", "absolute", (queue_limits, queue_limits / "sql"))


def test_what_is_no_file_is_not_opened(root: Path, way: str) -> None:
    os.mkfifo(root / "sql" / "fifo")
    for name in ("fifo", "..old", "absent"):
        for roots in ((root,), ()):
            with pytest.raises(FileNotFoundError):
                content(root / "sql", name, roots)


def test_a_source_says_how_far_links_may_lead() -> None:
    assert roots_of("/srv/sql") == ()
    assert roots_of(below("/srv", "sql")) == (Path("/srv"),)
    assert roots_of(below("/srv", "sql", "last")) == (Path("/srv"), Path("/srv/sql"))
    assert roots_of("https://host/./a") == ()
    assert shown(below("/srv", "sql")) == "/srv/sql"
    assert Path(below("/srv", "sql")) == Path("/srv/sql")


@pytest.mark.parametrize("level", ["the folder", "one above it"])
def test_a_folder_exchanged_for_a_link_meanwhile(tmp_path: Path, level: str, way: str) -> None:
    """Every way to read it, again and again: what is read is never what the link leads to."""
    own = write_adapter(tmp_path / "root" / "acme" / "sql", LAYOUT, seed=1)
    theirs = write_adapter(tmp_path / "theirs" / "sql", LAYOUT, seed=2)
    reader = AdapterReader(without_weights(LAYOUT), 1000)
    good, secret = (read(reader, folder).digest for folder in (own, theirs))
    source = below(tmp_path / "root", "acme/sql")
    moved, target = (own, theirs) if level == "the folder" else (own.parent, theirs.parent)
    seen, told = set(), [""]
    with exchanging(moved, target):
        for i in range(EXCHANGES):
            try:
                seen.add(_read(reader, source, fresh=i % 2 == 0))
                reader.examine(source)
            except AdapterError as error:
                told.append(str(error))
    seen.add(_read(reader, source))
    assert secret not in seen
    assert "theirs" not in "".join(told)
    assert seen == {good}


def _read(reader: AdapterReader, source: str, fresh: bool = False) -> str:
    return reader.read(Reading(source, fresh, lambda: None)).digest


def test_files_that_are_links_out(tmp_path: Path, way: str) -> None:
    """The folder is its owner's own; the weights are another's."""
    own = write_adapter(tmp_path / "root" / "sql", LAYOUT, seed=1)
    theirs = write_adapter(tmp_path / "theirs", LAYOUT, seed=2)
    reader = AdapterReader(without_weights(LAYOUT), 1000)
    for name in (CONFIG, "adapter_model.safetensors"):
        kept = (own / name).rename(own / "kept")
        (own / name).symlink_to(theirs / name)
        for look in (reader.examine, lambda source: _read(reader, source)):
            with refused("forbidden", f"{name}: a link leads out .* put the files there"):
                look(below(tmp_path / "root", "sql"))
        kept.rename(own / name)
    assert _read(reader, below(tmp_path / "root", "sql"))


def test_a_folder_that_is_a_link_out(tmp_path: Path, way: str) -> None:
    write_adapter(tmp_path / "theirs", LAYOUT)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "sql").symlink_to(tmp_path / "theirs")
    reader = AdapterReader(without_weights(LAYOUT), 1000)
    with refused("forbidden"):
        reader.examine(below(tmp_path / "root", "sql"))
    assert reader.examine(str(tmp_path / "root" / "sql")), "the operator's own word"
    with pytest.raises(AdapterNotFound, match="there is no folder"):
        reader.examine(below(tmp_path / "root", "gone"))


def test_watched_folders_see_no_further_either(tmp_path: Path, way: str) -> None:
    """A link out is told of, with nothing of what it leads to: files that change there change nothing here."""
    theirs = write_adapter(tmp_path / "theirs", LAYOUT)
    watched = tmp_path / "root"
    write_adapter(watched / "good", LAYOUT)
    (watched / "alias").symlink_to("good")
    (watched / "out").symlink_to(theirs)
    watch = FolderWatch(watched)
    assert watch.look() == []
    assert [change.folder.name for change in watch.look()] == ["alias", "good", "out"]
    write_adapter(theirs, LAYOUT, seed=2)
    assert [watch.look(), watch.look()] == [[], []]
    write_adapter(watched / "good", LAYOUT, seed=2)
    assert watch.look() == []
    assert [change.folder.name for change in watch.look()] == ["alias", "good"]


def test_what_is_shown_of_a_version_is_a_path() -> None:
    version = Registry().register("sql", below("/srv", "sql"), AdapterInfo(1, ("q_proj",), 1, 1))
    assert version.origin == "/srv/sql"
