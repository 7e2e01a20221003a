"""Versions that are brought to the device ahead of their first request, as somebody waits to hear that they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.tiers.pinned import load_into_room
from loraplex.adapters.version import AdapterVersion

if TYPE_CHECKING:
    from loraplex.adapters.tiers.cache import AdapterCache

logger = logging.getLogger(__name__)


class Warming:
    """Engine thread only."""

    def __init__(self, cache: AdapterCache) -> None:
        self._cache = cache
        self._coming: dict[int, tuple[AdapterVersion, Callable[[], None]]] = {}  # by uid

    def add(self, version: AdapterVersion, done: Callable[[], None]) -> None:
        """Bring `version`; call `done` once it is there, or cannot be had without taking what others use."""
        self._coming[version.uid] = version, done

    def bring(self) -> None:
        """Bring what is not on its way to the device."""
        for version, _ in tuple(self._coming.values()):
            if not self._begin(version):
                self.remove(version)

    def look(self) -> None:
        """Tell of those that have come."""
        for version, _ in tuple(self._coming.values()):
            if self._cache.is_ready(version):
                self.remove(version)

    def remove(self, version: AdapterVersion) -> None:
        """Give one up, if it is there."""
        found = self._coming.pop(version.uid, None)
        if found is not None:
            self._cache.drop_fetch(version)
            found[1]()

    def _begin(self, version: AdapterVersion) -> bool:
        """Have it on its way. False: it cannot be had now; whoever asks for it is told why."""
        try:
            missing = self._cache.missing_pages((version,))
        except AdapterError:
            return False
        except Exception:  # a fault of ours, which must not take the engine with it
            logger.exception("adapter %r is not brought ahead of its requests", version.name)
            return False
        return missing is None or not missing[0] or load_into_room(self._cache, version, missing[0])
