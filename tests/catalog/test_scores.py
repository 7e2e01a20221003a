"""Scores survive the process, are in the audit's changes, and are bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.server.catalog import scores
from loraplex.server.catalog.aliases import Aliases, AliasState, Target
from loraplex.server.catalog.promotion import PromotionRefused
from loraplex.server.catalog.scores import Scores
from loraplex.server.catalog.state_store import StateNotKept, StateStore
from loraplex.server.catalog.version_records import StateChange, Who
from tests.support.fake_serving import FakeAdapters, digest_of_source, remembering

SETS = [f"{i:064x}" for i in range(8)]


async def test_scores_and_policies_survive_a_restart(tmp_path: Path) -> None:
    state = StateStore(tmp_path)
    adapters = FakeAdapters()
    for name in ("a", "b"):
        await adapters.register(name, f"/{name}")
    changes: list[StateChange] = []
    kept = remembering(adapters, state)
    kept.versions.on_change(changes.append)
    aliases = Aliases(kept)
    await aliases.put("x", AliasState("split", (Target("a", 9), Target("b", 1)), "eval >= previous"))
    await aliases.scores.record("a", "latest", SETS[0], 0.5)
    await aliases.scores.record("b", "latest", SETS[0], 0.25, Who("ci", "team"))
    assert (changes[-1].what, changes[-1].who.key, changes[-1].name) == ("score", "ci", f"b@{digest_of_source('/b')}")
    kept.writer.close()

    again = remembering(adapters, StateStore(tmp_path))
    aliases = Aliases(again)
    assert aliases.scores.of("b", digest_of_source("/b")) == {SETS[0]: 0.25}
    with pytest.raises(PromotionRefused, match=r"0\.2500 after 0\.5000"):
        await aliases.promote("x", "")
    await aliases.scores.record("b", "latest", SETS[0], 0.5)
    assert (await aliases.promote("x", "")).state == AliasState("split", (Target("b", 1.0),), "eval >= previous")
    again.writer.close()


async def test_the_oldest_scores_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "MAX_SCORES", 3)
    adapters = FakeAdapters()
    for name in ("a", "b"):
        await adapters.register(name, f"/{name}")
    kept = remembering(adapters, StateStore(tmp_path))
    found = Scores(kept)
    await found.record("b", "latest", SETS[0], 1)
    for golden in [*SETS[:4], SETS[2]]:
        await found.record("a", "latest", golden, 0.5)
    for known in (found, Scores(kept)):
        assert sorted(known.of("a", digest_of_source("/a"))) == SETS[1:4]
        assert sorted(known.of("b", digest_of_source("/b"))) == SETS[:1]
    kept.writer.close()


async def test_a_score_that_cannot_be_noted_is_none(tmp_path: Path) -> None:
    adapters = FakeAdapters()
    await adapters.register("a", "/a")
    kept = remembering(adapters, StateStore(tmp_path))

    def refuse(change: StateChange) -> None:
        raise StateNotKept(change.what)

    kept.versions.on_change(refuse)
    found = Scores(kept)
    with pytest.raises(StateNotKept):
        await found.record("a", "latest", SETS[0], 0.5)
    assert found.of("a", digest_of_source("/a")) == {} == Scores(kept).of("a", digest_of_source("/a"))
    kept.writer.close()
