"""What the operator pins: brought to the device with nobody asking, and then never evicted."""

from __future__ import annotations

import logging
from collections.abc import Callable

from loraplex.adapters.registry import AdapterVersion
from loraplex.adapters.tiers.residency import Residency

logger = logging.getLogger(__name__)

Bring = Callable[[AdapterVersion], bool]
"""Have a version on the device if it has come and there is room. Raises what kept it from being read."""


class OperatorPins:
    """Engine thread only."""

    def __init__(self, device: Residency) -> None:
        self._device = device
        self._versions: dict[int, AdapterVersion] = {}  # by uid
        self._missing: dict[int, AdapterVersion] = {}  # of these: not on the device yet

    def add(self, version: AdapterVersion) -> None:
        """`version` is wanted on the device from as soon as there is room."""
        self._versions[version.uid] = self._missing[version.uid] = version

    def remove(self, version: AdapterVersion) -> bool:
        """Let `version` be evicted again. False: it was not pinned."""
        self._missing.pop(version.uid, None)
        if self._versions.pop(version.uid, None) is None:
            return False
        digest = version.digest
        if digest is not None and all(other.digest != digest for other in self._versions.values()):
            self._device.unpin_forever(digest)
        return True

    def missing(self) -> tuple[AdapterVersion, ...]:
        """Return the versions that are not on the device yet."""
        return tuple(self._missing.values())

    def is_on_device(self, version: AdapterVersion) -> None:
        """`version` has its slot and pages: it is never evicted from now on."""
        assert version.digest is not None
        self._device.pin_forever(version.digest)
        del self._missing[version.uid]
