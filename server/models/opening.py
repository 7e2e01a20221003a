"""Choose the reader of a base's weights by what is there: a GGUF file, or safetensors in a folder.

A further format is a Checkpoint in a file of its own, and its line here or in formats/folder.py.
"""

from __future__ import annotations

from pathlib import Path

from loraplex.server.models.checkpoint import Checkpoint
from loraplex.server.models.formats.folder import open_folder
from loraplex.server.models.gguf.checkpoint import GgufCheckpoint
from loraplex.server.models.gguf.folder import WEIGHTS


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the weights at `path`, reading headers only. Raises WeightsError naming the file and what is wrong.

    path: a GGUF file, a folder with one that is called model.gguf, or one with safetensors.
    """
    path = Path(path)
    linked = path / WEIGHTS
    if path.suffix == ".gguf" or linked.exists():
        return GgufCheckpoint(linked if linked.exists() else path)
    return open_folder(path)
