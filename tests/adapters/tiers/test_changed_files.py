"""Files that are bad, repaired, exchanged or rewritten while adapters are loaded: real files, reader, loader, store."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused
from loraplex.adapters.format import quiet_files
from loraplex.adapters.image.tiles import AdapterImage, BaseLayout
from loraplex.adapters.registry import Registry
from loraplex.adapters.tiers.loader import Loader, Priority
from loraplex.adapters.tiers.reader import AdapterReader
from loraplex.adapters.version import AdapterVersion
from loraplex.kernels.records import Projection
from loraplex.server.models.config import Site
from tests.support.adapter_reading import put, read, same_image, without_weights, write_adapter
from tests.support.ordinary_user import ordinary_user, reachable_folder
from tests.support.refusals import refused
from tests.support.waiting import LIMIT

WEIGHTS = "adapter_model.safetensors"
Q = Projection("self_attn.q_proj", Site.QKV, 64, 0, 64, False)
LAYOUT = BaseLayout("tiny-base", 6, (Q,), 1024, torch.bfloat16)


class Rig:
    """All there is between an adapter's files and the device."""

    def __init__(self) -> None:
        self.reader = AdapterReader(without_weights(LAYOUT), 1000)
        self.registry = Registry()
        self.images: dict[str, AdapterImage] = {}  # in host memory, by digest
        self.loader = Loader(self.reader.read, self.images.__setitem__, self.registry)

    def register(self, folder: Path) -> AdapterVersion:
        """By its header, as from a folder of adapters."""
        return self.registry.register(folder.name, str(folder), self.reader.examine(str(folder)))

    def image(self, version: AdapterVersion) -> AdapterImage:
        image = self.images.get(version.digest or "") or self.loader.ensure(version).result(LIMIT).image
        assert isinstance(image, AdapterImage)
        return image

    def current(self, name: str) -> AdapterVersion:
        version = self.registry.get(name)
        assert version is not None
        return version


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(quiet_files, "CHANGED_WAIT", 1e-3)
    rig = Rig()
    yield rig
    rig.loader.shutdown(LIMIT)


def spoil(folder: Path) -> None:
    """Put a NaN into the weights."""
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    next(iter(tensors.values()))[0, 0] = float("nan")
    put(folder / WEIGHTS, safetensors.torch.save(tensors))


def test_a_bad_adapter_fails_alone_and_works_once_repaired(rig: Rig, tmp_path: Path) -> None:
    good = rig.register(write_adapter(tmp_path / "good", LAYOUT))
    bad_folder = write_adapter(tmp_path / "bad", LAYOUT, seed=2)
    spoil(bad_folder)
    bad = rig.register(bad_folder)
    waiting = [rig.loader.ensure(bad), rig.loader.ensure(good), rig.loader.ensure(bad, Priority.LOOKAHEAD)]
    assert waiting[1].result(LIMIT).digest == good.digest
    for future in (waiting[0], waiting[2], rig.loader.ensure(bad)):
        with refused("not_finite"):
            future.result(LIMIT)
    assert bad.digest is None
    write_adapter(bad_folder, LAYOUT, seed=3)
    assert same_image(rig.image(bad), read(rig.reader, bad_folder, fresh=True).image)
    assert rig.current("bad") is bad, "nobody had to register it again"


