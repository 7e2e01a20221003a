"""What each name answers, whatever is loaded in place, labelled, split, promoted, rolled back, over or killed."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.adapters.errors import AdapterError, AdapterNotFound, AdapterRefused, VersionGone, VersionMoved
from loraplex.server.catalog.alias_reach import AliasRefused
from loraplex.server.catalog.aliases import AliasState, Target
from loraplex.server.catalog.labels import set_label
from tests.support.version_world import VersionWorld, digest_of, write_adapter

NAMES = st.sampled_from(["a", "b"])
TEXTS = st.sampled_from(["one", "two", "three", "four"])
TTL = 100.0

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where to have files: a flush to disk, of which a step has some, takes 10 ms and more."""


class Versions(RuleBasedStateMachine):
    """The model: a history of (text, over at) for each name, the latest last, and what can be asked for of it."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=MEMORY))
        self.world = VersionWorld(self.root / "state")
        self.now = 0.0
        self.current: dict[str, str] = {}
        self.kept: dict[str, dict[str, float | None]] = {"a": {}, "b": {}}  # text -> when it is over, the latest last
        self.labels: dict[str, str] = {}  # by name, of the label "prod"
        self.alias: tuple[str, ...] = ()  # texts of a that x is split over
        self.before: tuple[str, ...] = ()
        self.gone: dict[str, set[str]] = {"a": set(), "b": set()}
        self.revision = 0

    def teardown(self) -> None:
        self.world.stop()
        shutil.rmtree(self.root, ignore_errors=True)

    def held(self, name: str, text: str) -> bool:
        return self.labels.get(name) == text or (name == "a" and text in (*self.alias, *self.before))

    def supersede(self, name: str, text: str, retain: int, over: float | None) -> None:
        """`name` has `text` from now on."""
        kept = self.kept[name]
        kept.pop(text, None)
        left = retain
        for old in reversed(list(kept)):
            over_at = kept[old]
            if over_at is not None and over_at <= self.now:
                pass
            elif left > 0:
                left -= 1
                continue
            elif self.held(name, old):
                continue
            del kept[old]
            self.gone[name].add(old)
        kept[text] = over
        self.gone[name].discard(text)
        self.current[name] = text

    @rule(name=NAMES, text=TEXTS, retain=st.integers(0, 2), ttl=st.sampled_from([None, TTL]))
    def load(self, name: str, text: str, retain: int, ttl: float | None) -> None:
        folder = write_adapter(self.root / name, text)  # in place: the files of the version before are gone
        self.world.load(name, folder, retain=retain, ttl=ttl)
        self.supersede(name, text, retain, None if ttl is None else self.now + ttl)

    @rule(name=NAMES)
    def load_bad(self, name: str) -> None:
        folder = write_adapter(self.root / name, "bad")
        with pytest.raises(AdapterRefused):
            self.world.load(name, folder, retain=1)

    @rule(name=NAMES, text=TEXTS, guess=TEXTS)
    def compare_and_swap(self, name: str, text: str, guess: str) -> None:
        folder = write_adapter(self.root / name, text)
        if self.current.get(name) == guess:
            self.world.load(name, folder, replace=False, expected=digest_of(guess)[:12], retain=1)
            self.supersede(name, text, 1, None)
        else:
            with pytest.raises(VersionMoved) as refused:
                self.world.load(name, folder, expected=digest_of(guess), retain=1)
            there = self.current.get(name)
            assert refused.value.present == (None if there is None else digest_of(there))

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        if name in self.current:
            self.world.unload(name)
            self.forget(name, "unloaded")

    def forget(self, name: str, why: str) -> None:
        if why == "expired":
            self.gone[name].update(self.kept[name])
        self.kept[name].clear()
        del self.current[name]

    @rule(name=NAMES, data=st.data())
    def label(self, name: str, data: st.DataObject) -> None:
        if self.kept[name]:
            text = data.draw(st.sampled_from(sorted(self.kept[name])))
            asyncio.run(set_label(self.world.adapters, name, "prod", digest_of(text)))
            self.labels[name] = text

    @rule(data=st.data(), stale=st.booleans())
    def split(self, data: st.DataObject, stale: bool) -> None:
        if not self.kept["a"]:
            return
        texts = data.draw(st.lists(st.sampled_from(sorted(self.kept["a"])), min_size=1, max_size=3, unique=True))
        targets = tuple(Target(f"a@{digest_of(text)[:14]}", 1.0 + i) for i, text in enumerate(texts))
        putting = self.world.aliases.put("x", AliasState("split", targets), expected=self.revision + stale)
        if stale:
            with pytest.raises(VersionMoved):
                asyncio.run(putting)
        else:
            asyncio.run(putting)
            self.turn(tuple(texts))

    def turn(self, texts: tuple[str, ...]) -> None:
        self.alias, self.before, self.revision = texts, self.alias, self.revision + 1

    @precondition(lambda self: self.alias)
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        text = data.draw(st.sampled_from(self.alias))
        if self.is_whole((text,)):
            asyncio.run(self.world.aliases.promote("x", f"a@{digest_of(text)}"))
            self.turn((text,))

    @precondition(lambda self: self.before)
    @rule()
    def roll_back(self) -> None:
        if self.is_whole(self.before):
            asyncio.run(self.world.aliases.roll_back("x"))
            self.turn(self.before)
        else:  # what it stood for is over, or was unloaded
            with pytest.raises((VersionGone, AliasRefused)):
                asyncio.run(self.world.aliases.roll_back("x"))

    def is_whole(self, texts: tuple[str, ...]) -> bool:
        return all(text in self.kept["a"] for text in texts)

    @rule()
    def time_passes(self) -> None:
        self.now += TTL
        self.world.now = self.now
        self.world.tick()
        for name in ("a", "b"):
            over = {text for text, at in self.kept[name].items() if at is not None and at <= self.now}
            if self.current.get(name) in over:
                self.forget(name, "expired")
            for text in over & self.kept[name].keys():
                del self.kept[name][text]
                self.gone[name].add(text)

    @rule()
    def restart(self) -> None:
        self.world.stop()
        self.world = VersionWorld(self.root / "state", self.now)

    @invariant()
    def names_answer(self) -> None:
        for name in ("a", "b"):
            for wanted in ("", "latest"):
                if name in self.current:
                    assert self.world.digest(name, wanted) == digest_of(self.current[name])
                else:
                    with pytest.raises(AdapterError):
                        self.world.digest(name, wanted)
            for text in ("one", "two", "three", "four"):
                digest = digest_of(text)
                if text in self.kept[name]:
                    assert self.world.digest(name, digest[:12]) == digest
                elif text in self.gone[name]:
                    with pytest.raises(VersionGone):
                        self.world.digest(name, digest)
                else:
                    with pytest.raises(AdapterNotFound):
                        self.world.digest(name, digest)

    @invariant()
    def labels_and_aliases_answer(self) -> None:
        for name, text in self.labels.items():
            if text in self.kept[name]:
                assert self.world.digest(name, "prod") == digest_of(text)
        alias = self.world.aliases.get("x")
        assert (alias is not None) == bool(self.alias)
        if alias is not None:
            assert alias.revision == self.revision
            assert [target.name for target in alias.state.targets] == [f"a@{digest_of(text)}" for text in self.alias]

    @invariant()
    def copies_are_of_what_is_kept(self) -> None:
        """And nothing else stays on disk."""
        self.world.copies.settle()
        there = (
            {path.name for path in self.world.copies.folder.glob("*")} if self.world.copies.folder.exists() else set()
        )
        rows = {row.copy for row in self.world.adapters.versions.all() if row.copy and not row.gone}
        assert there == rows


TestVersions = Versions.TestCase
TestVersions.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
