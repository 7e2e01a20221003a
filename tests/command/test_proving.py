"""The audit log has what the operator loads and unloads: by the command line, a folder, a list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry
from loraplex.server.catalog.manager import DIRECTORY
from loraplex.server.catalog.state_store import StateStore
from loraplex.server.catalog.state_writer import StateWriter
from loraplex.server.command.proving import note_operator
from loraplex.server.proof.audit import AuditLog, files_of
from loraplex.server.proof.audit_reading import verify
from tests.catalog.test_reconciler import World, until


class Noted:
    """A log, and what is in it."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self.writer, self.log = StateWriter(StateStore(folder)), AuditLog(folder)
        note_operator(self.writer, registry, self.log)

    def lines(self) -> list[tuple[str, ...]]:
        self.writer.submit(lambda: None).result(20)
        verify(self.log.folder)
        found = [json.loads(line) for file in files_of(self.log.folder) for line in file.read_text().splitlines()]
        return [tuple(line[field] for field in ("key", "what", "name", "before", "after")) for line in found]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.manager.close()


def test_a_folder(world: World, tmp_path: Path) -> None:
    """Its adapters are in the log once they are read: before that nobody knows what they are."""
    noted, who = Noted(tmp_path / "state", world.registry), "operator: --adapter-dir"
    folder = world.adapter("a", "3")
    reconciler = world.follow()
    until(reconciler, lambda: world.names() == ["a"])
    assert noted.lines() == []
    world.loader.ensure(world.registry.get("a")).result(20)  # type: ignore[arg-type]
    assert noted.lines() == [(who, "load", "a", "", "digest-3")]
    world.adapter("a", "4")
    until(reconciler, lambda: world.registry.get("a").digest == "digest-4")  # type: ignore[union-attr]
    assert noted.lines()[1:] == [(who, "load", "a", "digest-3", "digest-4")]
    (folder / "adapter_config.json").unlink()
    folder.rmdir()
    until(reconciler, lambda: world.names() == [])
    assert noted.lines()[2:] == [(who, "unload", "a", "digest-4", "")]


def test_a_list(world: World, tmp_path: Path) -> None:
    noted, who = Noted(tmp_path / "state", world.registry), "operator: --adapters-file"
    source = world.adapter("elsewhere", "3", world.folder)
    world.write_list(f"ensurePresent: [{{name: b, source: {source}}}]")
    reconciler = world.follow()
    until(reconciler, lambda: world.names() == ["b"])
    assert noted.lines() == [(who, "load", "b", "", "digest-3")]
    world.write_list("ensurePresent: []")
    until(reconciler, lambda: world.names() == [])
    assert noted.lines()[1:] == [(who, "unload", "b", "digest-3", "")]


def test_what_was_there_before_the_log_and_what_requests_do(tmp_path: Path) -> None:
    registry = Registry()
    info = AdapterInfo(4, ("q_proj",), 1, 100, "one")
    registry.register("c", "/c", info, by="--adapter")
    registry.register("asked", "/asked", info)
    noted = Noted(tmp_path, registry)
    registry.register("d", "/d", info)
    registry.unregister("d")
    assert noted.lines() == [("operator: --adapter", "load", "c", "", "one")]
    assert DIRECTORY == "--adapter-dir"