def test_exchanged_files_are_served_to_new_requests_and_old_ones_keep_what_was_held(rig: Rig, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", LAYOUT, seed=1)
    old = rig.register(folder)
    lease = rig.registry.lease("a")
    before = rig.image(old)
    assert old.digest is not None
    write_adapter(folder, LAYOUT, seed=2, rank=8)
    assert rig.image(rig.current("a")) is before, "nobody has read the files since"

    del rig.images[old.digest]  # pushed out, and a new request comes
    with refused("changed"):
        rig.image(old)
    new = rig.current("a")
    assert (new.info.rank, new.digest) == (8, read(rig.reader, folder, fresh=True).digest)
    assert new.digest in rig.images, "it has been read already"
    lease.release()
    assert rig.registry.draining() == ()


def test_an_unread_adapter_whose_files_are_exchanged(rig: Rig, tmp_path: Path) -> None:
    """Of the same shape: what comes is what the version is. Of another: it is another version."""
    folder = write_adapter(tmp_path / "a", LAYOUT, seed=1)
    version = rig.register(folder)
    write_adapter(folder, LAYOUT, seed=2)
    rig.image(version)
    assert rig.current("a") is version
    assert version.digest == read(rig.reader, folder, fresh=True).digest

    other = write_adapter(tmp_path / "b", LAYOUT, seed=1)
    version = rig.register(other)
    write_adapter(other, LAYOUT, seed=2, rank=16)
    with refused("changed", "expected another rank"):
        rig.image(version)
    assert rig.current("b").info.rank == 16
    assert len(rig.image(rig.current("b")).pages) == rig.current("b").info.num_pages > version.info.num_pages


@pytest.mark.parametrize("in_place", [False, True])
def test_files_rewritten_under_load(rig: Rig, tmp_path: Path, in_place: bool) -> None:
    """What anybody gets is one of the contents written, whole, and the one its digest names; at the end the last one.

    Renaming a file into its place never refuses anything but with "changed"; writing into it may be caught half way.
    """
    folder = tmp_path / "live" / "a"
    contents: list[bytes] = []
    images: dict[str, AdapterImage] = {}
    for seed in range(4):
        write_adapter(folder, LAYOUT, seed=seed)
        contents.append((folder / WEIGHTS).read_bytes())
        parsed = read(rig.reader, folder, fresh=True)
        images[parsed.digest] = parsed.image
    rig.register(folder)
    stop = threading.Event()
    written = [0]
    turns = threading.Semaphore(0)

    def write() -> None:
        while turns.acquire(timeout=LIMIT) and not stop.is_set():
            content = contents[written[0] % len(contents)]
            written[0] += 1
            if in_place:
                with (folder / WEIGHTS).open("r+b") as file:
                    file.write(content)
            else:
                put(folder / WEIGHTS, content)

    served: list[str] = []
    codes: set[str] = set()

    def serve(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            if chance.random() < 0.5:
                turns.release()
            with rig.registry.lease("a") as lease:
                try:
                    image = rig.image(lease.version)
                except AdapterRefused as error:
                    codes.add(error.code)
                    continue
                digest = lease.version.digest
                assert digest is not None
                assert same_image(image, images[digest])
                served.append(digest)
                if chance.random() < 0.5:
                    rig.images.pop(digest, None)

    failures: list[BaseException] = []

    def guarded(seed: int) -> None:
        try:
            serve(seed)
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    servers = [threading.Thread(target=guarded, args=(seed,)) for seed in range(3)]
    for thread in (writer, *servers):
        thread.start()
    for thread in servers:
        thread.join(LIMIT)
    stop.set()
    turns.release()
    writer.join(LIMIT)
    assert failures == []
    assert len(set(served)) > 1
    assert codes <= {"changed", "bad_file"} if in_place else codes <= {"changed"}
    write_adapter(folder, LAYOUT, seed=9)
    last = read(rig.reader, folder, fresh=True)
    rig.images.clear()
    for _ in range(2):  # the first may find that the files have changed
        try:
            assert same_image(rig.image(rig.current("a")), last.image)
        except AdapterRefused as error:
            assert error.code == "changed"  # noqa: PT017
    assert rig.current("a").digest == last.digest
    assert rig.registry.draining() == ()


@pytest.mark.parametrize("harm", ["cut short", "emptied", "deleted", "folder deleted", "made a folder", "shut"])
def test_a_folder_that_is_harmed_while_loads_run(harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, at any moment of a load: it is refused by name, or has the right bytes."""
    monkeypatch.setattr(quiet_files, "CHANGED_RETRIES", 2)
    with reachable_folder() as place:
        place.chmod(0o777)
        with ordinary_user():
            _harm_while_loading(place / "sql", harm)


def _harm_while_loading(path: Path, harm: str) -> None:
    folder = write_adapter(path, LAYOUT)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    own = AdapterReader(without_weights(LAYOUT), 1000)
    digest = read(own, folder).digest
    over = threading.Event()

    def harm_and_mend() -> None:
        while not over.is_set():
            _harm(folder, harm)
            _mend(folder, files)

    thread = threading.Thread(target=harm_and_mend)
    thread.start()
    seen = set()
    try:
        for i in range(150):
            try:
                seen.add(read(own, folder, fresh=i % 2 == 0).digest)
            except (AdapterRefused, AdapterNotFound) as error:
                seen.add(type(error).__name__)
    finally:
        over.set()
        thread.join()
    assert seen <= {digest, "AdapterRefused", "AdapterNotFound", "ChangedMeanwhile"}
    assert read(own, folder).digest == digest


def _harm(folder: Path, how: str) -> None:
    weights = folder / WEIGHTS
    match how:
        case "cut short":
            os.truncate(weights, 5000)
        case "emptied":
            os.truncate(weights, 0)
        case "deleted":
            weights.unlink()
        case "folder deleted":
            shutil.rmtree(folder)
        case "made a folder":
            weights.unlink()
            weights.mkdir()
        case "shut":
            folder.chmod(0)


def _mend(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    if (folder / WEIGHTS).is_dir():
        (folder / WEIGHTS).rmdir()
    for name, content in files.items():
        put(folder / name, content)
