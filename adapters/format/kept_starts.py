"""Keep on the disk what was taken out of the base's weights once, so that no load computes it twice.

    <folder>/<sha256 of the weight, fp32>-<what>.safetensors      a0 [r, in], b0 [out, r] fp32

The name is of the weight itself, so a file is right for whatever base has it, and is never stale. What cannot be read
or written is computed: a full or read-only disk costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock

from torch import Tensor

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 30
"""Of the folder: PiSSA of rank 16 on all linears is 20 MB of SmolLM2-135M and 170 MB of a base of eight billion."""

Factors = tuple[Tensor, Tensor]
"""a0 [r, in] and b0 [out, r], fp32."""


class KeptStarts:
    """A folder of factors; for any number of threads, and of servers. It may be over its bound by a sixteenth."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self._folder = folder
        self._most = most_bytes
        self._written = most_bytes  # since the folder was last looked at
        self._lock = Lock()

    def get(self, weight: Tensor, what: str, make: Callable[[], Factors]) -> Factors:
        """Return what make() makes of `weight` [out, in] fp32, from the disk if it is there. what: part of a name."""
        digest = hashlib.sha256(weight.contiguous().numpy().data).hexdigest()
        path = self._folder / f"{digest}-{what}.safetensors"
        found = _read(path, weight)
        if found is not None:
            return found
        made = make()
        with self._lock:
            self._write(path, made)
        return made

    def _write(self, path: Path, factors: Factors) -> None:
        from safetensors.torch import save

        a0, b0 = factors
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._written += partial.write_bytes(save({"a0": a0.contiguous(), "b0": b0.contiguous()}))
            partial.rename(path)
            if self._written > self._most // 16:
                self._written = 0
                self._trim()
        except OSError as error:
            logger.info("%s is not kept, and will be computed again: %s", path, error.strerror)
            with suppress(OSError):
                partial.unlink()

    def _trim(self) -> None:
        """Remove what was used longest ago, until the rest fits."""
        files = sorted(((entry.stat().st_mtime, entry) for entry in self._folder.iterdir()), reverse=True)
        total = 0
        for _, path in files:
            total += path.stat().st_size
            if total > self._most:
                path.unlink(missing_ok=True)


def _read(path: Path, weight: Tensor) -> Factors | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(path.read_bytes())
        a0, b0 = tensors["a0"], tensors["b0"]
        os.utime(path)
    except (OSError, SafetensorError, KeyError):
        return None
    out, width = weight.shape
    fits = a0.shape == (a0.shape[0], width) and b0.shape == (out, a0.shape[0])
    return (a0, b0) if fits and bool(a0.isfinite().all()) and bool(b0.isfinite().all()) else None
