"""Watch a folder of adapters: each look tells what has come, changed and gone since the last.

A look uses stat only, so it works on every file system and through every link that stays in the folder, a ConfigMap's
too: 10,000 folders take some 230 ms. Files that are being written are left alone until two looks find them the same.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from loraplex.adapters.files import tokenizer_files
from loraplex.adapters.files.beneath import Folder, opened
from loraplex.adapters.sources.remote import CONFIG_FILE, WEIGHTS_FILE

SETTLED_SECONDS = 2.0
"""Seconds. A file that is older at the first look is not being written."""

FileStamp = tuple[int, ...]
"""Device, inode, bytes, modified ns, changed ns; () of a file that is not there."""


class What(StrEnum):
    """What happened to a folder."""

    APPEARED = "appeared"
    CHANGED = "changed"
    VANISHED = "vanished"


@dataclass(frozen=True)
class FolderChange:
    """One folder that is not as it was."""

    what: What
    folder: Path


class FolderWatch:
    """Compare a directory's adapters with those of earlier looks. One thread only."""

    def __init__(self, directory: Path, throttle: Callable[[], object] = lambda: None) -> None:
        """An adapter is a folder in `directory` with an adapter_config.json; a name that begins with a dot is none.

        `throttle` is called between folders.
        """
        self.directory = directory
        self._throttle = throttle
        self._told: dict[str, tuple[FileStamp, ...]] = {}  # as the caller knows them
        self._seen: dict[str, tuple[FileStamp, ...]] | None = None  # at the last look

    def look(self) -> list[FolderChange]:
        """Return the changes since the last look, by name. Raises OSError if the directory cannot be listed."""
        with os.scandir(self.directory) as entries:
            found = sorted((entry.name, entry.is_symlink()) for entry in entries if not entry.name.startswith("."))
        now = {}
        with opened(self.directory, (self.directory,)) as place:
            for name, is_link in found:
                self._throttle()
                config = _stamp(place, name, CONFIG_FILE, is_link)
                if config:
                    weights = _stamp(place, name, WEIGHTS_FILE, is_link)
                    now[name] = (config, weights, *tokenizer_files.stamps(place, name))
        before, self._seen = self._seen, now
        changes = [self._change(name, stamps) for name, stamps in now.items() if self._is_ripe(name, stamps, before)]
        gone = [name for name in self._told if name not in now and name not in (before or {})]  # at two looks
        for name in gone:
            del self._told[name]
        return changes + [FolderChange(What.VANISHED, self.directory / name) for name in gone]

    def _is_ripe(
        self,
        name: str,
        stamps: tuple[FileStamp, ...],
        before: dict[str, tuple[FileStamp, ...]] | None,
    ) -> bool:
        if self._told.get(name) == stamps:
            return False
        if before is not None:
            return before.get(name) == stamps
        newest = max(max(stamp[3:], default=0) for stamp in stamps)
        return time.time() - newest / 1e9 > SETTLED_SECONDS

    def _change(self, name: str, stamps: tuple[FileStamp, ...]) -> FolderChange:
        what = What.CHANGED if name in self._told else What.APPEARED
        self._told[name] = stamps
        return FolderChange(what, self.directory / name)


def file_stamp(path: str | Path) -> FileStamp:
    """Stamp the file at `path`, or what a link there leads to: another file or a change gives another stamp."""
    try:
        return _stamp_of(os.stat(path))
    except OSError:
        return ()


def _stamp(place: Folder, name: str, file: str, is_link: bool) -> FileStamp:
    """Stamp a file of the folder `name` in `place`, or the link itself where a link leads out of `place`.

    The folder then counts as there, and its registration says what is wrong with it. is_link: whether the folder is a
    link; most are none, nor are their files, and take one call.
    """
    try:
        info = None if is_link else place.link(f"{name}/{file}")
        if info is not None and not stat.S_ISLNK(info.st_mode):
            return _stamp_of(info)
        return _stamp_of(place.stat(f"{name}/{file}"))
    except OSError as error:
        return _stamp_of(place.link(name)) if error.errno == errno.EXDEV else ()


def _stamp_of(info: os.stat_result) -> FileStamp:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
