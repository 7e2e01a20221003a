"""What comes over the network is on disk while it is wanted, within bounds, and nothing of it is left afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex.adapters.sources.remote import CONFIG_FILE, WEIGHTS_FILE
from loraplex.adapters.sources.spool import CONFIG_KEY, NoRoom, Spool
from tests.support.full_disk import full_disk
from tests.support.refusals import refused


def file_with(metadata: object) -> bytes:
    header = json.dumps(
        {"__metadata__": metadata, "t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    ).encode()
    return len(header).to_bytes(8, "little") + header + b"data"


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_both_files_come_in_pieces(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)
    with spool.begin() as coming:
        for name, data in ((WEIGHTS_FILE, b"ab"), (CONFIG_FILE, b"{"), (WEIGHTS_FILE, b"c"), (CONFIG_FILE, b"}")):
            coming.write(name, data)
        source = coming.finish()
    assert (Path(source) / WEIGHTS_FILE).read_bytes() == b"abc"
    assert (Path(source) / CONFIG_FILE).read_bytes() == b"{}"
    assert (spool.size_of(source), spool.used_bytes) == (5, 5)
    spool.remove(source)
    assert (spool.size_of(source), spool.used_bytes, files_below(tmp_path)) == (0, 0, [])


def test_the_config_is_read_out_of_the_header(tmp_path: Path) -> None:
    with Spool(tmp_path, 1000).begin() as coming:
        coming.write(WEIGHTS_FILE, file_with({"format": "pt", CONFIG_KEY: '{"r": "ä"}'}))
        source = coming.finish()
    assert (Path(source) / CONFIG_FILE).read_text() == '{"r": "ä"}'


@pytest.mark.parametrize(
    ("code", "weights"),
    [
        ("missing_file", b""),
        ("bad_file", b"\x00"),
        ("bad_file", (1 << 40).to_bytes(8, "little") + b"{}"),
        ("bad_file", (3).to_bytes(8, "little") + b"{]}"),
        ("bad_file", (9).to_bytes(8, "little") + b"{}"),
        ("missing_file", (2).to_bytes(8, "little") + b"[]"),
        ("missing_file", file_with({"format": "pt"})),
        ("missing_file", file_with({CONFIG_KEY: {"r": 8}})),
        ("missing_file", file_with([CONFIG_KEY])),
    ],
)
def test_no_config(tmp_path: Path, code: str, weights: bytes) -> None:
    spool = Spool(tmp_path, 1000)
    coming = spool.begin()
    if weights:
        coming.write(WEIGHTS_FILE, weights)
    with refused(code):
        coming.finish()
    assert (spool.used_bytes, files_below(tmp_path)) == (0, [])


def test_what_does_not_come_to_its_end_is_removed(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)
    with spool.begin() as coming:
        coming.write(WEIGHTS_FILE, b"half")
    coming.write(WEIGHTS_FILE, b"from a thread that has not heard of it")
    assert (spool.used_bytes, files_below(tmp_path)) == (0, [])


def test_all_together_are_bounded(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 10)
    with spool.begin() as first, spool.begin() as second:
        first.write(WEIGHTS_FILE, b"123456")
        second.write(WEIGHTS_FILE, b"1234")
        with pytest.raises(NoRoom, match="--pushed-bytes"):
            second.write(WEIGHTS_FILE, b"5")
        second.discard()
        first.write(WEIGHTS_FILE, b"7890")
    assert spool.used_bytes == 0


def test_a_full_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)
    with pytest.raises(NoRoom), spool.begin() as coming, full_disk():
        coming.write(WEIGHTS_FILE, b"1")
    assert (spool.used_bytes, files_below(tmp_path)) == (0, [])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NoRoom, match="File exists"):
        Spool(tmp_path / "file", 1000).begin()


def test_other_folders_are_nobodys(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", 1000)
    other = tmp_path / "other"
    other.mkdir()
    spool.remove(str(other))
    assert other.is_dir()
    assert spool.size_of(str(other)) == 0


def test_a_process_folder_goes_with_the_spool_and_a_kept_one_stays(tmp_path: Path) -> None:
    def push(spool: Spool) -> str:
        with spool.begin() as coming:
            coming.write(WEIGHTS_FILE, b"w")
            coming.write(CONFIG_FILE, b"c")
            return coming.finish()

    own, kept = Spool(tmp_path / "own", 1000), Spool(tmp_path / "kept", 1000, keep=True)
    source, wanted, unwanted = push(own), push(kept), push(kept)
    (tmp_path / "kept" / "half").mkdir()
    own.close()
    assert not Path(source).exists()
    again = Spool(tmp_path / "kept", 1000, keep=True)
    again.keep_only({wanted, str(tmp_path / "kept" / "half"), "/elsewhere"})
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [Path(wanted).name]
    assert not Path(unwanted).exists()
    assert (again.size_of(wanted), again.used_bytes) == (2, 2)
