"""Choose the reader of a base's weights by what is there.

A further format is a Checkpoint in a file of its own, and its line here or in formats/folder.py.
"""

from __future__ import annotations

from pathlib import Path

from loraplex.server.models.checkpoint import Checkpoint
from loraplex.server.models.formats.folder import open_folder


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the weights at `path`, reading headers only. Raises WeightsError naming the file and what is wrong."""
    return open_folder(Path(path))
