"""AdapterReader: what is read, what is remembered, and that nothing remembered outlives the files it is about."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from loraplex.adapters.errors import AdapterNotFound
from loraplex.adapters.files import beneath
from loraplex.adapters.files.beneath import below
from loraplex.adapters.format import adapter_files, quiet_files
from loraplex.adapters.format.kinds import KINDS
from loraplex.adapters.image.tiles import BaseLayout
from loraplex.adapters.tiers.loader import LoadCancelled, Reading
from loraplex.adapters.tiers.reader import AdapterReader
from loraplex.kernels.records import Projection
from loraplex.server.models.config import Site
from tests.support.adapter_reading import no_breath, put, read, same_image, without_weights, write_adapter
from tests.support.refusals import refused

PROJECTIONS = (
    Projection("self_attn.q_proj", Site.QKV, 32, 0, 32, False),
    Projection("mlp.down_proj", Site.DOWN, 64, 0, 32, False),
)
LAYOUT = BaseLayout("tiny-base", 12, PROJECTIONS, 1024, torch.bfloat16)
WEIGHTS = "adapter_model.safetensors"


def make_reader(max_pages: int = 1000, **options: Any) -> AdapterReader:
    return AdapterReader(without_weights(LAYOUT), max_pages, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "a", LAYOUT)


@pytest.fixture
def whole_readings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were read whole: parsed, hashed and checked."""
    calls: list[Path] = []
    real = adapter_files.read_bytes

    def read_bytes(folder: Path, *rest: Any) -> Any:
        calls.append(folder)
        return real(folder, *rest)

    monkeypatch.setattr(quiet_files, "read_bytes", read_bytes)
    return calls


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are old enough to be known by their stamps."""
    monkeypatch.setattr(adapter_files, "SETTLED_SECONDS", -math.inf)


def change_value(folder: Path, value: float) -> None:
    """One value of one tensor, and nothing else of the file."""
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    tensors["base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"][5, 1] = value
    put(folder / WEIGHTS, safetensors.torch.save(tensors))


def test_examining_reads_no_weights(folder: Path, whole_readings: list[Path]) -> None:
    file = folder / WEIGHTS
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:start])
    os.truncate(file, len(data))  # a hole where the weights were: all zero
    info = make_reader().examine(str(folder))
    assert (info.rank, info.targets) == (4, ("q_proj", "down_proj"))
    assert info.nbytes == 12 * 4 * 2 * (32 + 32 + 64 + 32)
    assert info.num_pages == math.ceil(info.nbytes / 1024)
    assert whole_readings == []
    with refused("no_effect", rf"^{folder}: .*lora_B is zero|lora_A is zero"):
        read(make_reader(), folder)


@pytest.mark.usefixtures("settled")
def test_files_that_did_not_change_are_neither_parsed_nor_hashed_again(
    folder: Path, whole_readings: list[Path]
) -> None:
    own = make_reader()
    first, again = read(own, folder), read(own, folder)
    assert len(whole_readings) == 1
    assert same_image(first.image, again.image)
    assert replace(first, image=None) == replace(again, image=None)
    assert first.bytes_read == (folder / WEIGHTS).stat().st_size - 8 - int.from_bytes(
        (folder / WEIGHTS).read_bytes()[:8], "little"
    )
    read(own, folder, fresh=True)
    assert len(whole_readings) == 2


def test_files_changed_a_moment_ago_are_hashed_again(folder: Path, whole_readings: list[Path]) -> None:
    """A write within the same tick of the file system's clock would not show."""
    own = make_reader()
    assert read(own, folder).digest == read(own, folder).digest
    assert len(whole_readings) == 2


