"""The two files of a PEFT adapter's folder, read without trusting them.

The header of the weights can be read alone, which is all that registration needs; the rest is read once into memory
and everything, the digest included, comes from those bytes: a file that someone is rewriting meanwhile can be refused,
but neither mixed up nor (as a mapped file cut short would) kill the process. Pickles are never opened.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters import pace, tokenizer_files
from loraplex.adapters.errors import AdapterRefused
from loraplex.kernels.hashing import Hash
from loraplex.kernels.hugepages import huge_zeros
from loraplex.kernels.packing import OpenFile

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

MAX_CONFIG_BYTES = 1 << 20
"""Hundreds of full module names in target_modules are some 50 KB."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

SLICE_BYTES = 16 << 20
"""Read and hashed between two looks at whether anybody still waits: 11 ms from the page cache with SHA instructions."""

SETTLED_SECONDS = 2.0
"""A file changed less than this before it was looked at may change again within the same tick of its clock."""

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a safetensors file says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the data, which the header precedes


@dataclass(frozen=True)
class Stamp:
    """What tells that a file was changed: of the two files, (device, inode, bytes, modified ns, changed ns)."""

    config: tuple[int, ...]
    weights: tuple[int, ...]
    tokenizer: tuple[tuple[int, ...], ...] = ()  # tokenizer_files.stamps

    @property
    def latest(self) -> float:
        """When one of all was changed last, in unix seconds."""
        return max(*self.config[3:], *self.weights[3:], *(ns for each in self.tokenizer for ns in each[3:])) / 1e9

    def is_settled(self, now: float) -> bool:
        """Whether a change after `now` is sure to show."""
        return now - self.latest > SETTLED_SECONDS


@dataclass(frozen=True)
class AdapterHead:
    """An adapter's files but for the data."""

    config: bytes
    header: bytes  # the JSON of the safetensors file
    data_bytes: int  # behind it
    stamp: Stamp

    @property
    def start(self) -> int:
        """Where in the file the data begins."""
        return 8 + len(self.header)


@dataclass(frozen=True)
class AdapterBytes:
    """An adapter's files whole."""

    head: AdapterHead
    data: Tensor  # [data_bytes] uint8
    digest: str  # sha256 over the config's bytes followed by the weights' bytes, in hex


class ChangedMeanwhile(AdapterRefused):
    """The files were written to while they were read."""

    def __init__(self) -> None:
        super().__init__(
            "bad_file", f"{WEIGHTS_FILE} changed while it was read; load it again once it is complete, or put complete "
            "files in place by renaming"
        )  # fmt: skip


def read_head(folder: Path) -> AdapterHead:
    """Read the config and the header. Raises AdapterRefused: "missing_file", "too_large" (the config), "bad_file"."""
    config, config_stamp = _read_config(folder)
    with _open_weights(folder) as file:
        try:
            return _read_head(file, folder, config, config_stamp)
        except (OSError, ValueError) as error:
            raise _damaged(folder / WEIGHTS_FILE, error) from error


def read_bytes(folder: Path, breathe: Callable[[], None], memory: Callable[[int], Tensor] = huge_zeros) -> AdapterBytes:
    """Read all of both files, calling `breathe` between slices; `memory` gives so many bytes to read the data into.

    Raises as read_head() does, and ChangedMeanwhile.
    """
    config, config_stamp = _read_config(folder)
    with _open_weights(folder) as file:
        try:
            head = _read_head(file, folder, config, config_stamp)
            digest = Hash()
            digest.take(config + len(head.header).to_bytes(8, "little") + head.header)
            data = memory(head.data_bytes)
            for at in range(0, head.data_bytes, SLICE_BYTES):
                digest.read(OpenFile(file.fileno(), head.start + at), data[at : at + SLICE_BYTES], pace.READING_NICE)
                breathe()
        except EOFError:
            raise ChangedMeanwhile from None
        except (OSError, ValueError) as error:
            raise _damaged(folder / WEIGHTS_FILE, error) from error
        if _stamp_of(os.fstat(file.fileno())) != head.stamp.weights:
            raise ChangedMeanwhile
    return AdapterBytes(head, data, digest.hexdigest())


