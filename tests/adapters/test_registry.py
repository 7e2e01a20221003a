"""Names, versions and leases: a version lives exactly as long as its name or somebody's lease does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from loraplex.adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterNotFound,
    AdapterRefused,
    InvalidAdapterName,
)
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.names import check_name
from loraplex.adapters.registry import Registry
from loraplex.adapters.version import AdapterLease, AdapterVersion
from tests.support.refusals import refused

NAMES = ("sql", "pirate", "acme/tickets")


def register(registry: Registry, name: str = "sql", digest: str = "d0", *, replace: bool = False) -> AdapterVersion:
    info = AdapterInfo(8, ("q_proj",), 3, 1000, digest)
    return registry.register(name, f"/adapters/{name}", info, replace=replace)


def test_a_version_is_what_was_registered() -> None:
    registry = Registry()
    version = register(registry)
    assert (version.name, version.digest, version.source, version.info.rank) == ("sql", "d0", "/adapters/sql", 8)
    assert (version.info.targets, version.info.num_pages, version.info.nbytes) == (("q_proj",), 3, 1000)
    assert version.created > 1_600_000_000
    assert registry.get("sql") == version
    assert registry.list() == (version,)


def test_a_digest_is_settled_once() -> None:
    registry = Registry()
    version = registry.register("sql", "s", AdapterInfo(8, ("q_proj",), 3, 1000))
    assert version.digest is None
    assert registry.uses("d0") == 0
    assert registry.identify(version, "d0")
    assert version.digest == "d0"
    assert registry.identify(version, "d0")
    assert not registry.identify(version, "d1")
    assert version.digest == "d0"
    assert registry.uses("d0") == 1
    assert registry.get("sql") is version
    assert "d0" not in repr(version), "what is printed before and after should not differ"


def test_threads_settle_one_digest() -> None:
    registry = Registry()
    versions = [registry.register(f"a{i}", "s", AdapterInfo(8, (), 3, 1000)) for i in range(200)]

    def settle(number: int) -> list[bool]:
        return [registry.identify(version, f"d{number}") for version in versions]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(settle, range(8)))
    for i, version in enumerate(versions):
        assert [f"d{number}" for number in range(8) if answers[number][i]] == [version.digest]


def renew(registry: Registry, old: AdapterVersion, digest: str) -> AdapterVersion | None:
    return registry.renew(old, AdapterInfo(16, ("v_proj",), 5, 2000, digest=digest))


def test_renewing_points_the_name_at_what_the_source_holds_now() -> None:
    drained: list[AdapterVersion] = []
    registry = Registry(drained.append)
    old = register(registry)
    lease = registry.lease("sql")
    registry.mark_refused("sql", AdapterRefused("bad_file", "at some time"))
    new = renew(registry, old, "d1")
    assert new is not None
    assert registry.get("sql") is new
    assert (new.digest, new.source, new.info.rank, new.info.num_pages) == ("d1", old.source, 16, 5)
    assert new.uid > old.uid
    assert registry.refused == {}
    assert renew(registry, old, "d2") is None, "it has lost its name already"
    assert registry.get("sql") is new
    assert drained == []
    lease.release()
    assert drained == [old]
    registry.unregister("sql")
    assert renew(registry, new, "d2") is None
    assert registry.list() == ()


def test_listing_is_by_name() -> None:
    registry = Registry()
    for name in ("b", "a", "t/c"):
        register(registry, name)
    assert [version.name for version in registry.list()] == ["a", "b", "t/c"]


def test_taken_and_unknown_names() -> None:
    registry = Registry()
    register(registry)
    with pytest.raises(AdapterExists, match=r"'sql'.*'/adapters/sql'"):
        register(registry)
    with pytest.raises(AdapterNotFound, match="'nobody'"):
        registry.lease("nobody")
    with pytest.raises(AdapterNotFound, match="'nobody'"):
        registry.unregister("nobody")
    assert registry.get("nobody") is None


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "tenant/name", "x" * 200, "..a", "-"])
def test_good_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a/b/c", "/a", "a/", "a//b", "..", ".", "../x", "t/..", "ä", "a\n", "a,b", "x" * 201, "a\0"],
)
def test_bad_names(name: str) -> None:
    registry = Registry()
    with pytest.raises(InvalidAdapterName) as caught:
        register(registry, name)
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidAdapterName):
        registry.mark_refused(name, AdapterRefused("bad_file", "no"))
    assert registry.list() == ()


def test_unregistering_lets_leases_finish() -> None:
    drained: list[AdapterVersion] = []
    registry = Registry(drained.append)
    version = register(registry)
    first, second = registry.lease("sql"), registry.lease("sql")
    assert registry.unregister("sql") is version
    with pytest.raises(AdapterNotFound):
        registry.lease("sql")
    assert registry.draining() == (version,)
    first.release()
    first.release()
    assert drained == []
    assert registry.leases(version) == 1
    assert registry.uses("d0") == 1
    second.release()
    assert drained == [version]
    assert registry.draining() == ()
    assert registry.uses("d0") == 0


def test_repointing_serves_both_versions() -> None:
    drained: list[AdapterVersion] = []
    registry = Registry(drained.append)
    old = register(registry, digest="d0")
    lease = registry.lease("sql")
    new = register(registry, digest="d1", replace=True)
    assert new.uid != old.uid
    assert lease.version is old
    assert registry.lease("sql").version is new
    assert drained == []
    lease.release()
    assert drained == [old]


def test_replacing_an_idle_version_drains_it_at_once() -> None:
    drained: list[AdapterVersion] = []
    registry = Registry(drained.append)
    old = register(registry)
    register(registry, digest="d1", replace=True)
    assert drained == [old]


def test_replace_works_where_nothing_is() -> None:
    registry = Registry()
    assert register(registry, replace=True) == registry.get("sql")


def test_two_names_share_a_digest() -> None:
    uses: list[int] = []
    registry = Registry(lambda version: uses.append(registry.uses(version.digest)))
    register(registry, "a", "same")
    register(registry, "b", "same")
    registry.unregister("a")
    registry.unregister("b")
    assert uses == [1, 0]


def test_a_lease_is_a_context_and_can_be_shared() -> None:
    drained: list[AdapterVersion] = []
    registry = Registry(drained.append)
    version = register(registry)
    with registry.lease("sql") as lease:
        registry.unregister("sql")
        other = lease.share()
    assert drained == []
    assert other.version is version
    other.release()
    assert drained == [version]
    with pytest.raises(ValueError, match="released"):
        lease.share()


def test_refused_names_answer_with_the_reason() -> None:
    registry = Registry()
    registry.mark_refused("broken", AdapterRefused("not_finite", "x has NaN"))
    with refused("not_finite", r"'broken'.*x has NaN"):
        registry.lease("broken")
    assert set(registry.refused) == {"broken"}
    assert registry.list() == ()
    register(registry, "broken")
    assert registry.refused == {}
    assert registry.lease("broken").version.name == "broken"
    registry.mark_refused("gone", AdapterRefused("missing_file", "no"))
    registry.clear_refused("gone")
    with pytest.raises(AdapterNotFound):
        registry.lease("gone")


def test_a_refused_replacement_leaves_the_old_version_serving() -> None:
    registry = Registry()
    version = register(registry)
    registry.mark_refused("sql", AdapterRefused("bad_file", "cut short"))
    assert registry.lease("sql").version is version
    assert "sql" in registry.refused


def test_unregistering_a_refused_name_forgets_it() -> None:
    registry = Registry()
    registry.mark_refused("sql", AdapterRefused("bad_file", "cut short"))
    with pytest.raises(AdapterNotFound, match="cut short"):
        registry.unregister("sql")
    assert registry.refused == {}


def test_a_failing_listener_does_not_reach_who_releases(caplog: pytest.LogCaptureFixture) -> None:
    def fail(version: AdapterVersion) -> None:
        raise RuntimeError("listener is broken")

    registry = Registry(fail)
    register(registry)
    lease = registry.lease("sql")
    registry.unregister("sql")
    lease.release()
    assert "listener is broken" in caplog.text
    assert registry.draining() == ()


def test_threads_never_lose_or_double_a_drain() -> None:
    """Leases taken and given back in eight threads while the name is re-pointed: each old version drains once."""
    drained: list[int] = []
    registry = Registry(lambda version: drained.append(version.uid))
    versions = [register(registry)]
    stop = threading.Event()

    def use() -> int:
        served = 0
        while not stop.is_set() or served == 0:
            lease = registry.lease("sql")
            assert lease.version.uid not in drained, "a drained version was leased"
            lease.share().release()
            lease.release()
            lease.release()
            served += 1
        return served

    with ThreadPoolExecutor(8) as pool:
        users = [pool.submit(use) for _ in range(8)]
        versions += [register(registry, digest=f"d{i}", replace=True) for i in range(1, 200)]
        stop.set()
        assert all(user.result() > 0 for user in users)
    assert sorted(drained) == [version.uid for version in versions[:-1]]
    assert registry.leases(versions[-1]) == 0
    registry.unregister("sql")
    assert sorted(drained) == [version.uid for version in versions]


class RegistryMachine(RuleBasedStateMachine):
    """The registry against a model of it: plain dictionaries and a list of leases held."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.drained: list[AdapterVersion] = []
        self.registry = Registry(self.drained.append)
        self.names: dict[str, AdapterVersion] = {}
        self.refused: set[str] = set()
        self.held: list[AdapterLease] = []
        self.made: list[AdapterVersion] = []

    def expected_drained(self) -> set[int]:
        alive = {version.uid for version in self.names.values()} | {lease.version.uid for lease in self.held}
        return {version.uid for version in self.made} - alive

    @rule(name=st.sampled_from(NAMES), digest=st.sampled_from(["x", "y"]), replace=st.booleans())
    def register(self, name: str, digest: str, replace: bool) -> None:
        if name in self.names and not replace:
            with pytest.raises(AdapterExists):
                register(self.registry, name, digest)
            return
        version = register(self.registry, name, digest, replace=replace)
        assert version.uid not in {v.uid for v in self.made}
        self.made.append(version)
        self.names[name] = version
        self.refused.discard(name)

    @rule(target=leases, name=st.sampled_from(NAMES))
    def lease(self, name: str) -> AdapterLease | None:
        if name not in self.names:
            with pytest.raises(AdapterRefused if name in self.refused else AdapterNotFound):
                self.registry.lease(name)
            return None
        lease = self.registry.lease(name)
        assert lease.version is self.names[name]
        self.held.append(lease)
        return lease

    @rule(target=leases, lease=leases)
    def share(self, lease: AdapterLease | None) -> AdapterLease | None:
        if lease is None:
            return None
        if lease not in self.held:
            with pytest.raises(ValueError, match="released"):
                lease.share()
            return None
        other = lease.share()
        assert other.version is lease.version
        self.held.append(other)
        return other

    @rule(lease=leases)
    def release(self, lease: AdapterLease | None) -> None:
        """Also of leases released before."""
        if lease is not None:
            lease.release()
            if lease in self.held:
                self.held.remove(lease)

    @rule(lease=consumes(leases))
    def release_for_good(self, lease: AdapterLease | None) -> None:
        self.release(lease)

    @rule(name=st.sampled_from(NAMES))
    def unregister(self, name: str) -> None:
        self.refused.discard(name)
        if name not in self.names:
            with pytest.raises(AdapterNotFound):
                self.registry.unregister(name)
            return
        assert self.registry.unregister(name) is self.names.pop(name)

    @rule(name=st.sampled_from(NAMES))
    def refuse(self, name: str) -> None:
        self.registry.mark_refused(name, AdapterRefused("bad_file", "damaged"))
        self.refused.add(name)

    @precondition(lambda self: self.refused)
    @rule()
    def forget(self) -> None:
        self.registry.clear_refused(self.refused.pop())

    @invariant()
    def drained_once_and_only_when_unused(self) -> None:
        assert sorted(version.uid for version in self.drained) == sorted(self.expected_drained())

    @invariant()
    def counts_agree(self) -> None:
        assert {version.name: version for version in self.registry.list()} == self.names
        assert set(self.registry.refused) == self.refused
        alive = [version for version in self.made if version.uid not in self.expected_drained()]
        for version in self.made:
            held = sum(lease.version.uid == version.uid for lease in self.held)
            assert self.registry.leases(version) == held
        for digest in ("x", "y"):
            assert self.registry.uses(digest) == sum(version.digest == digest for version in alive)
        current = {version.uid for version in self.names.values()}
        assert {version.uid for version in self.registry.draining()} == {v.uid for v in alive} - current


RegistryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_registry_against_its_model = RegistryMachine.TestCase


def test_errors_have_one_base() -> None:
    for kind in (AdapterExists, AdapterNotFound, InvalidAdapterName, AdapterRefused):
        assert issubclass(kind, AdapterError)
