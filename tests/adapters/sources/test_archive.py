"""Archives that strangers made: the two files and nothing else, or a refusal."""

from __future__ import annotations

import gzip
import io
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.sources.archive import unpack
from tests.support.adapter_archives import CONFIG, FILES, WEIGHTS, tar
from tests.support.refusals import refused


def odd(name: str, kind: bytes, target: str = "") -> Callable[[tarfile.TarFile], None]:
    def add(out: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        out.addfile(info)

    return add


def attempt(folder: Path, data: bytes, limit: int = 10 << 20) -> dict[str, bytes]:
    archive, out = folder / "archive", folder / "out"
    archive.write_bytes(data)
    out.mkdir()
    unpack(archive, out, limit, lambda: None)
    assert sorted(path.name for path in folder.iterdir()) == ["archive", "out"]
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("prefix", ["", "./", "sql/", "a/b/c/"])
def test_the_two_files_are_taken_and_nothing_else(tmp_path: Path, pack: Callable[[bytes], bytes], prefix: str) -> None:
    files = {f"{prefix}{name}": content for name, content in FILES.items()}
    more = {f"{prefix}README.md": b"hello", f"{prefix}train.bin": b"x", f"{prefix}deep/er/optimizer.pt": b"y"}
    assert attempt(tmp_path, pack(tar({**more, **files}))) == FILES


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("../evil", tarfile.REGTYPE, ""),
        ("/etc/evil", tarfile.REGTYPE, ""),
        ("a/../../evil", tarfile.REGTYPE, ""),
        ("a\\..\\evil", tarfile.REGTYPE, ""),
        ("link", tarfile.SYMTYPE, "/etc/passwd"),
        ("adapter_config.json", tarfile.SYMTYPE, "/etc/passwd"),
        ("adapter_config.json", tarfile.LNKTYPE, "/etc/passwd"),
        ("dev", tarfile.CHRTYPE, ""),
        ("dev", tarfile.BLKTYPE, ""),
        ("pipe", tarfile.FIFOTYPE, ""),
    ],
)
def test_archives_that_try_something_are_refused_whole(tmp_path: Path, name: str, kind: bytes, target: str) -> None:
    with refused("forbidden"):
        attempt(tmp_path, tar(FILES, odd(name, kind, target)))


def test_bombs_are_bounded(tmp_path: Path) -> None:
    zeros = gzip.compress(bytes(50 << 20), 9)  # 50 KB
    bomb = gzip.compress(tar({"README.md": bytes(50 << 20), **FILES}), 9)
    for i, data in enumerate((bomb, zeros, gzip.compress(tar({"adapter_config.json": bytes(50 << 20)}), 9))):
        folder = tmp_path / str(i)
        folder.mkdir()
        with pytest.raises(AdapterRefused) as caught:
            attempt(folder, data)
        assert caught.value.code in ("too_large", "bad_file", "missing_file")
        assert sum(path.stat().st_size for path in (folder / "out").iterdir()) <= 10 << 20


def test_a_header_that_wants_memory_is_refused(tmp_path: Path) -> None:
    """A pax header is read whole: one of 64 MiB would be there in memory, and one of terabytes is one line of hex."""

    def huge(out: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, 64 << 20
        assert out.fileobj is not None
        out.fileobj.write(info.tobuf())
        out.fileobj.write(bytes(64 << 20))

    with refused("bad_file", "header of 67108864 bytes"):
        attempt(tmp_path, tar({}, huge), limit=1 << 30)


def test_too_many_members(tmp_path: Path) -> None:
    with refused("too_large", "more than 10000"):
        attempt(tmp_path, tar({f"{i}": b"" for i in range(10_001)}), limit=1 << 30)


@pytest.mark.parametrize(
    ("files", "code", "told"),
    [
        ({"adapter_config.json": CONFIG}, "missing_file", "no adapter_model.safetensors"),
        ({"adapter_model.safetensors": WEIGHTS, "adapter_model.bin": b""}, "missing_file", "no adapter_config.json"),
        ({"a/adapter_config.json": CONFIG, "b/adapter_model.safetensors": WEIGHTS}, "bad_file", "different folders"),
        ({"a/adapter_config.json": CONFIG, "b/adapter_config.json": CONFIG}, "bad_file", "twice"),
        ({}, "missing_file", "no adapter_config.json"),
    ],
)
def test_archives_without_one_adapter(tmp_path: Path, files: dict[str, bytes], code: str, told: str) -> None:
    with refused(code, told):
        attempt(tmp_path, tar(files))


@settings(max_examples=60)
@given(st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = tar({name: content[:3000] for name, content in FILES.items()})
    whole = gzip.compress(whole, mtime=0) if data.draw(st.booleans()) else whole
    at = data.draw(st.integers(0, len(whole) - 1))
    bad = whole[:at] if data.draw(st.booleans()) else whole[:at] + data.draw(st.binary(min_size=1)) + whole[at + 1 :]
    folder = tmp_path_factory.mktemp("x")
    try:
        found = attempt(folder, bad, 1 << 20)
    except AdapterRefused:
        return
    assert set(found) == set(FILES)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_in_every_form(tmp_path: Path, form: int) -> None:
    """As tarfile itself writes them; ustar has room for 255 characters, in two pieces."""
    buffer = io.BytesIO()
    folder = "/".join(["a" * 60] * (3 if form == tarfile.USTAR_FORMAT else 9))
    with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers={"comment": "7" * 300}) as out:
        for name, content in FILES.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            info.mtime = 0.5 if form == tarfile.PAX_FORMAT else 0  # type: ignore[assignment]
            out.addfile(info, io.BytesIO(content))
    assert attempt(tmp_path, buffer.getvalue()) == FILES


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("body", [b"1" * 60_000, b"60000 path=" + b"1" * 60_000, b"1 " * 30_000, b"0 a=b\n" * 10_000])
def test_headers_that_take_time_to_read(tmp_path: Path, kind: bytes, body: bytes) -> None:
    """64 KiB of digits froze the whole process for 8 s, and twice as many for 32: re.search in tarfile."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(body)
    header = info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)
    began = time.thread_time()
    with suppress(AdapterRefused):
        attempt(tmp_path, header * 20 + tar(FILES))
    assert time.thread_time() - began < 20, "of its own work; it was over 100 s"


@pytest.mark.parametrize("record", ["GNU.sparse.major=1", "GNU.sparse.map=0,1", "size=99999999999"])
def test_sparse_files_by_extended_headers(tmp_path: Path, record: str) -> None:
    text = f"{len(record) + 4} {record}\n".encode()
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(text)
    with refused("forbidden"):
        attempt(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + text + bytes(-len(text) % 512) + tar(FILES))


def test_files_of_less_than_nothing(tmp_path: Path) -> None:
    header = bytearray(tar(FILES)[:512])
    header[124:136] = b"\xff" * 11 + b"\x00"  # -256, as GNU writes large numbers
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with refused("bad_file", "damaged"):
        attempt(tmp_path, bytes(header) + bytes(1024))
