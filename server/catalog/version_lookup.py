"""From `name@wanted` to a lease: the latest version, the previous one, a label, or the beginning of a digest."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loraplex.adapters.errors import AdapterNotFound, VersionGone, VersionUnclear
from loraplex.adapters.registry import Registry
from loraplex.adapters.version import AdapterLease
from loraplex.server.catalog.version_records import KeptVersion
from loraplex.server.catalog.versions import Versions

LATEST, PREVIOUS = "latest", "previous"
"""Words that are no labels."""

MIN_DIGITS = 12
"""Of a digest: 48 bits, which nobody meets twice by chance and nobody types by mistake."""

HEX = re.compile(r"[0-9a-f]+")

_GONE = {
    "expired": "has expired",
    "dropped": "is not kept any more",
    "replaced": "was replaced, and no copy of it was kept (retain)",
}
"""What is said of a version that was here, by KeptVersion.gone."""


class VersionLookup:
    """Find versions by what callers write after the @. Any thread."""

    def __init__(self, registry: Registry, versions: Versions) -> None:
        self._registry = registry
        self._versions = versions

    def lease(self, name: str, wanted: str = "") -> AdapterLease:
        """Lease the version `wanted` of `name`; "" and "latest": whichever the name points at.

        Raises AdapterNotFound, AdapterRefused, VersionUnclear, VersionGone, each with what is there.
        """
        if wanted in ("", LATEST):
            try:
                return self._registry.lease(name)
            except AdapterNotFound as error:
                raise self._gone(name, self._versions.history(name)[:1]) or error from None
        digest = self._digest(name, wanted)
        try:
            return self._registry.lease_version(name, digest)
        except AdapterNotFound as error:
            rows = [row for row in self._versions.history(name) if row.digest.startswith(digest)]
            raise self._gone(name, rows) or error from None

    def there(self, name: str) -> str:
        """List the versions of `name` that can be asked for, in words."""
        labels: dict[str | None, list[str]] = {}
        for label, digest in self._versions.labels(name).items():
            labels.setdefault(digest, []).append(label)
        found = []
        for version in self._registry.versions(name):
            marks = "".join(f" ({label})" for label in sorted(labels.get(version.digest, ())))
            found.append(f"{version.digest[:MIN_DIGITS]}{marks}" if version.digest else "one that is not read yet")
        return ", ".join(found) or "no version of it"

    def _digest(self, name: str, wanted: str) -> str:
        """Return the digest, or what it begins with."""
        if not self._registry.versions(name) and not self._versions.history(name):
            self._registry.lease(name).release()  # it says that there is no such name, or why not
        if wanted == PREVIOUS:
            return self._previous(name)
        if HEX.fullmatch(wanted):
            if len(wanted) < MIN_DIGITS:
                raise VersionUnclear(
                    f"{name}@{wanted}: found {len(wanted)} digits of a digest, expected {MIN_DIGITS} or more; there is "
                    f"{self.there(name)}"
                )
            return wanted
        digest = self._versions.labels(name).get(wanted)
        if digest is None:
            raise AdapterNotFound(
                f"adapter {name!r} has no version or label {wanted[:64]!r}; there is {self.there(name)}"
            )
        return digest

    def _previous(self, name: str) -> str:
        with self._registry.lease(name) as lease:
            current = lease.version.digest
        rows = [row.digest for row in self._versions.history(name)]
        rows += [version.digest or "" for version in self._registry.versions(name)]  # of folders that are followed
        found = next((digest for digest in rows if digest and digest != current), None)
        if found is None:
            raise AdapterNotFound(f"adapter {name!r} has had no other version before; there is {self.there(name)}")
        return found

    def _gone(self, name: str, rows: Sequence[KeptVersion]) -> VersionGone | None:
        """Say that what is asked for was here; None where it was not, or where the name was taken away."""
        for row in rows:
            if row.gone in _GONE:
                told = f"{name}@{row.digest[:MIN_DIGITS]} {_GONE[row.gone]}; there is {self.there(name)}"
                return VersionGone(told)
        return None
