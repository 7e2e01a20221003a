"""What the base's files hash to, kept below the state's folder: a restarted server reads none of them again."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from loraplex.server.whole_file import replace_file

FILE = "base.json"


def identified(state_dir: Path | None, identify: Callable[[dict[str, str]], str]) -> str:
    """Return what `identify` makes of the files' digests that are kept, and keep those that it leaves there."""
    if state_dir is None:
        return identify({})
    kept = state_dir / FILE
    known = _read(kept)
    before = dict(known)
    digest = identify(known)
    if known != before:
        with suppress(OSError):  # a full disk: it is computed again the next time
            replace_file(kept, json.dumps(known))
    return digest


def _read(path: Path) -> dict[str, str]:
    """Read the digests of files by their identity; none where there are none, or what is there is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
