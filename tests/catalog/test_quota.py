"""What each tenant has, and who makes room: names in namespaces never, what requests brought once it is idle."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry
from loraplex.adapters.version import AdapterLease
from loraplex.server.catalog.quota import Key, Quota, QuotaOwner, TooManyAdapters

ACME, BYTE = QuotaOwner("acme", 2), QuotaOwner("byte", 2)


class Here:
    """A registry, and holdings whose merges are named by `merged`."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.coming: tuple[str, ...] = ()
        self.merged: dict[Key, str] = {}
        self.quota = Quota(
            self.registry, lambda: self.coming, lambda key: key if isinstance(key, str) else self.merged.get(key)
        )

    def register(self, name: str) -> None:
        self.registry.register(name, "s", AdapterInfo(1, (), 1, 1, digest=f"digest of {name}"), replace=True)

    def load(self, owner: QuotaOwner | None, name: str) -> None:
        with self.quota.loading(owner, name):
            self.register(name)

    def bring(self, owner: QuotaOwner | None, name: str) -> AdapterLease:
        with self.quota.bringing(owner, name):
            if self.registry.get(name) is None:
                self.register(name)
            return self.registry.lease(name)

    @property
    def names(self) -> set[str]:
        return {version.name for version in self.registry.list()}


@pytest.fixture
def here() -> Here:
    return Here()


def test_a_namespace_holds_what_the_tenant_may_have_and_not_one_more(here: Here) -> None:
    here.load(ACME, "acme/a")
    here.load(None, "acme/b")  # by an admin
    with pytest.raises(TooManyAdapters, match="has 2 adapters here and may have 2: unload one of 'acme/'") as full:
        here.load(ACME, "acme/c")
    assert not full.value.passes
    here.load(ACME, "acme/b")  # in place of itself
    here.load(None, "acme/c")  # admins have no bound
    here.load(BYTE, "byte/a")  # nor is it another tenant's
    here.load(QuotaOwner("acm", 1), "acm/a")  # also of a name that begins alike
    for name in ("acme/a", "acme/c"):
        here.registry.unregister(name)
    here.load(ACME, "acme/d")
    assert here.names == {"acme/b", "acme/d", "byte/a", "acm/a"}


def test_what_is_on_its_way_counts_and_what_fails_does_not(here: Here) -> None:
    with ExitStack() as held:
        held.enter_context(here.quota.loading(ACME, "acme/a"))
        held.enter_context(here.quota.loading(ACME, "acme/b"))
        held.enter_context(here.quota.loading(ACME, "acme/b"))  # the same, once more at once
        with pytest.raises(TooManyAdapters):
            here.load(ACME, "acme/c")
    here.coming = ("acme/a", "byte/a")  # after a restart
    here.load(ACME, "acme/b")
    with pytest.raises(TooManyAdapters):
        here.load(ACME, "acme/c")
    here.coming = ()
    here.load(ACME, "acme/c")


def test_of_two_loads_of_one_name_the_first_to_fail_keeps_the_place_of_the_other(here: Here) -> None:
    here.load(ACME, "acme/a")
    second = here.quota.loading(ACME, "acme/b")
    second.__enter__()
    with pytest.raises(ZeroDivisionError), here.quota.loading(ACME, "acme/b"):
        raise ZeroDivisionError
    with pytest.raises(TooManyAdapters):
        here.load(ACME, "acme/c")
    second.__exit__(None, None, None)
    here.load(ACME, "acme/c")


def test_what_requests_brought_makes_room_once_it_is_idle(here: Here) -> None:
    leases = [here.bring(ACME, "hub/x"), here.bring(ACME, "hub/y")]
    for ask in (lambda: here.bring(ACME, "hub/z"), lambda: here.load(ACME, "acme/a")):
        with pytest.raises(TooManyAdapters, match="2 that its requests brought and wear") as full:
            ask()
        assert full.value.passes
    assert here.bring(ACME, "hub/x").version is leases[0].version  # those it has it may wear
    leases[1].release()
    here.load(ACME, "acme/a")
    assert here.names == {"hub/x", "acme/a"}
    with pytest.raises(TooManyAdapters):
        here.bring(ACME, "hub/y")


def test_the_least_recently_used_goes_first_and_all_that_must(here: Here) -> None:
    four = QuotaOwner("acme", 4)
    for name in ("hub/a", "hub/b", "hub/c", "hub/a"):
        here.bring(four, name).release()
    here.load(four, "acme/a")
    here.bring(ACME, "hub/d").release()  # with a bound that is lower by now
    assert here.names == {"acme/a", "hub/d"}


def test_nothing_goes_where_it_would_not_be_enough(here: Here) -> None:
    four = QuotaOwner("acme", 4)
    held = [here.bring(four, name) for name in ("hub/a", "hub/b")]
    here.bring(four, "hub/c").release()
    with pytest.raises(TooManyAdapters):
        here.load(ACME, "acme/a")
    assert here.names == {"hub/a", "hub/b", "hub/c"}
    held[0].release()


