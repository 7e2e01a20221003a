"""What becomes of a name's versions when a new one comes: rows in, rows out. Nothing is read or written here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from loraplex.adapters.errors import AdapterRefused
from loraplex.server.catalog.version_records import KeptVersion

Held = Callable[[KeptVersion], bool]
"""Whether a version must stay: a label or an alias stands for it."""


def succeed(
    history: Iterable[KeptVersion], new: KeptVersion, retain: int, is_held: Held, now: float
) -> tuple[KeptVersion, ...]:
    """Say which rows of a name change when `new` takes it: `new` itself, and those that cannot be asked for any more.

    history: the latest first. Of what has a copy the last `retain` stay, and what is held.
    """
    changed, left = [new], retain
    for row in history:
        if row.digest == new.digest or row.gone:
            continue
        if not row.copy:
            changed.append(replace(row, gone="replaced"))
        elif row.expires is not None and row.expires <= now:
            changed.append(replace(row, gone="expired"))
        elif left > 0:
            left -= 1
        elif not is_held(row):
            changed.append(replace(row, gone="dropped"))
    return tuple(changed)


def make_room(rows: Iterable[KeptVersion], new_bytes: int, max_bytes: int, may_go: Held) -> tuple[KeptVersion, ...]:
    """Say which copies go, the oldest first, so that all copies and `new_bytes` more are at most `max_bytes`.

    rows: of all names. Raises AdapterRefused ("too_large") where that is not enough.
    """
    kept = sorted((row for row in rows if row.copy and not row.gone), key=lambda row: row.made)
    excess = sum(row.nbytes for row in kept) + new_bytes - max_bytes
    gone = []
    for row in kept:
        if excess <= 0:
            break
        if may_go(row):
            gone.append(replace(row, gone="dropped"))
            excess -= row.nbytes
    if excess > 0:
        raise AdapterRefused(
            "too_large",
            f"a copy of {new_bytes} bytes does not fit beside the {len(kept) - len(gone)} that must stay: all together "
            f"may have {max_bytes} (--retained-bytes)",
        )
    return tuple(gone)