def test_when_a_stamp_is_settled() -> None:
    stamp = adapter_files.Stamp((1, 2, 3, 5_000_000_000, 4_000_000_000), (1, 2, 3, 1_000_000_000, 7_000_000_000))
    assert stamp.latest == 7.0
    assert not stamp.is_settled(now=8.9)
    assert stamp.is_settled(now=9.1)
    assert not stamp.is_settled(now=0.0), "from a server whose clock is ahead"


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", ["weights", "config", "in place", "older"])
def test_files_that_changed_are_read_whole(folder: Path, whole_readings: list[Path], change: str) -> None:
    own = make_reader()
    before = read(own, folder)
    if change == "config":
        config = json.loads((folder / "adapter_config.json").read_text())
        put(folder / "adapter_config.json", json.dumps({**config, "lora_alpha": 16}).encode())
    elif change == "in place":
        data = bytearray((folder / WEIGHTS).read_bytes())
        data[-1] ^= 0x80  # the sign of the last value
        with (folder / WEIGHTS).open("r+b") as file:
            file.write(data)
        os.utime(folder / WEIGHTS, (1e9, 1e9))
    else:
        change_value(folder, 2.5)
        if change == "older":  # as from a backup
            os.utime(folder / WEIGHTS, (1e9, 1e9))
    after = read(own, folder)
    assert len(whole_readings) == 2
    assert after.digest != before.digest
    assert not same_image(before.image, after.image)
    assert same_image(after.image, read(make_reader(), folder).image)


@pytest.mark.usefixtures("settled")
def test_the_same_content_in_new_files_has_the_same_digest(folder: Path, whole_readings: list[Path]) -> None:
    own = make_reader()
    before = read(own, folder).digest
    put(folder / WEIGHTS, (folder / WEIGHTS).read_bytes())
    assert read(own, folder).digest == before
    read(own, folder)
    assert len(whole_readings) == 2


@pytest.mark.usefixtures("settled")
def test_a_refusal_holds_until_the_files_change(folder: Path, whole_readings: list[Path]) -> None:
    own = make_reader()
    change_value(folder, math.nan)
    for _ in range(3):
        with refused("not_finite", rf"^{folder}: base_model.*layers\.3\.mlp.*NaN"):
            read(own, folder)
    assert len(whole_readings) == 1
    (known,) = own._remembered._values.values()
    assert known.refusal is not None
    assert known.refusal.__traceback__ is None, "its frames hold the file's bytes"
    change_value(folder, 1.0)
    assert read(own, folder).info.num_pages > 0
    assert len(whole_readings) == 2


@pytest.mark.parametrize("changes", [0, 1, 3, 1000])
def test_files_changed_a_moment_ago_are_looked_at_once_more(
    folder: Path, whole_readings: list[Path], monkeypatch: pytest.MonkeyPatch, changes: int
) -> None:
    """Somebody may be writing to them, which need not show within a tick of the clock."""
    left = [changes]

    def sleep(seconds: float) -> None:
        assert seconds == quiet_files.CHANGED_WAIT
        if left[0]:
            left[0] -= 1
            change_value(folder, float(left[0]))

    monkeypatch.setattr(quiet_files, "CHANGED_WAIT", 1000.0)
    monkeypatch.setattr(quiet_files.time, "sleep", sleep)
    if changes == 1000:
        with refused("bad_file"):
            read(make_reader(), folder)
        assert len(whole_readings) == quiet_files.CHANGED_RETRIES
        return
    first = read(make_reader(), folder)
    assert len(whole_readings) == changes + 1
    assert same_image(first.image, read(make_reader(), folder).image)


@pytest.mark.usefixtures("settled")
def test_one_cut_short_between_two_readings(folder: Path) -> None:
    own = make_reader()
    read(own, folder)
    put(folder / WEIGHTS, (folder / WEIGHTS).read_bytes()[:-4])
    with refused("bad_file"):
        read(own, folder)


@pytest.mark.usefixtures("settled")
def test_a_folder_that_is_gone(folder: Path) -> None:
    own = make_reader()
    read(own, folder)
    (folder / WEIGHTS).unlink()
    with refused("missing_file"):
        read(own, folder)
    (folder / "adapter_config.json").unlink()
    folder.rmdir()
    with pytest.raises(AdapterNotFound, match="there is no folder"):
        read(own, folder)


