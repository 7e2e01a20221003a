"""What the operator pins: brought to the device with nobody asking, and then never evicted."""

from __future__ import annotations

import logging
from typing import Protocol

from loraplex.adapters.registry import AdapterVersion
from loraplex.adapters.tiers.residency import Residency

logger = logging.getLogger(__name__)


class Placement(Protocol):
    """The part of AdapterPlacement that is needed here."""

    def missing_pages(self, versions: tuple[AdapterVersion, ...]) -> list[int] | None: ...
    def load(self, version: AdapterVersion) -> bool: ...


class Pinned:
    """Engine thread only."""

    def __init__(self, residency: Residency, placement: Placement) -> None:
        self._residency = residency
        self._placement = placement
        self._versions: dict[int, AdapterVersion] = {}  # by uid
        self._missing: dict[int, AdapterVersion] = {}  # of these: not on the device yet

    def add(self, version: AdapterVersion) -> None:
        """`version` is wanted on the device from as soon as there is room."""
        self._versions[version.uid] = self._missing[version.uid] = version

    def remove(self, version: AdapterVersion) -> bool:
        """Let it be evicted again. False: it was not pinned."""
        self._missing.pop(version.uid, None)
        if self._versions.pop(version.uid, None) is None:
            return False
        digest = version.digest
        if digest is not None and all(other.digest != digest for other in self._versions.values()):
            self._residency.unpin_forever(digest)
        return True

    def bring(self) -> list[AdapterVersion]:
        """Go on with what is not on the device. Returns what cannot be had: logged, once, and pinned no more."""
        return [version for version in tuple(self._missing.values()) if not self._bring(version)]

    def _bring(self, version: AdapterVersion) -> bool:
        try:
            missing = self._placement.missing_pages((version,))
        except Exception as error:
            logger.warning("adapter %r is not pinned: %s", version.name, error)
            return False
        if missing is None:
            return True
        assert version.digest is not None  # it has been read
        if not self._residency.may_pin_forever(version.digest, version.info.num_pages):
            logger.warning(
                "adapter %r is not pinned: pinned ones would leave too little; give the server more memory (--memory), "
                "or slots (--max-loras)",
                version.name,
            )
            return False
        if not missing[0] or self._load(version, missing[0]):
            self._residency.pin_forever(version.digest)
            del self._missing[version.uid]
        return True

    def _load(self, version: AdapterVersion, pages: int) -> bool:
        if not self._residency.make_room(pages):
            return False
        return self._placement.load(version) or (self._residency.evict_one() and self._placement.load(version))
