"""Decide which local folders requests may load adapters from, once there are tenants."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.files.beneath import below
from loraplex.server.tenancy.tenants import current_key


@dataclass(frozen=True)
class LocalSources:
    """The folders that requests may load adapters from."""

    allowed: tuple[Path, ...]  # by all who may load
    named: Path | None = None  # each folder in it is an adapter: by those who may use its name

    def permit(self, place: str) -> str | None:
        """Return the local folder `place` as a source that stays where the current key may load from; None: it may not.

        Links are followed now, and again when the folder is opened, below the folder that the source names and no
        further, whatever has become of the names meanwhile. Raises OSError, RuntimeError.
        """
        given = _absolute(Path(place))
        real = given.resolve()
        named = () if self.named is None else (self.named,)
        for folder in (*self.allowed, *(named if current_key().admin else ())):
            root = _absolute(folder)
            if real.is_relative_to(root.resolve()):
                path, root = next(
                    ((given, name) for name in (root, root.resolve()) if given.is_relative_to(name)),
                    (real, root.resolve()),
                )
                return below(root, path.relative_to(root))
        for folder in named:
            root = _absolute(folder)
            inner = real.relative_to(root.resolve()) if real.is_relative_to(root.resolve()) else Path()
            if inner.parts and current_key().may_use(inner.parts[0]):
                return below(root, inner.parts[0], Path(*inner.parts[1:]))
        return None


def _absolute(path: Path) -> Path:
    """Resolve `path` without "~" and "..", and with its links. Raises RuntimeError for a user that is not there."""
    return Path(os.path.abspath(path.expanduser()))
