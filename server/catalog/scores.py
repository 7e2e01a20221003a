"""What versions scored on golden sets, as somebody recorded it: kept for a restart, and asked for by promotions."""

from __future__ import annotations

import re
import threading

from loraplex.adapters.errors import AdapterRefused
from loraplex.server.catalog.saved import Remembering
from loraplex.server.catalog.version_records import KeptScore, StateChange, Who

MAX_SCORES = 256
"""Of all versions of one name together: the oldest go."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Scores:
    """Know the scores of versions. Reading: any thread; changes are made in the state writer's."""

    def __init__(self, adapters: Remembering) -> None:
        """Read what the state has of them. Raises StateError."""
        self._adapters = adapters
        self._lock = threading.Lock()
        self._known: dict[str, dict[tuple[str, str], KeptScore]] = {}  # by name, then digest and set
        for row in adapters.writer.store.rows(KeptScore):
            self._known.setdefault(row.name, {})[row.digest, row.golden] = row

    def of(self, name: str, digest: str) -> dict[str, float]:
        """Return the scores of a version, 0 to 1, by the sha256 of the golden set."""
        with self._lock:
            return {golden: row.score for (of, golden), row in self._known.get(name, {}).items() if of == digest}

    async def record(self, name: str, wanted: str, golden: str, score: float, who: Who = Who()) -> KeptScore:
        """Record what the version `wanted` (as it stands after the @) scored; a score of the same set goes.

        golden: sha256 of the set, in hex. Raises what leasing the version raises, AdapterRefused ("unread",
        "bad_golden"), StateNotKept.
        """

        def put() -> KeptScore:
            if not _DIGEST.fullmatch(golden):
                raise AdapterRefused(
                    "bad_golden", f"golden set {golden[:64]!r}: expected the 64 hex digits of its sha256"
                )
            with self._adapters.lookup.lease(name, wanted) as lease:
                digest = lease.version.digest
            if digest is None:
                raise AdapterRefused("unread", f"adapter {name!r} is not read yet; ask it something first")
            return self._write(KeptScore(name, digest, golden, score, self._adapters.clock()), who)

        return await self._adapters.writer.run(put)

    def _write(self, row: KeptScore, who: Who) -> KeptScore:
        """Write a score, in the writer's thread."""
        key = (row.digest, row.golden)
        with self._lock:
            known = dict(self._known.get(row.name, {}))
        old = known.pop(key, None)
        excess = sorted(known.values(), key=lambda each: -each.made)[MAX_SCORES - 1 :]
        before = "" if old is None else _told(old)
        change = StateChange(who, row.made, "score", f"{row.name}@{row.digest}", before, _told(row))
        with self._adapters.writer.changing(change) as transaction:
            transaction.put(row)
            for each in excess:
                transaction.drop(KeptScore, each.name, each.digest, each.golden)
                del known[each.digest, each.golden]
        with self._lock:
            self._known[row.name] = {**known, key: row}
        return row


def _told(row: KeptScore) -> str:
    return f"{row.score:g} on {row.golden}"
