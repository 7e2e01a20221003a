"""What of a folder is left while somebody else removes it."""

from __future__ import annotations

import os
from pathlib import Path


def left(folder: Path) -> list[str]:
    """List the names of all files below `folder`; one that goes meanwhile may be missing (rglob would raise)."""
    return [name for _, _, files in os.walk(folder) for name in files]
