"""The scheduler's view of the adapters (its Placement), over what holds them: sources, host store, device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from loraplex.adapters.host_store import HostStore
from loraplex.adapters.loader import LoadedAdapter, Loader
from loraplex.adapters.registry import AdapterVersion, Registry
from loraplex.adapters.residency import Residency
from loraplex.adapters.tiles import AdapterImage

logger = logging.getLogger(__name__)


class AdapterPlacement:
    """Engine thread only. `on_ready` is called from a loader's thread when an adapter has come, or failed to."""

    def __init__(self, residency: Residency, store: HostStore, loader: Loader, registry: Registry) -> None:
        self.on_ready: Callable[[], None] = lambda: None
        self._residency = residency
        self._store = store
        self._loader = loader
        self._registry = registry
        self._coming: dict[str, Future[LoadedAdapter]] = {}  # by digest; a failure stays until it is asked for again
        self._images: dict[str, AdapterImage] = {}  # of the last missing_pages(): the store may evict them meanwhile

    @property
    def loads(self) -> int:
        return self._residency.loads

    @property
    def evictions(self) -> int:
        return self._residency.evictions

    def request(self, version: AdapterVersion) -> None:
        coming = self._coming.get(version.digest)
        if coming is not None and coming.done() and coming.exception() is not None:
            del self._coming[version.digest]  # a new request is a new chance
        if not self._residency.is_resident(version.digest):
            self._ask(version)

    def missing_pages(self, versions: Sequence[AdapterVersion]) -> list[int] | None:
        self._images = {}
        missing: list[int] = []
        for version in versions:
            digest = version.digest
            if self._residency.is_resident(digest):
                missing.append(0)
                continue
            coming = self._coming.get(digest)
            if coming is not None and coming.done():
                coming.result()  # raises what went wrong
                del self._coming[digest]
            image = self._store.get(digest)
            if image is None:
                self._ask(version)
                continue
            self._images[digest] = image
            missing.append(self._residency.pages_needed(image))
        return missing if len(missing) == len(versions) else None

    def load(self, version: AdapterVersion) -> bool:
        return self._residency.load(version.digest, self._images[version.digest])

    def pin(self, digest: str) -> None:
        self._residency.pin(digest)

    def unpin(self, digest: str) -> None:
        self._residency.unpin(digest)

    def idle_pages(self) -> int:
        return self._residency.idle_pages

    def evict_idle(self, pages: int) -> int:
        return self._residency.evict_idle(pages)

    def evict_one(self) -> bool:
        return self._residency.evict_one()

    def forget(self, version: AdapterVersion) -> None:
        """A version has drained: drop its bytes from device and host unless another version has the same ones."""
        if self._registry.uses(version.digest):
            return
        self._residency.drop(version.digest)
        self._store.discard(version.digest)
        self._coming.pop(version.digest, None)

    def loaded(self) -> tuple[str, ...]:
        """Digests on the device."""
        return self._residency.loaded()

    def _ask(self, version: AdapterVersion) -> None:
        """Have the loader bring it, once for however many wait for it."""
        if version.digest not in self._coming:
            future = self._loader.ensure(version)
            self._coming[version.digest] = future
            future.add_done_callback(lambda _: self.on_ready())
