"""Keep files in a temporary folder of each process, which the process locks while it lives.

A process that is killed, or told twice to stop, leaves its folder behind. Its lock ends with it, and the next process
that starts removes the folders that no process holds.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import weakref
from pathlib import Path

logger = logging.getLogger(__name__)

MERGED = "loraplex-merged-"
"""Begins the names of folders of merged adapters."""

PUSHED = "loraplex-pushed-"
"""Begins the names of folders of adapters that came over the network."""


class ProcessFolder:
    """One temporary folder of this process. It goes with the object, or with the process if that ends by itself."""

    def __init__(self, prefix: str = MERGED, parent: Path | None = None) -> None:
        """Make and lock a folder below `parent` (None: the system's for temporary files). Raises OSError."""
        self._folder = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX)
        # Another process may have seen it before it was locked, and removed it: whoever writes makes its parents.


def remove_stale(prefix: str = MERGED, parent: Path | None = None) -> None:
    """Remove the folders of this user that no process holds."""
    for path in (parent or Path(tempfile.gettempdir())).glob(f"{prefix}*"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # gone by now, or not ours
            continue
        try:
            if os.fstat(handle).st_uid == os.getuid():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                logger.info("%s is removed: the server that wrote there was killed", path)
        except BlockingIOError:  # its process lives
            continue
        finally:
            os.close(handle)
