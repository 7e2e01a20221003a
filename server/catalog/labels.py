"""Labels: names for versions of one adapter, as in `sql@prod`. What has a label stays."""

from __future__ import annotations

import re
import time

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused, VersionMoved, VersionUnclear
from loraplex.server.catalog.saved import Remembering
from loraplex.server.catalog.version_lookup import HEX, LATEST, PREVIOUS
from loraplex.server.catalog.version_records import KeptLabel, StateChange, Who

_LABEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_label(label: str) -> None:
    """Raise VersionUnclear for what cannot be a label: it must not look like a digest, nor be a word of our own."""
    if label in (LATEST, PREVIOUS) or HEX.fullmatch(label) or not _LABEL.fullmatch(label):
        raise VersionUnclear(
            f"label {label[:64]!r}: expected a-z, 0-9, '.', '_' and '-', not only of a digest's digits, and neither "
            f"'{LATEST}' nor '{PREVIOUS}'"
        )


async def set_label(
    adapters: Remembering, name: str, label: str, wanted: str, who: Who = Who(), expected: str | None = None
) -> str:
    """Have `name@label` stand for the version `wanted`, which stays for as long. Returns the digest.

    expected: the digest that the label has; "": there is none. Raises what leasing the version raises, VersionMoved,
    VersionUnclear for what is no label, AdapterRefused ("unread") for a version nobody has read, StateNotKept.
    """

    def put() -> str:
        check_label(label)
        old = adapters.versions.labels(name).get(label, "")
        if expected is not None and expected != old:
            raise VersionMoved(
                f"{name}@{label}: expected {expected[:64] or 'none'}, found {old or 'none'}", old or None
            )
        with adapters.lookup.lease(name, wanted) as lease:
            digest = lease.version.digest
        if digest is None:
            raise AdapterRefused("unread", f"adapter {name!r} is not read yet; ask it something first")
        change = StateChange(who, time.time(), "label", f"{name}@{label}", old, digest)
        with adapters.writer.changing(change) as transaction:
            transaction.put(KeptLabel(name, label, digest))
        adapters.versions.set_label(name, label, digest)
        return digest

    return await adapters.writer.run(put)


async def drop_label(adapters: Remembering, name: str, label: str, who: Who = Who()) -> str:
    """Take a label away. Returns the digest it stood for. Raises AdapterNotFound, StateNotKept."""

    def drop() -> str:
        old = adapters.versions.labels(name).get(label)
        if old is None:
            raise AdapterNotFound(f"adapter {name[:200]!r} has no label {label[:64]!r}")
        with adapters.writer.changing(StateChange(who, time.time(), "label", f"{name}@{label}", old)) as transaction:
            transaction.drop(KeptLabel, name, label)
        adapters.versions.set_label(name, label, "")
        return old

    return await adapters.writer.run(drop)
