"""Headers of GGUF files: what the gguf package reads in them, and every way in which one can lie."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.server.models.gguf.header import GgufError, read_header, shortest
from tests.support.gguf_files import write_gguf
from tests.support.tiny import make_tiny_tokenizer, tiny_hf_model

PEAK = 8 << 20
"""Bytes that reading a short file may take, whatever it claims; its buffer has 1 MiB."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_hf_model("llama", intermediate_size=128)
    return write_gguf(model, folder / "tiny.gguf", tokenizer=make_tiny_tokenizer(folder)).path


def test_header_says_what_the_gguf_package_reads(tiny: Path) -> None:
    header, reader = read_header(tiny), gguf.GGUFReader(tiny)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == fields
    assert {t.name: (t.shape, t.type, t.start) for t in header.tensors} == {
        t.name: (tuple(reversed(t.shape.tolist())), int(t.tensor_type), t.data_offset) for t in reader.tensors
    }
    assert header.bytes == tiny.stat().st_size


def test_the_vocabulary_may_be_left_out(tiny: Path) -> None:
    whole, rest = read_header(tiny), read_header(tiny, vocabulary=False)
    texts = {"tokenizer.ggml.tokens", "tokenizer.ggml.merges"}
    assert rest.metadata == {key: value for key, value in whole.metadata.items() if key not in texts}
    assert (rest.tensors, rest.length, rest.bytes) == (whole.tensors, whole.length, whole.bytes)


def test_numbers_are_the_decimals_that_were_stored(tiny: Path) -> None:
    header = read_header(tiny)
    assert header.number("llama.attention.layer_norm_rms_epsilon") == 1e-6
    assert shortest(struct.unpack("<f", struct.pack("<f", 0.1))[0]) == 0.1
    assert shortest(struct.unpack("<f", struct.pack("<f", 1000000.0))[0]) == 1e6
    assert shortest(struct.unpack("<f", struct.pack("<f", 1.1902380714238083))[0]) == pytest.approx(1.19023807)


def test_an_entry_for_each_layer_is_one_where_all_are_equal(tiny: Path) -> None:
    header = read_header(tiny)
    metadata = {"same": [4, 4], "other": [4, 2], "none": [], "text": "4", "truth": True, "less": -1}
    changed = type(header)(header.file, header.bytes, header.length, metadata, ())
    assert changed.whole("same") == 4
    assert changed.whole("absent", 7) == 7
    for key in ("other", "none", "text", "truth", "less", "absent"):
        with pytest.raises(GgufError, match=key):
            changed.whole(key)


# ---- bytes by hand --------------------------------------------------------------------------------------------------


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def start(tensors: int = 0, fields: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, *sizes: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


HUGE = 1 << 60

LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF"),
    "not one": (b"PK\x03\x04" + bytes(60), "no GGUF"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "no GGUF"),
    "version 1": (b"GGUF" + struct.pack("<III", 1, 0, 0), "version 1"),
    "version 4": (start(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "ends in its numbers": (start()[:20], "left"),
    "tensors": (start(tensors=HUGE), f"{HUGE} tensors"),
    "tensors that are not there": (start(tensors=60_000), "left"),
    "fields": (start(fields=HUGE), f"{HUGE} metadata keys"),
    "a key": (start(fields=1) + text(b"a", HUGE), "left"),
    "a text": (start(fields=1) + field(b"a", 8, text(b"x", HUGE)), "left"),
    "an array of bytes": (start(fields=1) + field(b"a", 9, struct.pack("<IQ", 0, HUGE)), "entries"),
    "an array of numbers": (start(fields=1) + field(b"a", 9, struct.pack("<IQ", 11, 4 << 20)), "left"),
    "an array of texts": (start(fields=1) + field(b"a", 9, struct.pack("<IQ", 8, HUGE)), "entries"),
    "an array of arrays": (start(fields=1) + field(b"a", 9, struct.pack("<IQ", 9, 1)), "array of type 9"),
    "a type of values": (start(fields=1) + field(b"a", 77, b""), "type 77"),
    "text that is none": (start(fields=1) + field(b"a", 8, text(b"\xff\xfe")), "UTF-8"),
    "a key twice": (start(fields=2) + 2 * field(b"a", 0, b"\0"), "twice"),
    "a tensor twice": (start(tensors=2) + 2 * tensor(b"w", 4) + bytes(64), "twice"),
    "a tensor of no dimensions": (start(tensors=1) + tensor(b"w"), "0 dimensions"),
    "a tensor of many": (start(tensors=1) + tensor(b"w", *[1] * 200), "200 dimensions"),
    "a tensor of 2^120 elements": (start(tensors=1) + tensor(b"w", 1 << 39, 1 << 39, 1 << 39), "shape"),
    "a tensor of none": (start(tensors=1) + tensor(b"w", 0, 4) + bytes(64), "shape"),
    "a tensor behind the end": (start(tensors=1) + tensor(b"w", 4, offset=HUGE) + bytes(64), "cannot be"),
    "a tensor at an odd place": (start(tensors=1) + tensor(b"w", 4, offset=3) + bytes(64), "cannot be"),
    "an alignment": (start(fields=1) + field(b"general.alignment", 4, struct.pack("<I", 7)), "alignment"),
    "no alignment": (start(fields=1) + field(b"general.alignment", 4, bytes(4)), "alignment"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_told_in_bounded_memory(lie: str, tmp_path: Path) -> None:
    data, word = LIES[lie]
    file = tmp_path / "lie.gguf"
    file.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(GgufError, match=word) as told:
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < PEAK
    finally:
        tracemalloc.stop()
    assert str(file) in str(told.value)
    assert "\n" not in str(told.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.gguf"):
        with pytest.raises(GgufError, match="cannot be read"):
            read_header(path)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
def test_a_header_cut_short(tiny: Path, tmp_path: Path, cut: float) -> None:
    data = tiny.read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(data[: int(cut * read_header(tiny).length)])
    with pytest.raises(GgufError, match="cut short"):
        read_header(file)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_byte_may_be_wrong(tiny: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """It reads or it is told; nothing else happens."""
    original = bytearray(tiny.read_bytes()[: read_header(tiny).length + 64])
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "wrong.gguf"
    file.write_bytes(original)
    with suppress(GgufError):
        read_header(file)
