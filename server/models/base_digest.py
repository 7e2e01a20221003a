"""Tell bases apart: a digest of all bytes of a base's files, which are read once while they stay as they are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, MutableMapping
from pathlib import Path

from loraplex.server.models.checkpoint import Checkpoint, WeightsError

PIECE = 1 << 20
"""Bytes between two breaths of who computes it: some 0.6 ms with the CPU's own instructions for sha256, 2 without."""


def base_digest(
    folder: Path,
    checkpoint: Checkpoint,
    throttle: Callable[[], None] = lambda: None,
    known: MutableMapping[str, str] | None = None,
) -> str:
    """Compute the sha256, in hex, of config.json in `folder`, where it is, and of the weights' files, all of them.

    The same files have the same digest wherever they lie; the same weights in other files (another format, other
    shards) have another. It is of config.json's bytes, then for each file, by name, "\\0name\\0size\\0" and the hex
    digits of the file's own sha256.

    throttle: called between pieces. known: the files' digests as an earlier call has left them there, by device, inode,
    size and time of change, so that a file is read once. Raises WeightsError where a file cannot be read.
    """
    digest, known, fresh = hashlib.sha256(), {} if known is None else known, dict[str, str]()
    try:
        config = folder / "config.json"
        digest.update(config.read_bytes() if config.is_file() else b"")
        for file in sorted({stored.file for stored in checkpoint.tensors.values()}, key=lambda path: path.name):
            with file.open("rb", buffering=0) as handle:
                found = os.fstat(handle.fileno())
                identity = f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"
                fresh[identity] = known.get(identity) or _of_file(handle.readinto, throttle)
            digest.update(f"\0{file.name}\0{found.st_size}\0{fresh[identity]}".encode())
    except OSError as error:
        raise WeightsError(f"the base's files cannot be read: {error}") from error
    known.clear()
    known.update(fresh)
    return digest.hexdigest()


def _of_file(read_into: Callable[[memoryview], int], throttle: Callable[[], None]) -> str:
    digest, room = hashlib.sha256(), memoryview(bytearray(PIECE))
    while count := read_into(room):
        digest.update(room[:count])  # without the GIL
        throttle()
    return digest.hexdigest()
