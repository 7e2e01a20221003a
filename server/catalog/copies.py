"""Copies of adapters' files that nobody else writes to: what keeps a version, whatever becomes of its source."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files import tokenizer_files
from loraplex.adapters.files.beneath import Folder, opened, roots_of
from loraplex.server.catalog.state_store import StateNotKept

logger = logging.getLogger(__name__)

FILES = ("adapter_config.json", "adapter_model.safetensors", *tokenizer_files.FILES, "README.md", "golden.jsonl")
"""Of a folder, what is copied: all that is ever read of an adapter."""

PIECE = 16 << 20
"""Bytes between two looks at how many there may be."""


class VersionCopies:
    """A folder of copies. Any thread."""

    def __init__(self, folder: Path | None, max_bytes: int, locate: Callable[[str], Path]) -> None:
        """folder: made if need be; None: a temporary one. max_bytes: of all. locate: a source's folder."""
        self._own = tempfile.TemporaryDirectory(prefix="loraplex-versions-") if folder is None else None
        self.folder: Path = Path(self._own.name) if self._own is not None else folder or Path()
        self.max_bytes = max_bytes
        self._locate = locate
        self._thread = ThreadPoolExecutor(1, "copies")

    def make(self, source: str) -> Future[str]:
        """Copy the files of a source that is here into a new folder, whose path is the result.

        The future fails as a load of the source does, with AdapterRefused ("too_large") beyond max_bytes, and with
        StateNotKept where the disk is full.
        """
        return self._thread.submit(self._make, source)

    def place(self, name: str) -> str:
        """Return the source of the copy called `name`."""
        return str(self.folder / name)

    def name_of(self, source: str) -> str:
        """Return what the copy at `source` is called; "": it is none of these."""
        path = Path(source)
        return path.name if path.parent == self.folder else ""

    def size(self, name: str) -> int:
        """Count the bytes of the copy called `name`."""
        with suppress(OSError):
            return sum(entry.stat().st_size for entry in os.scandir(self.place(name)))
        return 0

    def remove(self, name: str) -> None:
        """Remove a copy, some time."""
        self._thread.submit(shutil.rmtree, self.place(name), ignore_errors=True)

    def clean(self, known: Collection[str]) -> None:
        """Remove what no version is made of: a server was killed while it copied."""
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.folder):
                if entry.name not in known:
                    logger.info("%s is removed: the server that made it was killed", entry.path)
                    shutil.rmtree(entry.path, ignore_errors=True)

    def settle(self) -> None:
        """Wait until all that was begun is done."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Finish what was begun."""
        self._thread.shutdown()
        if self._own is not None:
            self._own.cleanup()

    def _make(self, source: str) -> str:
        folder = self._locate(source)
        new = Path(self.place(secrets.token_hex(12)))
        try:
            new.mkdir(parents=True, mode=0o700)
            with opened(folder, roots_of(source)) as place:
                left = self.max_bytes
                for name in FILES:
                    if place.has(name):
                        left -= _copy(place, name, new / name, left, source)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise StateNotKept(
                f"the change is not made, as no copy of the adapter could be kept ({error.strerror}); try again once "
                "there is room, or load it without retain"
            ) from None
        except AdapterRefused:
            shutil.rmtree(new, ignore_errors=True)
            raise
        return str(new)


def _copy(place: Folder, name: str, target: Path, most: int, source: str) -> int:
    """Copy one file to disk. Returns its bytes. Raises OSError, AdapterRefused."""
    done = 0
    with place.open(name) as (handle, _), open(target, "xb", buffering=0) as out:
        while piece := os.read(handle, PIECE):
            done += len(piece)
            if done > most:
                raise AdapterRefused(
                    "too_large", f"{source}: no copy is kept of more than {most} bytes (--retained-bytes); load it "
                    "without retain"
                )  # fmt: skip
            out.write(piece)
        os.fsync(out.fileno())
    return done
