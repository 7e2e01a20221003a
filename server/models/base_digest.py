"""Tell bases apart: a digest of a base's files that takes a moment, whatever their size."""

from __future__ import annotations

import hashlib
from pathlib import Path

from loraplex.server.models.checkpoint import Checkpoint, WeightsError

HEAD_BYTES = 1 << 20
"""Of each file, from its start: names, shapes and types of all its tensors, of which 8 KiB a layer are usual."""

SAMPLES, SAMPLE_BYTES = 256, 4096
"""Of each file, evenly spread: 1 MiB. Training changes every weight that it is allowed to, a few bits at least."""


def base_digest(folder: Path, checkpoint: Checkpoint) -> str:
    """Compute the sha256, in hex, of config.json in `folder`, where it is, and of samples of the weights' files.

    The same files have the same digest wherever they lie; the same weights in other files (another format, other
    shards) have another. 2 MiB a file are read: it tells a base from another, but is no proof against who wants to
    fool it. Raises WeightsError where a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        config = folder / "config.json"
        digest.update(config.read_bytes() if config.is_file() else b"")
        for file in sorted({stored.file for stored in checkpoint.tensors.values()}, key=lambda path: path.name):
            _take(digest, file)
    except OSError as error:
        raise WeightsError(f"the base's files cannot be read: {error}") from error
    return digest.hexdigest()


def _take(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"\0{file.name}\0{size}\0".encode())
    with file.open("rb") as handle:
        digest.update(handle.read(HEAD_BYTES))
        for sample in range(SAMPLES):
            handle.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(handle.read(SAMPLE_BYTES))
