"""Read the header of a GGUF file: its metadata and where its tensors lie. Free of torch and of the gguf package.

A file comes from anywhere. Its header says how many there are of everything and how long each is, so every such number
is compared with a bound and with the bytes that are left before anything is made for it: the gguf package's reader
counts to 2^60 where a header says so. The layout is that of ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"GGUF"
VERSIONS = (2, 3)

MAX_FIELDS = 65_536
"""Keys of the metadata, and tensors. Files have some 40 keys, and 1,200 tensors at 126 layers."""

MAX_ENTRIES = 4 << 20
"""Of all arrays together. Gemma 3 has 262,144 tokens with a score and a type each; Llama 3 280,147 merges."""

MAX_HEADER = 256 << 20
"""Bytes. Vocabularies of a quarter of a million tokens take 15 MB."""

MAX_ALIGNMENT = 1 << 20

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's number of a type of values: struct's letter for it."""

_STRING, _ARRAY = 8, 9


class GgufError(Exception):
    """Say in one line why a GGUF file cannot be served: what was found, what was expected, and what to do."""


@dataclass(frozen=True)
class StoredBlocks:
    """What a GGUF's header says of one tensor."""

    name: str  # as llama.cpp calls it: blk.3.attn_q.weight
    shape: tuple[int, ...]  # outermost first, as torch has it: [out, in]; the file has it the other way round
    type: int  # ggml's number of the type
    start: int  # of its bytes in the file


