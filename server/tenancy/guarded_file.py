"""Read a file of keys, and refuse a file that others could have written."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

logger = logging.getLogger(__name__)


class Unguarded(ValueError):
    """Say that everybody on the machine may change the file; the message says how, and what to do."""


def read_guarded(path: Path, max_bytes: int) -> tuple[bytes, os.stat_result]:
    """Read the file's bytes, and its facts from before the reading. Raises OSError, Unguarded, ValueError.

    Modes say nothing where the file is mounted read-only, as Kubernetes mounts secrets: nobody writes there from here.
    """
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        if not os.fstatvfs(file.fileno()).f_flag & os.ST_RDONLY:
            _check_writers(path, found)
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes} bytes")
    return data, found


def _check_writers(path: Path, found: os.stat_result) -> None:
    """Raise Unguarded where others can write to the file or put another in its place, and so give themselves keys.

    The modes of links say nothing. In a folder with the sticky bit, such as /tmp, nobody replaces another user's file.
    """
    if found.st_mode & stat.S_IWOTH:
        raise Unguarded("everybody on this machine may write to it, and give themselves keys; chmod o-w")
    for folder in dict.fromkeys((*path.absolute().parents, *path.resolve().parents)):
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise Unguarded(
                f"everybody on this machine may put another file in its place, as they may write to {folder}; "
                "chmod o-w, or move it"
            )
    if found.st_mode & stat.S_IWGRP:
        logger.warning("keys file %s: its group (%d) may write to it, and give themselves keys", path, found.st_gid)
