"""Adapters on their way from their sources into host memory, and there until their turn comes.

Room is reserved in the host store before a load begins, and held by its image once it has come, so that what waits in
host memory is never more than the store's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter

from loraplex.adapters.image.tiles import AdapterImage, BaseLayout
from loraplex.adapters.registry import AdapterVersion
from loraplex.adapters.tiers.host_store import HostStore, host_bytes, most_bytes
from loraplex.adapters.tiers.loader import LoadedAdapter, Loader, Priority


@dataclass
class _Coming:
    """A version on its way to host memory, or there and waiting for its turn."""

    asked: float  # perf_counter()
    nbytes: int  # of host memory: reserved, and then what the image takes
    urgent: bool
    from_source: bool
    future: Future[LoadedAdapter] | None  # None: it has come
    digest: str = ""  # under which the store holds it for us, once it has come,
    image: AdapterImage | None = None  # and the store's image


class Fetches:
    """Engine thread only. `on_ready` is called from a loader's thread when an adapter has come, or failed to."""

    def __init__(self, store: HostStore, loader: Loader, layout: BaseLayout) -> None:
        self.on_ready: Callable[[], None] = lambda: None
        self._store = store
        self._loader = loader
        self._layout = layout
        self.nbytes = 0  # of host memory that all of them take, or have reserved
        self._coming: dict[int, _Coming] = {}  # by uid, in order; a failure stays until it is asked for again

    def ask(self, version: AdapterVersion, urgent: bool, share: float = 1.0) -> bool:
        """Have the loader bring it, once for however many wait for it; or bring it sooner.

        False: it has to wait for room in host memory, of which all of them together get this share.
        """
        before = self._coming.get(version.uid)
        if before is not None:
            if urgent and not before.urgent and before.future is not None and not before.future.done():
                before.urgent = True
                slower, before.future = before.future, self._load(version, urgent)
                slower.cancel()  # only now: somebody waits at any time, and the reading goes on
            return True
        most = most_bytes(self._layout, version.info.num_pages, version.info.rank)
        most = min(most, self._store.capacity_bytes)  # what takes more is for the store to refuse
        if self.nbytes + most > share * self._store.capacity_bytes:
            return False
        digest, now = version.digest, perf_counter()
        image = None if digest is None else self._store.hold(digest)
        if digest is not None and image is not None:
            self._store.get(digest)  # a use of it
            coming = _Coming(now, host_bytes(image), urgent, False, None, digest, image)
        elif self._store.reserve(most):
            coming = _Coming(now, most, urgent, True, self._load(version, urgent))
        else:
            return False
        self._coming[version.uid] = coming
        self.nbytes += coming.nbytes
        return True

    def image(self, version: AdapterVersion) -> AdapterImage | None:
        """What has come of it; None while nothing has. Raises what kept it from being read."""
        coming = self._coming[version.uid]
        if coming.future is not None and coming.future.done():
            if coming.future.exception() is not None:
                self._store.unreserve(coming.nbytes)
                self._recount(coming, 0)
            loaded = coming.future.result()  # raises what went wrong
            coming.image = self._store.keep(loaded.digest, loaded.image, coming.nbytes)
            coming.digest, coming.future = loaded.digest, None
            self._recount(coming, host_bytes(coming.image))
        return coming.image

    def has_failed(self, uid: int) -> bool:
        """Whether it could not be read."""
        coming = self._coming.get(uid)
        future = None if coming is None else coming.future
        return future is not None and future.done() and future.exception() is not None

    def asked(self, uid: int) -> float | None:
        """perf_counter() when it was first wanted; None: it was not."""
        coming = self._coming.get(uid)
        return None if coming is None else coming.asked

    def was_read(self, uid: int) -> bool:
        """Whether it was not in the host store when it was first wanted."""
        return self._coming[uid].from_source

    def forget(self, uid: int) -> None:
        """It is not wanted any more, or there is no room for it; nothing happens when it was not asked for."""
        coming = self._coming.pop(uid, None)
        if coming is None:
            return
        self.nbytes -= coming.nbytes
        if coming.future is not None:
            coming.future.cancel()
            self._store.unreserve(coming.nbytes)
        else:
            self._store.release(coming.digest)

    def removable(self, but: Collection[int]) -> Iterator[tuple[int, int]]:
        """(uid, bytes) of what could be forgotten and fetched again, but for these; the last asked for first."""
        for uid, coming in reversed(tuple(self._coming.items())):
            if uid not in but and coming.nbytes:
                yield uid, coming.nbytes

    def check_integrity(self) -> int:
        """Raises AssertionError unless the bytes agree. Returns those that are reserved for what has not come yet."""
        assert self.nbytes == sum(coming.nbytes for coming in self._coming.values()), "what comes is miscounted"
        return sum(coming.nbytes for coming in self._coming.values() if coming.future is not None)

    def _recount(self, coming: _Coming, nbytes: int) -> None:
        self.nbytes += nbytes - coming.nbytes
        coming.nbytes = nbytes

    def _load(self, version: AdapterVersion, urgent: bool) -> Future[LoadedAdapter]:
        future = self._loader.ensure(version, Priority.URGENT if urgent else Priority.LOOKAHEAD)
        future.add_done_callback(self._come)
        return future

    def _come(self, future: Future[LoadedAdapter]) -> None:
        """In whatever thread: an adapter has come, or failed to."""
        if not future.cancelled():
            self.on_ready()
