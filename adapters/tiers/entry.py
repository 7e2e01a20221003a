"""Entry: all that is known of one content of an adapter. Free of torch.

    source ----> coming ----> host ----> copying ----> device
       ^            |          | ^          |             |
       +------------+----------+ +----------+-------------+

source    only its files have the content
coming    a loader's thread reads the files, or will
host      an image is in host memory
copying   slot and pages are taken, and the image is being copied there
device    the content can be computed with

The contents of old versions in use are in no source: rules about them are in retention.py.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from loraplex.adapters.tiers.load_queue import LoadedContent

if TYPE_CHECKING:
    from loraplex.adapters.image.tiles import AdapterImage


@dataclass(eq=False)
class Entry:
    """One content. Changed by the engine's thread alone."""

    digest: str
    name: str = ""  # that it was brought to the device for; empty: it is not on the device
    asked: float | None = None  # perf_counter() when the copy under way was first wanted
    # the host's side
    image: AdapterImage | None = None  # in host memory
    holds: int = 0  # reasons for the image to stay
    leaves_host: bool = False  # the image goes at the last release
    # who needs it
    users: set[int] = field(default_factory=set)  # uids of versions that open requests have seen in reach
    is_begun: bool = False  # an open request has used the content
    # of a content that an open request has used and that its source has no more:
    promised: int = 0  # bytes of host memory reserved to read the image back from the device
    stays: bool = False  # the content is pinned on the device

    @property
    def is_idle(self) -> bool:
        """Return whether nothing but its source has the content and nobody wants it."""
        return not (self.image is not None or self.users or self.name)


class Entries(dict[str, Entry]):
    """Entries by digest: those that are more than their source, or that somebody uses."""

    def make(self, digest: str) -> Entry:
        """Return the entry of `digest`, new if there is none."""
        entry = self.get(digest)
        if entry is None:
            entry = self[digest] = Entry(digest)
        return entry

    def prune(self, entry: Entry) -> None:
        """Drop `entry` if it says nothing."""
        if entry.is_idle:
            self.pop(entry.digest, None)


@dataclass(eq=False)
class Fetch:
    """A version on its way from its source to host memory, or there until its turn comes."""

    asked: float  # perf_counter() when it was first wanted
    nbytes: int  # of host memory: reserved, and then what the image takes
    is_urgent: bool
    is_from_source: bool  # False: it was in host memory when it was first wanted
    future: Future[LoadedContent] | None  # None: the content is in host memory
    entry: Entry | None = None  # whose image is held for the version once the content is there

    @property
    def has_failed(self) -> bool:
        """Return whether the source could not be read."""
        return self.future is not None and self.future.done() and self.future.exception() is not None


class AdapterWatch(Protocol):
    """Who wants to know what single adapters cost. Called on the engine's thread."""

    def missed(self, name: str) -> None: ...
    def loaded(self, name: str, seconds: float) -> None: ...
    def evicted(self, name: str) -> None: ...
