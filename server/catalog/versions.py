"""The versions that names have and had: what was recorded of each when it came, kept for a restart."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from loraplex.server.catalog.state_writer import OnChange, StateWriter
from loraplex.server.catalog.version_plan import Held
from loraplex.server.catalog.version_records import KeptLabel, KeptVersion, Who

MAX_GONE = 64
"""Versions of one name that are remembered though they cannot be asked for any more: newer ones go before."""


class Versions:
    """Know every version that was brought over the API. Reading: any thread; writing: the state writer's."""

    def __init__(self, writer: StateWriter) -> None:
        """Read what the state has of them. Raises StateError."""
        self._writer = writer
        self.holders: list[Held] = []
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, KeptVersion]] = {}  # by name, then digest
        for row in writer.store.rows(KeptVersion):
            self._known.setdefault(row.name, {})[row.digest] = row
        self._labels = {(row.name, row.label): row.digest for row in writer.store.rows(KeptLabel)}

    def on_change(self, listener: OnChange) -> None:
        """Tell `listener` of every change before it is written; what it raises refuses the change."""
        self._writer.listeners.append(listener)

    def history(self, name: str) -> tuple[KeptVersion, ...]:
        """List the versions of `name`, the latest first."""
        with self._lock:
            found = tuple(self._known.get(name, {}).values())
        return tuple(sorted(found, key=lambda row: -row.number))

    def find(self, name: str, digest: str) -> KeptVersion | None:
        """Return what is known of one version."""
        with self._lock:
            return self._known.get(name, {}).get(digest)

    def all(self) -> tuple[KeptVersion, ...]:
        """List the versions of all names."""
        with self._lock:
            return tuple(row for known in self._known.values() for row in known.values())

    def copied_bytes(self, tenant: str) -> int:
        """Return what the copies take that are kept of versions which a tenant has brought."""
        return sum(row.nbytes for row in self.all() if row.copy and not row.gone and row.tenant == tenant)

    def is_held(self, row: KeptVersion) -> bool:
        """Return whether a label or an alias stands for the version, which has to stay then."""
        return row.digest in self.labels(row.name).values() or any(held(row) for held in self.holders)

    def labels(self, name: str) -> dict[str, str]:
        """Return the digests by label."""
        with self._lock:
            return {label: digest for (of, label), digest in self._labels.items() if of == name}

    def set_label(self, name: str, label: str, digest: str) -> None:
        """Know a label that is on disk; a digest of "": it is gone."""
        with self._lock:
            self._labels.pop((name, label), None)
            if digest:
                self._labels[name, label] = digest

    def draft(self, name: str, digest: str, source: str, who: Who = Who(), receipt: str = "") -> KeptVersion:
        """Make the row of a version that comes now: the latest of its name, also where it was there before."""
        known = self.history(name)
        number = known[0].number + 1 if known else 1
        old = self.find(name, digest)
        if old is not None:
            latest = old.number if old.number == number - 1 else number
            return replace(
                old,
                number=latest,
                source=source,
                gone="",
                expires=None,
                copy="",
                nbytes=0,
                receipt=receipt or old.receipt,
            )
        return KeptVersion(name, digest, number, source, time.time(), who.key, who.tenant, receipt=receipt)

    def set_receipt(self, name: str, digest: str, receipt: str) -> None:
        """Keep a receipt with its version; nothing where that is not known. Raises StateNotKept.

        In the writer's thread.
        """
        row = self.find(name, digest)
        if row is not None:
            self.write(replace(row, receipt=receipt))

    def write(self, *rows: KeptVersion) -> None:
        """Have rows on disk, and known from then on. Raises StateNotKept. In the writer's thread."""
        with self._writer.changing() as transaction:
            for row in rows:
                transaction.put(row)
        self.accept(*rows)

    def accept(self, *rows: KeptVersion) -> None:
        """Know rows that are on disk."""
        with self._lock:
            for row in rows:
                self._known.setdefault(row.name, {})[row.digest] = row

    def excess(self, name: str) -> tuple[KeptVersion, ...]:
        """List what is gone of `name` for longer than is remembered."""
        return tuple(row for row in self.history(name) if row.gone)[MAX_GONE:]

    def forget(self, *rows: KeptVersion) -> None:
        """Know nothing of rows that were dropped from the state."""
        with self._lock:
            for row in rows:
                self._known.get(row.name, {}).pop(row.digest, None)