def test_nobody_learns_what_others_brought(here: Here) -> None:
    """What another tenant has brought counts as if it were not there, and is theirs still when one's own place goes."""
    here.bring(ACME, "hub/x").release()
    held = [here.bring(BYTE, "hub/x"), here.bring(BYTE, "hub/y")]
    here.bring(ACME, "hub/a").release()
    for name in ("hub/y", "hub/new"):
        one = QuotaOwner("one", 1)
        here.load(one, "one/a")
        with pytest.raises(TooManyAdapters, match="unload one of 'one/' first"):
            here.bring(one, name)
    here.load(ACME, "acme/a")  # in place of x, which byte wears, and which stays
    assert here.names == {"hub/x", "hub/y", "hub/a", "acme/a", "one/a"}
    with pytest.raises(TooManyAdapters):
        here.bring(BYTE, "hub/z")
    held[0].release()
    here.bring(BYTE, "hub/z")
    assert "hub/x" not in here.names


def test_who_waits_for_it_keeps_it(here: Here) -> None:
    """Between the end of a load and the lease of whoever asked for it, it has no lease and is not idle."""
    one = QuotaOwner("acme", 1)
    waiting = here.quota.bringing(one, "hub/x")
    waiting.__enter__()
    here.register("hub/x")
    with pytest.raises(TooManyAdapters):
        here.bring(one, "hub/y")
    assert here.quota.wanted_names() == {"hub/x"}
    lease = here.registry.lease("hub/x")
    waiting.__exit__(None, None, None)
    lease.release()
    here.bring(one, "hub/y")
    assert here.names == {"hub/y"}


def test_work_that_everybody_left_keeps_its_place(here: Here) -> None:
    one = QuotaOwner("acme", 1)
    with here.quota.bringing(one, "hub/x"):
        here.quota.work_began("hub/x")
    with pytest.raises(TooManyAdapters):
        here.bring(one, "hub/y")
    here.register("hub/x")
    here.quota.work_ended("hub/x")
    here.bring(one, "hub/y")
    assert here.names == {"hub/y"}


def test_a_merge_is_one_adapter_however_often_it_is_made(here: Here) -> None:
    """Its key is of versions, its name of their content: registered anew, the same content is the same merge."""
    keys = [((1, 2), "ties"), ((1, 3), "ties")]
    for key in keys:
        with here.quota.bringing(ACME, key):
            with pytest.raises(TooManyAdapters):
                here.bring(QuotaOwner("acme", 1), "hub/x")  # while it is made, and has no name
            here.merged[key] = "merged/k"
            here.register("merged/k")
    here.load(ACME, "acme/a")
    assert here.names == {"merged/k", "acme/a"}
    here.load(ACME, "acme/b")
    assert here.names == {"acme/a", "acme/b"}


class Tenants(RuleBasedStateMachine):
    """Whatever two tenants do: neither has more than it may, and all there is, is somebody's."""

    def __init__(self) -> None:
        super().__init__()
        self.here = Here()
        self.leases: list[AdapterLease] = []
        self.under_way: list[tuple[str, ExitStack]] = []

    holders = st.sampled_from([ACME, BYTE])
    sources = st.sampled_from([f"hub/{letter}" for letter in "abcd"])

    @rule(owner=holders, letter=st.sampled_from("abc"))
    def begin_load(self, owner: QuotaOwner, letter: str) -> None:
        self._begin(f"{owner.tenant}/{letter}", self.here.quota.loading(owner, f"{owner.tenant}/{letter}"))

    @rule(owner=holders, name=sources)
    def begin_bringing(self, owner: QuotaOwner, name: str) -> None:
        self._begin(name, self.here.quota.bringing(owner, name))

    def _begin(self, name: str, block: AbstractContextManager[None]) -> None:
        stack = ExitStack()
        try:
            stack.enter_context(block)
        except TooManyAdapters:
            return
        self.under_way.append((name, stack))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), works=st.booleans())
    def end(self, data: st.DataObject, works: bool) -> None:
        name, stack = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        with stack:
            if works and self.here.registry.get(name) is None:
                self.here.register(name)
            if works and name.startswith("hub/"):
                self.leases.append(self.here.registry.lease(name))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))).release()

    @precondition(lambda self: self.here.names)
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        self.here.registry.unregister(data.draw(st.sampled_from(sorted(self.here.names))))

    @invariant()
    def bounds_hold(self) -> None:
        names = self.here.names | {name for name, _ in self.under_way}
        brought = {name for name in names if name.startswith("hub/")}
        for owner in (ACME, BYTE):
            assert sum(name.startswith(f"{owner.tenant}/") for name in names) <= 2
        assert len(names) <= 4
        assert brought <= set(self.here.quota._tenants), "nobody's"


Tenants.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestTenants = Tenants.TestCase