@pytest.mark.usefixtures("settled")
def test_a_source_is_located_once_and_when_told_to(folder: Path) -> None:
    asked: list[str] = []
    own = make_reader(locate=lambda source: (asked.append(source), folder)[1])
    for _ in range(3):
        own.read(Reading("acme/sql", False, no_breath))
    assert asked == ["acme/sql"]
    own.read(Reading("acme/sql", True, no_breath))
    assert len(asked) == 2


def count_plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One more entry for every config and header that are checked against the base."""
    planned: list[int] = []
    lora = KINDS["lora"]
    real = lora.plan
    monkeypatch.setattr(lora, "plan", lambda *args: (planned.append(1), real(*args))[1])
    return planned


def test_adapters_of_one_shape_share_what_is_known_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = count_plans(monkeypatch)
    own = make_reader()
    for i in range(6):
        folder = write_adapter(tmp_path / str(i), LAYOUT, seed=i, rank=(4, 8)[i % 2])
        config = json.loads((folder / "adapter_config.json").read_text())
        put(folder / "adapter_config.json", json.dumps({**config, "base_model_name_or_path": f"/home/{i}"}).encode())
        assert own.examine(str(folder)).rank == (4, 8)[i % 2]
        read(own, folder)
    assert len(planned) == 2


def test_too_large_is_found_out_early(folder: Path, whole_readings: list[Path]) -> None:
    own = make_reader(max_pages=2)
    with refused("too_large", rf"^{folder}: .*takes 15 pages, but only 2"):
        own.examine(str(folder))
    assert whole_readings == []
    with refused("too_large"):
        read(own, folder)


def test_a_reading_can_be_given_up_anywhere(folder: Path) -> None:
    """Whichever breath is the last one, and the next reading knows nothing of it."""
    own, calls = make_reader(), 0

    def count() -> None:
        nonlocal calls
        calls += 1

    expected = make_reader().read(Reading(str(folder), False, count))
    assert calls > 4
    for last in range(calls):
        left = [last]

        def throttle(left: list[int] = left) -> None:
            if left[0] == 0:
                raise LoadCancelled("enough")
            left[0] -= 1

        with pytest.raises(LoadCancelled):
            AdapterReader(without_weights(LAYOUT), 1000).read(Reading(str(folder), False, throttle))
        with pytest.raises(LoadCancelled):
            own.read(Reading(str(folder), True, throttle))
    assert same_image(read(own, folder).image, expected.image)


def test_what_registration_asks_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call gives up the GIL, and beside an engine at work may wait for it: 5,000 folders at once took 25 s."""
    folder = write_adapter(tmp_path / "sql", LAYOUT)
    own = make_reader()
    calls: list[str] = []
    for name in ("open", "read", "fstat", "close", "stat", "scandir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _n=name, _r=real, **k: (calls.append(_n), _r(*a, **k))[1])
    for _ in range(2):
        calls.clear()
        assert own.examine(below(tmp_path, "sql")).rank
    assert len(calls) <= 15 + 2 * (not beneath._has_openat2()) * 4, calls  # 3 of them: is there a tokenizer?
    assert calls.count("read") == 3
    assert folder.is_dir()


def test_adapters_that_differ_in_scaling_are_registered_by_one_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = count_plans(monkeypatch)
    own = make_reader()
    for alpha in range(1, 30):
        assert own.examine(str(write_adapter(tmp_path / str(alpha), LAYOUT, alpha=alpha))).rank == 4
    assert len(planned) == 1
    images = [read(own, tmp_path / str(alpha)).image for alpha in (1, 2)]
    assert not same_image(*images), "the scaling is in the image"
    folder = write_adapter(tmp_path / "odd", LAYOUT)
    config = json.loads((folder / "adapter_config.json").read_text())
    put(folder / "adapter_config.json", json.dumps({**config, "alpha_pattern": {"(": 2}}).encode())
    with refused("bad_config"):
        own.examine(str(folder))