@contextmanager
def known_weights(folder: Path, stamp: Stamp) -> Iterator[int]:
    """The descriptor of the weights' file. Raises ChangedMeanwhile unless both files have `stamp`, before and after."""
    try:
        config = _stamp_of(os.stat(folder / CONFIG_FILE))
        if (config, tokenizer_files.stamps(folder)) != (stamp.config, stamp.tokenizer):
            raise ChangedMeanwhile
        descriptor = os.open(folder / WEIGHTS_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ChangedMeanwhile from error
    try:
        if _stamp_of(os.fstat(descriptor)) != stamp.weights:
            raise ChangedMeanwhile
        yield descriptor
        if _stamp_of(os.fstat(descriptor)) != stamp.weights:
            raise ChangedMeanwhile
    finally:
        os.close(descriptor)


def look(folder: Path) -> Stamp | None:
    """The files' stamp now; None when one is missing."""
    try:
        config, weights = (_stamp_of(os.stat(folder / name)) for name in (CONFIG_FILE, WEIGHTS_FILE))
        return Stamp(config, weights, tokenizer_files.stamps(folder))
    except OSError:
        return None


def parse_header(head: AdapterHead) -> dict[str, TensorInfo]:
    """The tensors by name; float32, float16 and bfloat16 only, one after the other with no byte between.

    Raises AdapterRefused("bad_file").
    """
    try:
        raw = json.loads(head.header)
        found = [(d["data_offsets"], name, d["dtype"], d["shape"]) for name, d in _entries(raw)]
        tensors = {}
        at = 0
        for offsets, name, dtype, shape in sorted(found):
            if dtype not in _DTYPES:
                raise AdapterRefused(
                    "bad_file", f"{WEIGHTS_FILE}: {name} is {dtype}; expected {', '.join(_DTYPES)}; convert it"
                )
            info = TensorInfo(_DTYPES[dtype], tuple(shape), at)
            if not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
                raise ValueError(f"{name} has shape {shape} at {offsets}")
            end = at + math.prod(shape) * info.dtype.itemsize
            if offsets != [at, end]:
                raise ValueError(f"{name} of shape {shape} lies at bytes {offsets}, expected {[at, end]}")
            tensors[name] = info
            at = end
        if at != head.data_bytes:
            raise ValueError(f"the tensors take {at} bytes and the file holds {head.data_bytes} for them")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise _bad_file(f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error) from error
    return tensors


def view_tensors(data: Tensor, header: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """The tensors of `header` as views of `data`, wherever they start."""
    buffer = data.numpy()
    return {
        name: torch.frombuffer(buffer, dtype=info.dtype, count=math.prod(info.shape), offset=info.offset).reshape(
            info.shape
        )
        for name, info in header.items()
    }


def _entries(raw: Any) -> list[tuple[str, Any]]:
    return [(name, described) for name, described in raw.items() if name != "__metadata__"]


def _read_head(file: FileIO, folder: Path, config: bytes, config_stamp: tuple[int, ...]) -> AdapterHead:
    """Raises OSError, and ValueError for a file that is no safetensors file at its very start."""
    stamp = Stamp(config_stamp, _stamp_of(os.fstat(file.fileno())), tokenizer_files.stamps(folder))
    size = stamp.weights[2]
    start = _read_exactly(file, 8)
    length = int.from_bytes(start, "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"its header is to have {length} bytes, and the file has {size}")
    return AdapterHead(config, _read_exactly(file, length), size - 8 - length, stamp)


def _read_exactly(file: FileIO, count: int) -> bytes:
    data = bytearray(count)
    if file.readinto(data) != count:
        raise ValueError(f"it ends within the first {count} bytes of its header")
    return bytes(data)


def _read_config(folder: Path) -> tuple[bytes, tuple[int, ...]]:
    if not folder.is_dir():
        raise AdapterRefused(
            "missing_file", f"no such folder; expected one that holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterRefused(
            "missing_file",
            f"there is no {CONFIG_FILE}; is this the folder PEFT's save_pretrained wrote?{_where_adapters_are(folder)}",
        )
    try:
        with path.open("rb") as file:
            stamp = _stamp_of(os.fstat(file.fileno()))
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise AdapterRefused("bad_file", f"{CONFIG_FILE} cannot be read: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterRefused("too_large", f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes")
    return data, stamp


def _where_adapters_are(folder: Path) -> str:
    """Below the folder of a training run: its checkpoints, the latest first, and adapters saved by name."""
    try:
        found = [path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}")]
    except OSError:
        return ""
    if not found:
        return ""
    numbered = sorted(found, key=lambda name: (-int("".join(filter(str.isdecimal, name)) or -1), name))
    shown = ", ".join(numbered[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    return f" There are adapters in its folders {shown}: give one of them, as in {folder.name}/{numbered[0]}"


def _open_weights(folder: Path) -> FileIO:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise _no_weights(folder)
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise _damaged(path, error) from error


def _stamp_of(info: os.stat_result) -> tuple[int, ...]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _no_weights(folder: Path) -> AdapterRefused:
    names = sorted(entry.name for entry in folder.iterdir())
    pickled = next((name for name in names if name.startswith("adapter_model") and name.endswith(_PICKLES)), None)
    if pickled is not None:
        return AdapterRefused(
            "missing_file",
            f"there is {pickled} but no {WEIGHTS_FILE}; pickles can run code and are never opened. Convert it where "
            'you trust it: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{pickled}', weights_only=True), '{WEIGHTS_FILE}')\"",
        )
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return AdapterRefused("missing_file", f"there is no {WEIGHTS_FILE}; the folder holds {found}")


def _damaged(path: Path, error: Exception) -> AdapterRefused:
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError:
        start = b""
    if start.startswith(b"version https://git-lfs"):
        return AdapterRefused("bad_file", f"{WEIGHTS_FILE} is a Git LFS pointer, not the weights; run git lfs pull")
    return _bad_file(error)


def _bad_file(why: object) -> AdapterRefused:
    return AdapterRefused(
        "bad_file", f"{WEIGHTS_FILE} is damaged or cut short: {' '.join(str(why).split())}; copy or save it again"
    )
