"""Replace a small file as a whole: what cannot be written to the end leaves the old one, and nothing beside it."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, text: str, mode: int = 0o600) -> None:
    """Have `text` in the file at `path`, on disk when it returns. Raises OSError.

    The file is the old one or the new one, whenever the process dies. Where it raises it is the old one, but for the
    last step: a folder that cannot be flushed may hold the new one, for as long as the machine runs.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Have the file or folder at `path` on disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what some network file systems say: a folder is nothing to flush there
            raise
    finally:
        os.close(handle)
