"""What the operator pins: brought to the device with nobody asking, and then never evicted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.version import AdapterVersion

if TYPE_CHECKING:
    from loraplex.adapters.tiers.cache import AdapterCache

logger = logging.getLogger(__name__)


class OperatorPins:
    """Engine thread only."""

    def __init__(self, cache: AdapterCache) -> None:
        self._cache = cache
        self._versions: dict[int, AdapterVersion] = {}  # by uid
        self._missing: dict[int, AdapterVersion] = {}  # of these: not on the device yet

    def add(self, version: AdapterVersion) -> None:
        """Want `version` on the device from as soon as there is room."""
        self._versions[version.uid] = self._missing[version.uid] = version

    def remove(self, version: AdapterVersion) -> bool:
        """Let `version` be evicted again. False: it was not pinned."""
        self._missing.pop(version.uid, None)
        if self._versions.pop(version.uid, None) is None:
            return False
        digest = version.digest
        if digest is not None and all(other.digest != digest for other in self._versions.values()):
            self._cache.device.unpin_forever(digest)
        return True

    def bring(self) -> list[AdapterVersion]:
        """Bring what is not on the device. Returns what cannot be had, which is logged, to be removed."""
        return [version for version in tuple(self._missing.values()) if not self._bring(version)]

    def _bring(self, version: AdapterVersion) -> bool:
        device = self._cache.device
        try:
            missing = self._cache.missing_pages((version,))
        except AdapterError as error:
            logger.warning("adapter %r is not pinned: %s", version.name, error)
            return False
        except Exception:  # a fault of ours, which must not take the engine with it
            logger.exception("adapter %r is not pinned", version.name)
            return False
        if missing is None:
            return True
        assert version.digest is not None  # it has been read
        if not device.may_pin_forever(version.digest, version.info.num_pages):
            logger.warning(
                "adapter %r is not pinned: pinned ones would leave too little; give the server more memory (--memory), "
                "or slots (--max-loras)",
                version.name,
            )
            return False
        if not missing[0] or load_into_room(self._cache, version, missing[0]):
            device.pin_forever(version.digest)
            del self._missing[version.uid]
        return True


def load_into_room(cache: AdapterCache, version: AdapterVersion, pages: int) -> bool:
    """Load `version` into so many pages, evicting what is idle. False: there is no room."""
    if not cache.device.make_room(pages):
        return False
    return cache.load(version) or (cache.device.evict_one() and cache.load(version))
