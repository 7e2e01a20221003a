"""What the copies of a tenant's versions take on disk."""

from __future__ import annotations

from dataclasses import replace

from loraplex.server.catalog.state_store import StateStore
from loraplex.server.catalog.state_writer import StateWriter
from loraplex.server.catalog.version_records import Who
from loraplex.server.catalog.versions import Versions


def test_copies_count_for_who_brought_them() -> None:
    versions = Versions(StateWriter(StateStore()))
    rows = [versions.draft("sql", digest * 64, "/sql", Who("ci", "acme")) for digest in "abc"]
    kept, gone, plain = rows
    other = replace(kept, name="other", tenant="else", copy="four", nbytes=1000)
    versions.write(
        replace(kept, copy="one", nbytes=10), replace(gone, copy="two", nbytes=100, gone="expired"), plain, other
    )
    assert [versions.copied_bytes(tenant) for tenant in ("acme", "else", "nobody")] == [10, 1000, 0]
