"""Keep the folders of downloaded adapters on disk, and remove what has no room.

    <root>/ready/<key>/<mark>/   the files of an adapter; a rename makes the folder, so its files are complete
    <root>/partial/<key>/        a download under way, or left by a process that died; only a download reads it
    <root>/partial/<key>.lock    held by the process that writes to the partial folder

<key> names the source, <mark> the content of the source. Several processes may share a root.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loraplex.adapters.errors import AdapterUnavailable
from loraplex.adapters.sources.http_client import Deadline
from loraplex.adapters.sources.remote import FILES

logger = logging.getLogger(__name__)

LOCK_POLL = 0.1
"""Seconds between attempts to take a lock that another process holds."""

STALE_SECONDS = 86_400.0
"""Seconds after which a partial folder is removed."""


class CacheFull(AdapterUnavailable):
    """Say that the cache has no room and that all its folders are in use."""


class DownloadCache:
    """Keep downloads below `root`. Any thread may call any method, and sizes are in bytes."""

    def __init__(self, root: Path, max_bytes: int, in_use: Callable[[], set[str]]) -> None:
        """in_use: returns the keys of the sources whose files must stay; called when room is needed."""
        self._root = root
        self._ready = root / "ready"
        self._partial = root / "partial"
        self._max_bytes = max_bytes
        self._in_use = in_use

    def find(self, key: str, mark: str | None = None) -> Path | None:
        """Return the complete folder of `key` with this mark, or the newest one, and count a use of it."""
        folders = [self._ready / key / mark] if mark else _by_age(self._ready / key)
        for folder in reversed(folders):
            if all((folder / name).is_file() for name in FILES):
                with suppress(OSError):
                    os.utime(folder)
                return folder
        return None

    def prepare(self) -> None:
        """Make the cache's folders before anything is written. Raises AdapterUnavailable."""
        try:
            self._ready.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(exist_ok=True)
            self._root.chmod(0o700)  # private adapters are among them
        except OSError as error:
            raise AdapterUnavailable(
                f"downloads cannot be kept in {self._root}: {error.strerror}; --download-dir moves them"
            ) from None

    @contextmanager
    def writing(self, key: str, deadline: Deadline) -> Iterator[Path]:
        """Lock the partial folder of `key` for the block, in all processes."""
        lock = self._partial / f"{key}.lock"
        handle = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            while not _lock(handle):
                deadline.left()
                time.sleep(LOCK_POLL)
            folder = self._partial / key
            folder.mkdir(exist_ok=True)
            yield folder
        finally:
            os.close(handle)

    def publish(self, key: str, mark: str, folder: Path) -> Path:
        """Make `folder` the complete one of `key`; remove older complete folders of `key` and its partial folder."""
        for path in folder.iterdir():
            _sync(path)
        _sync(folder)
        (self._ready / key).mkdir(exist_ok=True)
        target = self._ready / key / mark
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
        _sync(target.parent)
        for other in _by_age(target.parent):
            if other != target:
                shutil.rmtree(other, ignore_errors=True)
        shutil.rmtree(self._partial / key, ignore_errors=True)
        return target

    def make_room(self, nbytes: int) -> None:
        """Make room for so many more bytes: remove stale folders, then the least recently used ones not in use.

        Raises CacheFull.
        """
        self._drop_stale()
        sizes = {path: _size(path) for path in (*self._ready.iterdir(), *self._partial.iterdir())}
        free = self._max_bytes - sum(sizes.values())
        if free >= nbytes:
            return
        used = self._in_use()
        idle = [path for path in sizes if path.parent == self._ready and path.name not in used]
        for path in sorted(idle, key=_used):
            shutil.rmtree(path, ignore_errors=True)
            free += sizes[path]
            logger.info("downloaded files %s are dropped, to make room", path.name)
            if free >= nbytes:
                return
        raise CacheFull(
            f"the download folder has no room for {nbytes} bytes more beside the adapters in use ({self._max_bytes} "
            "bytes in all); unload some, or raise --download-cache"
        )

    def _drop_stale(self) -> None:
        for path in tuple(self._partial.iterdir()):
            if path.suffix == ".lock" or time.time() - _used(path) < STALE_SECONDS:
                continue
            handle = os.open(self._partial / f"{path.name}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                if _lock(handle):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


def key_of(text: str) -> str:
    """Return the key of a source by its text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _by_age(folder: Path) -> list[Path]:
    """List the folders in `path`, oldest first."""
    try:
        return sorted((path for path in folder.iterdir() if path.is_dir()), key=_mtime)
    except OSError:
        return []


def _used(path: Path) -> float:
    """Return when something in `path` was used last, in unix seconds."""
    with suppress(OSError):
        return max([_mtime(path), *map(_mtime, path.iterdir())])
    return 0.0


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