@dataclass(frozen=True)
class GgufHeader:
    """All that a GGUF says before its tensors' bytes."""

    file: Path
    bytes: int  # of the whole file
    length: int  # of the header in it, without the padding behind
    metadata: Mapping[str, Any]  # bool, int, float, str, or a list of one of them
    tensors: tuple[StoredBlocks, ...]

    @property
    def architecture(self) -> str:
        """Return general.architecture. Raises GgufError where there is none."""
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        """Return the string under `key`. Raises GgufError where there is none."""
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise GgufError(f"{self.file} has {_shown(value)} under {key}; expected a text")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """Return the whole number under `key`, or the one that all entries of an array are, as for each layer.

        Raises GgufError where there is none and no default, or one below 0.
        """
        value = self.metadata.get(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int or not 0 <= value < 1 << 40:
            raise GgufError(f"{self.file} has {_shown(value)} under {key}; expected one whole number for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return the number under `key`, as the short decimal that was stored as fp32 (9.99999974e-06 is 1e-05).

        Raises GgufError where there is none and no default, or one that is not finite.
        """
        value = self.metadata.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise GgufError(f"{self.file} has {_shown(value)} under {key}; expected a number")
        return shortest(value)

    def entries(self, key: str, kind: type | tuple[type, ...]) -> list[Any] | None:
        """Return the array under `key`; None where there is none. Raises GgufError where its entries are no `kind`."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
            raise GgufError(f"{self.file} has {_shown(value)} under {key}; expected an array of another kind")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return the truth under `key`. Raises GgufError where there is something else."""
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise GgufError(f"{self.file} has {_shown(value)} under {key}; expected true or false")
        return value


def shortest(value: float) -> float:
    """Find the shortest decimal that is the same fp32 as `value`."""
    stored = struct.pack("<f", value)
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == stored:
            return short
    return float(value)


def read_header(file: Path, vocabulary: bool = True) -> GgufHeader:
    """Read the header of the GGUF `file`. Raises GgufError where it is none, is damaged, or asks for too much.

    vocabulary: False leaves arrays of texts out, half a million Python strings where all else are a few thousand.
    """
    try:
        size = file.stat().st_size
        with file.open("rb", buffering=1 << 20) as handle:
            return _Reading(file, handle, size, vocabulary).header()
    except OSError as error:
        raise GgufError(f"{file} cannot be read: {error.strerror or error}") from error


class _Reading:
    """One pass over a header, from its first byte on."""

    def __init__(self, file: Path, handle: BinaryIO, size: int, vocabulary: bool) -> None:
        self._file, self._handle, self._size, self._vocabulary = file, handle, size, vocabulary
        self._place = 0
        self._entries = 0

    def header(self) -> GgufHeader:
        self._check_kind()
        tensors, fields = self._count("tensors"), self._count("metadata keys")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self._string("a metadata key")
            if key in metadata:
                raise self._damaged(f"it has the metadata key {key[:80]!r} twice")
            value = self._value(self._scalar("I"), key)
            if value is not None:
                metadata[key] = value
        stored: dict[str, StoredBlocks] = {}
        for _ in range(tensors):
            tensor = self._tensor()
            if tensor.name in stored:
                raise self._damaged(f"it has the tensor {tensor.name[:80]!r} twice")
            stored[tensor.name] = tensor
        return GgufHeader(self._file, self._size, self._place, metadata, self._placed(stored, metadata))

    def _check_kind(self) -> None:
        magic = self._take(4, "its first bytes") if self._size >= 4 else b""
        if magic != MAGIC:
            kind = "a big-endian one" if magic == MAGIC[::-1] else f"begins with {magic!r}, expected {MAGIC!r}"
            raise GgufError(f"{self._file} is no GGUF file ({kind}); give one, or a folder that holds config.json")
        version = self._scalar("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            found = f"is big-endian (GGUF version {swapped})" if swapped in (1, *VERSIONS) else f"has version {version}"
            raise GgufError(
                f"{self._file} {found}; expected a little-endian GGUF of version 2 or 3: convert the model again"
            )

    def _count(self, of: str) -> int:
        count = self._scalar("Q")
        if count > MAX_FIELDS:
            raise self._damaged(f"it claims {count} {of}, at most {MAX_FIELDS} are read")
        return int(count)

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string(key)
        if kind != _ARRAY:
            raise self._damaged(f"{key[:80]!r} is of type {kind}, which GGUF does not have")
        kind, count = self._scalar("I"), self._scalar("Q")
        self._entries += count
        if self._entries > MAX_ENTRIES:
            raise self._damaged(f"{key[:80]!r} claims {count} entries, at most {MAX_ENTRIES} of all arrays are read")
        if kind == _STRING and not self._vocabulary:
            for _ in range(count):
                self._take(self._scalar("Q"), key)
            return None
        if kind == _STRING:
            return [self._string(key) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._damaged(f"{key[:80]!r} is an array of type {kind}; expected numbers or texts")
        width = struct.calcsize("<" + _SCALARS[kind])
        data = self._take(count * width, key)
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", data))

    def _tensor(self) -> StoredBlocks:
        name = self._string("a tensor's name")
        rank = self._scalar("I")
        if not 1 <= rank <= 4:
            raise self._damaged(f"tensor {name[:80]!r} has {rank} dimensions, expected 1 to 4")
        sizes = tuple(self._scalar("Q") for _ in range(rank))
        if not all(0 < size < 1 << 40 for size in sizes) or math.prod(sizes) >= 1 << 48:
            raise self._damaged(f"tensor {name[:80]!r} has the shape {list(sizes)}")
        kind, offset = self._scalar("I"), self._scalar("Q")
        return StoredBlocks(name, sizes[::-1], kind, offset)

    def _placed(self, stored: Mapping[str, StoredBlocks], metadata: Mapping[str, Any]) -> tuple[StoredBlocks, ...]:
        """Turn offsets into places in the file. What a tensor takes is checked by who knows its type."""
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment % 8:
            raise self._damaged(
                f"general.alignment is {_shown(alignment)}, expected a multiple of 8 to {MAX_ALIGNMENT}"
            )
        start = -(-self._place // alignment) * alignment
        for tensor in stored.values():
            if tensor.start % alignment or start + tensor.start >= self._size:
                raise self._damaged(f"tensor {tensor.name[:80]!r} lies at {tensor.start}, where it cannot be")
        return tuple(StoredBlocks(t.name, t.shape, t.type, start + t.start) for t in stored.values())

    def _scalar(self, letter: str) -> Any:
        layout = "<" + letter
        return struct.unpack(layout, self._take(struct.calcsize(layout), "a number"))[0]

    def _string(self, of: str) -> str:
        data = self._take(self._scalar("Q"), of)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{of[:80]!r} holds a text that is no UTF-8") from error

    def _take(self, count: int, of: str) -> bytes:
        """Read `count` bytes, once they are known to be there."""
        if count > self._size - self._place or self._place + count > MAX_HEADER:
            left = min(self._size, MAX_HEADER) - self._place
            raise self._damaged(f"{of[:80]!r} takes {count} bytes, and {left} are left for it")
        data = self._handle.read(count)
        if len(data) != count:
            raise self._damaged("it became shorter while it was read")
        self._place += count
        return data

    def _damaged(self, reason: str) -> GgufError:
        return GgufError(f"{self._file} is damaged or cut short: {reason}; download it again")


def _shown(value: Any) -> str:
    """Write a value for one line."""
    if value is None:
        return "nothing"
    return f"{len(value)} values" if isinstance(value, list) else f"{value!r:.80}"
