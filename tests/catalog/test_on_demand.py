"""Adapters loaded or merged for requests: once for all who ask, bounded, private where a token fetched them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused
from loraplex.adapters.sources.merge_plan import MergePlan
from loraplex.adapters.sources.sources import OPERATOR, SourceAccess, parse_source
from loraplex.adapters.version import AdapterVersion
from loraplex.server.catalog.on_demand import OnDemand, first_use_name, is_hidden, source_of
from loraplex.server.catalog.quota import QuotaOwner, TooManyAdapters
from loraplex.server.engine.request import Overloaded
from tests.support.fake_serving import FakeAdapters
from tests.support.refusals import refused
from tests.support.waiting import turns

PLAN = MergePlan("ties", (1.0, 1.0), 0.5)


class Adapters(FakeAdapters):
    """Loads nothing; counts. `gate` holds loads back."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.accesses: list[SourceAccess] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None

    async def register(
        self, name: str, source: str, *, access: SourceAccess = OPERATOR, **given: Any
    ) -> AdapterVersion:
        self.loaded.append(source)
        self.accesses.append(access)
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return await super().register(name, source, access=access, **given)


class Merger:
    """Makes empty folders; counts."""

    def __init__(self) -> None:
        self.made: list[tuple[str, ...]] = []

    def __call__(self, versions: Sequence[AdapterVersion], plan: MergePlan, root: Path) -> str:
        self.made.append(tuple(version.name for version in versions))
        key = plan.key([version.digest or "" for version in versions])
        (root / key).mkdir(exist_ok=True)
        return key


async def test_a_hundred_requests_load_once_also_when_the_first_leaves() -> None:
    adapters = Adapters()
    adapters.gate.clear()
    on_demand = OnDemand(adapters, Merger())
    asked = [asyncio.create_task(on_demand.lease("/srv/a")) for _ in range(100)]
    await asyncio.sleep(0)
    asked[0].cancel()
    await asyncio.sleep(0)
    adapters.gate.set()
    leases = await asyncio.gather(*asked[1:])
    assert adapters.loaded == ["/srv/a"]
    assert len({lease.version.uid for lease in leases}) == 1
    assert adapters.registry.leases(leases[0].version) == 99


async def test_a_failure_reaches_all_and_is_tried_again_later() -> None:
    adapters = Adapters()
    adapters.failure = AdapterNotFound("gone")
    on_demand = OnDemand(adapters, Merger())
    found = await asyncio.gather(*(on_demand.lease("/srv/a") for _ in range(3)), return_exceptions=True)
    assert [type(each) for each in found] == [AdapterNotFound] * 3
    assert len(adapters.loaded) == 1
    adapters.failure = None
    (await on_demand.lease("/srv/a")).release()
    assert len(adapters.loaded) == 2


async def test_the_least_recently_used_idle_one_makes_room() -> None:
    adapters = Adapters()
    on_demand = OnDemand(adapters, Merger(), max_first_use=2)
    held = await on_demand.lease("/srv/a")
    (await on_demand.lease("/srv/b")).release()
    (await on_demand.lease("/srv/c")).release()  # b was used after a, but a is in use
    assert [version.source for version in adapters.registry.list()] == ["/srv/a", "/srv/c"]
    also = await on_demand.lease("/srv/c")
    with pytest.raises(Overloaded, match="2 adapters"):
        await on_demand.lease("/srv/d")
    held.release()
    (await on_demand.lease("/srv/d")).release()
    assert [version.source for version in adapters.registry.list()] == ["/srv/c", "/srv/d"]
    also.release()


async def test_many_at_once_have_room_for_no_more_than_there_is() -> None:
    adapters = Adapters()
    adapters.gate.clear()
    on_demand = OnDemand(adapters, Merger(), max_first_use=3)
    asked = [asyncio.create_task(on_demand.lease(f"/srv/{i}")) for i in range(100)]
    await turns()
    adapters.gate.set()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(each, Overloaded) for each in found) == 97
    assert len(adapters.registry.list()) == 3


async def test_what_somebody_is_about_to_wear_makes_no_room() -> None:
    on_demand = OnDemand(Adapters(), Merger(), max_first_use=1)
    (await on_demand.lease("/srv/a")).release()
    with on_demand.quota.bringing(None, first_use_name(parse_source("/srv/a"))), pytest.raises(Overloaded):
        await on_demand.lease("/srv/b")
    (await on_demand.lease("/srv/b")).release()


async def test_what_is_loaded_for_those_who_left_makes_room_too() -> None:
    adapters = Adapters()
    on_demand = OnDemand(adapters, Merger(), max_first_use=2)
    for i in range(5):
        adapters.gate.clear()
        asked = asyncio.create_task(on_demand.lease(f"/srv/{i}"))
        await turns()
        asked.cancel()
        adapters.gate.set()
        await turns()
    assert [version.source for version in adapters.registry.list()] == ["/srv/3", "/srv/4"]


