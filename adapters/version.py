"""A version: one content of an adapter under a name; and a lease: the right to run it until it is released."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING

from loraplex.adapters.files.beneath import shown
from loraplex.adapters.info import AdapterInfo

if TYPE_CHECKING:
    from loraplex.adapters.registry import Registry


class Known:
    """Hold a version's info, which gains the digest when the files are read first."""

    __slots__ = ("info",)

    def __init__(self, info: AdapterInfo) -> None:
        self.info = info


@dataclass(frozen=True)
class AdapterVersion:
    """Identify one immutable content of an adapter, as registered under a name."""

    name: str
    uid: int  # never reused, also when the name is
    source: str  # as sources.parse_source() has it
    created: int  # unix seconds
    _known: Known = field(repr=False, compare=False)
    given: str = ""  # where it came from, if `source` is a copy
    by: str = ""  # what the operator had it loaded by: "--adapter-dir"; "": a request of somebody's

    @property
    def info(self) -> AdapterInfo:
        """Return the facts the version was registered with, and the digest once the digest is known."""
        return self._known.info

    @property
    def digest(self) -> str | None:
        """Return the digest of the files' content: None until the first load (Registry.identify), then always the same.

        Two names may share a digest. Device, host memory and prefix cache are keyed by the digest.
        """
        return self._known.info.digest

    def settle(self, digest: str) -> bool:
        """Take `digest` for the version's own, unless it has one. Return whether that is `digest` now."""
        if self._known.info.digest is None:
            self._known.info = replace(self._known.info, digest=digest)
        return self._known.info.digest == digest

    @property
    def origin(self) -> str:
        """Return where it came from, as messages and listings show it."""
        return shown(self.given or self.source)


class AdapterLease:
    """Hold the right to run one version until `release()`. Registry.lease makes leases; a `with` block releases one."""

    __slots__ = ("_registry", "exact", "is_released", "version")

    def __init__(self, registry: Registry, version: AdapterVersion, *, exact: bool = False) -> None:
        self.version = version
        self.exact = exact  # this very version was asked for, not whichever the name points at
        self._registry = registry
        self.is_released = False  # guarded by the registry's lock

    def release(self) -> None:
        """Give the lease back. Further calls do nothing. The call may run `on_drained` in its own thread."""
        self._registry.end(self)

    def share(self) -> AdapterLease:
        """Make a further lease of the same version, also when the name points at another version by now.

        Raises ValueError when this lease is released already.
        """
        return self._registry.share(self)

    def renew(self) -> AdapterLease | None:
        """Lease the version that the name of this one points at by now.

        None where it is still this one, where this very one was asked for, and where the name is gone.
        """
        return None if self.exact else self._registry.renew_lease(self)

    def __enter__(self) -> AdapterLease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"AdapterLease({self.version.name!r}, uid={self.version.uid})"
