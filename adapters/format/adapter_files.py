"""The two files of a PEFT adapter's folder, read without trusting them.

The header of the weights can be read alone, which is all that registration needs; the rest is read once into memory
and everything, the digest included, comes from those bytes: a file that someone is rewriting meanwhile can be refused,
but neither mixed up nor (as a mapped file cut short would) kill the process. Pickles are never opened.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files import tokenizer_files
from loraplex.adapters.files.beneath import LINKED_OUT, Folder, opened
from loraplex.adapters.files.tokenizer_files import TokenizerFiles
from loraplex.adapters.format.config import MAX_BYTES as MAX_CONFIG_BYTES
from loraplex.adapters.image.hashing import Hash
from loraplex.adapters.image.packing import OpenFile
from loraplex.adapters.throttle import READING_NICE
from loraplex.kernels.hugepages import huge_zeros

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

MAX_HEADER_BYTES = 8 << 20
"""What is read of any; header.parse_header() takes what the tensors that an adapter of the base can have may need."""

SLICE_BYTES = 16 << 20
"""Read and hashed between two looks at whether anybody still waits: 11 ms from the page cache with SHA instructions."""

SETTLED_SECONDS = 2.0
"""A file changed less than this before it was looked at may change again within the same tick of its clock."""

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


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


class NoFolder(AdapterRefused):
    """There is none."""

    def __init__(self) -> None:
        super().__init__("missing_file", f"no such folder; expected one that holds {CONFIG_FILE} and {WEIGHTS_FILE}")


def read_head(folder: Path, roots: Sequence[Path] = ()) -> AdapterHead:
    """Read the config and the header; `roots` as beneath.opened() has them.

    Raises AdapterRefused: "missing_file", "too_large" (the config), "bad_file", "forbidden" (a link out of `roots`).
    """
    with _folder(folder, roots) as place:
        config, config_stamp = _read_config(place, folder.name)
        with _open_weights(place) as (handle, info):
            return _read_head(handle, info, place, config, config_stamp)


def read_bytes(
    folder: Path,
    throttle: Callable[[], None],
    memory: Callable[[int], Tensor] = huge_zeros,
    roots: Sequence[Path] = (),
) -> AdapterBytes:
    """Read all of both files, calling `throttle` between slices; `memory` gives so many bytes to read the data into.

    Raises as read_head() does, and ChangedMeanwhile.
    """
    with _folder(folder, roots) as place:
        config, config_stamp = _read_config(place, folder.name)
        with _open_weights(place) as (handle, info):
            head = _read_head(handle, info, place, config, config_stamp)
            digest = Hash()
            digest.take(config + len(head.header).to_bytes(8, "little") + head.header)
            data = memory(head.data_bytes)
            try:
                for at in range(0, head.data_bytes, SLICE_BYTES):
                    digest.read(OpenFile(handle, head.start + at), data[at : at + SLICE_BYTES], READING_NICE)
                    throttle()
            except EOFError:
                raise ChangedMeanwhile from None
            if _stamp_of(os.fstat(handle)) != head.stamp.weights:
                raise ChangedMeanwhile
    return AdapterBytes(head, data, digest.hexdigest())


@contextmanager
def known_weights(folder: Path, stamp: Stamp, roots: Sequence[Path] = ()) -> Iterator[int]:
    """The descriptor of the weights' file. Raises ChangedMeanwhile unless both files have `stamp`, before and after."""
    try:
        with opened(folder, roots) as place, place.open(WEIGHTS_FILE) as (descriptor, info):
            if _look(place, info) != stamp:
                raise ChangedMeanwhile
            yield descriptor
            if _stamp_of(os.fstat(descriptor)) != stamp.weights:
                raise ChangedMeanwhile
    except OSError as error:
        raise ChangedMeanwhile from error


def look(folder: Path, roots: Sequence[Path] = ()) -> Stamp | None:
    """The files' stamp now; None when one is missing."""
    try:
        with opened(folder, roots) as place:
            return _look(place, place.stat(WEIGHTS_FILE))
    except OSError:
        return None


def _look(place: Folder, weights: os.stat_result) -> Stamp:
    """Raises OSError."""
    return Stamp(_stamp_of(place.stat(CONFIG_FILE)), _stamp_of(weights), tokenizer_files.stamps(place))