async def test_a_tenant_brings_as_many_as_it_may_however_many_it_asks_for_at_once() -> None:
    adapters = Adapters()
    adapters.gate.clear()
    on_demand = OnDemand(adapters, Merger())
    acme, byte = QuotaOwner("acme", 3), QuotaOwner("byte", 3)
    asked = [asyncio.create_task(on_demand.lease(f"/srv/{i}", OPERATOR, acme)) for i in range(100)]
    await asyncio.sleep(0)
    other = asyncio.create_task(on_demand.lease("/srv/99", OPERATOR, byte))
    for task in asked[:2]:  # who leaves has it all the same: the load goes on
        task.cancel()
    await turns()
    with pytest.raises(TooManyAdapters):
        await on_demand.lease("/srv/new", OPERATOR, acme)
    adapters.gate.set()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(each, TooManyAdapters) for each in found) == 97
    assert sorted(adapters.loaded) == ["/srv/0", "/srv/1", "/srv/2", "/srv/99"]
    (await other).release()
    (await on_demand.lease("/srv/new", OPERATOR, acme)).release()
    assert {version.source for version in adapters.registry.list()} == {"/srv/1", "/srv/2", "/srv/99", "/srv/new"}


async def test_what_could_not_be_loaded_or_merged_takes_no_place() -> None:
    adapters, merger = Adapters(), Merger()
    on_demand = OnDemand(adapters, merger)
    acme = QuotaOwner("acme", 3)
    leases = [await on_demand.lease(f"/srv/{name}", OPERATOR, acme) for name in "ab"]
    adapters.failure = AdapterRefused("no_effect", "it is zero")
    for _ in range(2):
        with pytest.raises(AdapterRefused):
            await on_demand.lease("/srv/c", OPERATOR, acme)
        with pytest.raises(AdapterRefused):
            await on_demand.merge(leases, PLAN, acme)
    adapters.failure = None
    merged = await on_demand.merge(leases, PLAN, acme)
    with pytest.raises(
        TooManyAdapters, match="0 under 'acme/', which can be unloaded, and 3 that its requests brought"
    ):
        await on_demand.lease("/srv/c", OPERATOR, acme)
    merged.release()
    (await on_demand.lease("/srv/c", OPERATOR, acme)).release()
    assert not any(is_hidden(version.name) for version in adapters.registry.list())
    again = await on_demand.merge(leases, PLAN, acme)
    assert Path(again.version.source).is_dir()


async def test_what_an_operator_unloaded_is_loaded_again() -> None:
    adapters = Adapters()
    on_demand = OnDemand(adapters, Merger(), max_first_use=1)
    for _ in range(2):
        lease = await on_demand.lease("/srv/a")
        lease.release()
        adapters.registry.unregister(lease.version.name)
    assert len(adapters.loaded) == 2


async def test_what_a_token_fetched_is_for_those_who_have_it() -> None:
    adapters = Adapters()
    on_demand = OnDemand(adapters, Merger())
    tokens = [SourceAccess(token, ambient=False) for token in ("secret-1", "secret-2", None)]
    leases = [await on_demand.lease("org/name", access) for access in (*tokens, tokens[0])]
    names = [lease.version.name for lease in leases]
    assert len(set(names)) == 3
    assert names[0] == names[3]
    assert [is_hidden(name) for name in names] == [True, True, False, True]
    assert adapters.accesses == tokens
    assert not any("secret" in name for name in names)


async def test_merges_are_made_once_and_their_folders_go_with_them() -> None:
    adapters, merger = Adapters(), Merger()
    on_demand = OnDemand(adapters, merger, max_merged=1)
    leases = [await on_demand.lease(f"/srv/{name}") for name in "abc"]
    first = await asyncio.gather(*(on_demand.merge(leases[:2], PLAN) for _ in range(5)))
    assert len(merger.made) == 1
    (version,) = {lease.version for lease in first}
    assert Path(version.source).is_dir()
    with pytest.raises(Overloaded):
        await on_demand.merge(leases[1:], PLAN)
    for lease in first:
        lease.release()
    other = await on_demand.merge(leases[1:], PLAN)
    assert not Path(version.source).exists()
    assert Path(other.version.source).is_dir()
    assert [v.name for v in adapters.registry.list() if is_hidden(v.name)] == [other.version.name]


async def test_a_merge_that_cannot_be_served_is_not_kept() -> None:
    adapters, merger = Adapters(), Merger()
    on_demand = OnDemand(adapters, merger)
    leases = [await on_demand.lease(f"/srv/{name}") for name in "ab"]
    adapters.failure = AdapterRefused("no_effect", "it is zero")
    with refused("no_effect", "merged, the adapters cannot be served: it is zero"):
        await on_demand.merge(leases, PLAN)
    assert not Path(adapters.loaded[-1]).exists()


def test_sources_of_loraxs_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_of("local", "a/b") == str(tmp_path / "a" / "b")
    assert source_of("s3", "bucket/a") == source_of("s3", "s3://bucket/a") == "s3://bucket/a"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert source_of("hub", "org/name") == "hf://org/name", "the Hub's answer is never a folder's"
    for wrong in ("/srv/a", "name", "a/b/c", "../name", "a/..", "~/a"):
        with refused("unsupported_kind", "adapter_source is 'hub'"):
            source_of("hub", wrong)


def test_names_are_readable() -> None:
    name = first_use_name(parse_source("/srv/Sql Writer.v2"))
    assert name.startswith("local/Sql-Writer.v2-")
    assert first_use_name(parse_source("/srv/other/Sql Writer.v2")) != name
