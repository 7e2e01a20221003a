"""The versions of an adapter as answers show them: what can be asked for, and what is known of those that are gone."""

from __future__ import annotations

import time
from typing import Literal

from loraplex.adapters.files.beneath import shown
from loraplex.adapters.version import AdapterVersion
from loraplex.server.api.answer_schemas import VersionCard
from loraplex.server.api.services import Services
from loraplex.server.catalog.version_records import KeptVersion
from loraplex.server.tenancy.tenants import current_key


def seconds_left(services: Services, version: AdapterVersion) -> float | None:
    """Return for how long a version stays that was loaded with a time to live; None: nothing ends it."""
    row = services.adapters.versions.find(version.name, version.digest or "")
    return None if row is None or row.expires is None else max(0.0, row.expires - time.time())


def version_cards(services: Services, name: str) -> list[VersionCard]:
    """List the versions of `name`, the latest first; who brought one only to those who may manage the adapter."""
    adapters, registry = services.adapters, services.adapters.registry
    current, labels = registry.get(name), adapters.versions.labels(name)
    there = {version.digest: version for version in reversed(registry.versions(name)) if version.digest is not None}
    rows = {row.digest: row for row in adapters.versions.history(name)}
    told = current_key().may_manage(name)
    cards = []
    for digest in [*rows, *(digest for digest in there if digest not in rows)]:
        row, version = rows.get(digest), there.get(digest)
        state: Literal["serving", "kept", "draining", "gone"] = "gone"
        if version is not None:
            state = "serving" if version is current else "kept" if registry.is_kept(version) else "draining"
        cards.append(
            VersionCard(
                digest=digest,
                state=state,
                labels=sorted(label for label, of in labels.items() if of == digest),
                scores=services.aliases.scores.of(name, digest),
                created=int(row.made) if row is not None else version.created if version is not None else 0,
                source=_source(services, name, row, version),
                by=row.key or None if row is not None and told else None,
                expires=None if row is None or row.expires is None else int(row.expires),
                gone=None if version is not None or row is None else row.gone or None,
            )
        )
    return cards


def _source(services: Services, name: str, row: KeptVersion | None, version: AdapterVersion | None) -> str:
    """Where a version came from; of what a client pushed its name."""
    if row is not None:
        return name if services.pushed.spool.owns(row.source) else shown(row.source)
    return version.origin if version is not None else ""
