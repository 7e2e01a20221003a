"""Somebody who puts a link in a folder's place, and takes it away again, while others read what is there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exchanging(name: Path, target: Path) -> Iterator[None]:
    """The folder `name` is again and again a link to `target`, and itself again."""
    over = threading.Event()
    aside = name.with_name(f"{name.name}.aside")

    def context() -> None:
        while not over.is_set():
            name.rename(aside)
            name.symlink_to(target)
            name.unlink()
            aside.rename(name)

    thread = threading.Thread(target=context)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