def read_tokenizer(folder: Path, roots: Sequence[Path] = ()) -> TokenizerFiles:
    """Read what the tokenizer files in it say. Raises AdapterRefused: "bad_file", "too_large", "forbidden"."""
    with _folder(folder, roots) as place:
        return tokenizer_files.read_tokenizer_files(place)


@contextmanager
def _folder(folder: Path, roots: Sequence[Path]) -> Iterator[Folder]:
    """It is open in the block, whose errors of the system become ours."""
    try:
        with opened(folder, roots) as place:
            yield place
    except (FileNotFoundError, NotADirectoryError):
        raise NoFolder from None
    except OSError as error:
        raise _unreadable("the folder", error) from error


def _read_head(
    handle: int, info: os.stat_result, place: Folder, config: bytes, config_stamp: tuple[int, ...]
) -> AdapterHead:
    """Raises AdapterRefused where it is no safetensors file at its very start."""
    stamp = Stamp(config_stamp, _stamp_of(info), tokenizer_files.stamps(place))
    size = info.st_size
    try:
        start = _read_exactly(handle, 8)
        length = int.from_bytes(start, "little")
        if b"version https://git-lfs".startswith(start):
            raise AdapterRefused("bad_file", f"{WEIGHTS_FILE} is a Git LFS pointer, not the weights; run git lfs pull")
        if length > min(size - 8, MAX_HEADER_BYTES):  # not shown: what begins otherwise may be anybody's file
            raise ValueError(f"it has {size} bytes, and does not begin with the length of a header that fits")
        return AdapterHead(config, _read_exactly(handle, length), size - 8 - length, stamp)
    except (OSError, ValueError) as error:
        raise bad_file(error) from error


def _read_exactly(handle: int, count: int) -> bytes:
    data = os.read(handle, count)
    if len(data) != count:
        raise ValueError(f"it ends within the first {count} bytes of its header")
    return data


def _read_config(place: Folder, called: str) -> tuple[bytes, tuple[int, ...]]:
    try:
        with place.open(CONFIG_FILE) as (handle, info):
            data = os.read(handle, min(info.st_size, MAX_CONFIG_BYTES) + 1)
    except FileNotFoundError:
        place.check()
        raise AdapterRefused(
            "missing_file",
            f"there is no {CONFIG_FILE}; is this the folder PEFT's save_pretrained wrote?"
            f"{_where_adapters_are(place, called)}",
        ) from None
    except OSError as error:
        raise _unreadable(CONFIG_FILE, error) from error
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterRefused("too_large", f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes")
    return data, _stamp_of(info)


def _where_adapters_are(place: Folder, called: str) -> str:
    """Below the folder of a training run: its checkpoints, the latest first, and adapters saved by name."""
    found = [name for name in _names(place) if place.has(f"{name}/{CONFIG_FILE}")]
    if not found:
        return ""
    numbered = sorted(found, key=lambda name: (-int("".join(filter(str.isdecimal, name[-18:])) or -1), name))
    shown = ", ".join(numbered[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    return f" There are adapters in its folders {shown}: give one of them, as in {called}/{numbered[0]}"


@contextmanager
def _open_weights(place: Folder) -> Iterator[tuple[int, os.stat_result]]:
    try:
        with place.open(WEIGHTS_FILE) as found:
            yield found
    except FileNotFoundError:
        raise _no_weights(place) from None
    except OSError as error:
        raise _unreadable(WEIGHTS_FILE, error) from error


def _names(place: Folder) -> list[str]:
    try:
        return place.names()
    except OSError:
        return []


def _stamp_of(info: os.stat_result) -> tuple[int, ...]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _no_weights(place: Folder) -> AdapterRefused:
    names = _names(place)
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


def _unreadable(what: str, error: OSError) -> AdapterRefused:
    if error.errno in (errno.EXDEV, errno.ELOOP):
        return AdapterRefused("forbidden", f"{what}: {LINKED_OUT}")
    return AdapterRefused("bad_file", f"{what} cannot be read: {error.strerror}")


def bad_file(why: object) -> AdapterRefused:
    return AdapterRefused(
        "bad_file", f"{WEIGHTS_FILE} is damaged or cut short: {' '.join(str(why).split())}; copy or save it again"
    )
