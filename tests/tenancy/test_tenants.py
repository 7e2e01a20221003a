"""What a key may use and manage, and how it is found."""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.tenancy import tenants
from loraplex.server.tenancy.rate_limits import Account, Limits
from loraplex.server.tenancy.tenants import (
    ANYONE,
    Caller,
    Key,
    Keyring,
    calling,
    current_caller,
    current_key,
    digest_of,
    owners_keyring,
)

KEY = Key("ci", "acme", ("acme/*", "sql", "v?-*"))


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("sql", "sql", True),
        ("sql", "sql2", False),
        ("sql", "x/sql", False),
        ("*", "sql", True),
        ("*", "acme/sql", False),
        ("acme/*", "acme/sql", True),
        ("acme/*", "acme/", True),
        ("acme/*", "acmes/sql", False),
        ("acme/*", "sql", False),
        ("acme*", "acme/sql", False),
        ("*/sql", "acme/sql", True),
        ("**", "acme/sql", True),
        ("**", "sql", True),
        ("a.c", "abc", False),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("s*", "sql\n", True),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    assert Key("k", "t", (pattern,)).may_use(name) is matches


_NAMES = st.text("ab.-", min_size=1, max_size=6)


@given(pattern=st.text("ab.-*?", min_size=1, max_size=6).filter(lambda text: "**" not in text), name=_NAMES)
def test_within_a_namespace_patterns_are_the_shells(pattern: str, name: str) -> None:
    assert Key("k", "t", (pattern,)).may_use(name) == fnmatch.fnmatchcase(name, pattern)
    assert Key("k", "t", (f"t/{pattern}",)).may_use(f"t/{name}") == fnmatch.fnmatchcase(name, pattern)
    assert not Key("k", "t", (pattern,)).may_use(f"t/{name}")


@pytest.mark.parametrize(
    ("name", "used", "managed"),
    [("acme/x", True, True), ("sql", True, False), ("other/x", False, False), ("acme", False, False)],
)
def test_use_is_by_pattern_and_management_by_namespace(name: str, used: bool, managed: bool) -> None:
    assert (KEY.may_use(name), KEY.may_manage(name)) == (used, managed)


def test_an_admin_may_do_everything_and_a_key_without_tenant_manages_nothing() -> None:
    admin = Key("root", "ops", (), base=False, admin=True)
    assert admin.may_use("other/x")
    assert admin.may_manage("x")
    assert admin.may_use_base
    assert admin.may_scrape
    assert not Key("k", "").may_manage("/x")


def test_a_key_is_found_by_its_secret_alone() -> None:
    ring = Keyring({hashlib.sha256(b"secret").digest(): KEY})
    assert ring.find("secret") == (hashlib.sha256(b"secret").digest(), KEY)
    for other in ("", "Secret", "secret ", digest_of("secret").hex(), "\udcff", "s" * 10_000):
        assert ring.find(other) is None


def test_the_table_cannot_be_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No digest is a place in the table, two processes have two tables, and the verdict is compare_digest's."""
    digest = digest_of("secret")
    one, other = Keyring({digest: KEY}), Keyring({digest: KEY})
    assert set(one._known) != set(other._known)
    assert not any(digest.startswith(place[:4]) for place in one._known)
    compared: list[tuple[bytes, bytes]] = []
    honest = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return honest(a, b)

    monkeypatch.setattr(tenants.hmac, "compare_digest", compare)
    assert one.find("secret")
    assert not one.find("wrong")
    assert compared == [(digest, digest), (bytes(32), digest_of("wrong"))]
    monkeypatch.setattr(tenants.hmac, "compare_digest", lambda a, b: False)
    assert one.find("secret") is None


def test_owners_keys_may_do_everything_and_share_the_server_by_adapter() -> None:
    ring = owners_keyring(("one", "two"))
    found = ring.find("two")
    assert found is not None
    assert found[1].admin
    assert found[1].tenant == ""
    assert found[1].name == "key-1"


def test_the_caller_is_that_of_the_block() -> None:
    assert current_key() is ANYONE
    who = Caller(KEY, Account(Limits(), lambda: 0.0), Counter())
    with calling(who):
        assert current_caller() is who
        assert current_key() is KEY
    assert current_key() is ANYONE


def test_however_many_parts_work_on_a_request_it_is_open_once() -> None:
    account = Account(Limits(), lambda: 0.0)
    one, other = (Caller(KEY, account, Counter()) for _ in range(2))
    with one.at_work():
        with one.at_work(), other.at_work():
            assert account.num_open == 2
        assert account.num_open == 1
    with one.at_work():  # work in the background, after the answer that named it
        assert account.num_open == 1
    assert account.num_open == 0
