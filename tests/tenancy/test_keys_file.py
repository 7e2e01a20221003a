"""The keys file: what may be in it, and how changes arrive."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraplex.server.tenancy.access import Access
from loraplex.server.tenancy.keys_file import CHECK_SECONDS, KeysError, KeysFile, add_entry, new_key, parse_keys
from loraplex.server.tenancy.rate_limits import Limits, RateLimited
from loraplex.server.tenancy.tenants import Keyring
from tests.support.clock import Clock

DIGEST = hashlib.sha256(b"secret").hexdigest()


def document(**changes: Any) -> str:
    entry = {"name": "ci", "sha256": DIGEST, "tenant": "acme", **changes}
    return yaml.safe_dump({"keys": [{field: value for field, value in entry.items() if value is not ...}]})


def test_an_entry_in_full_and_one_with_defaults() -> None:
    text = document(
        adapters=["sql", "acme/*"],
        base=False,
        admin=True,
        metrics=True,
        load_on_use=True,
        weight=2.5,
        requests_per_minute=1,
        tokens_per_minute=2,
        max_concurrent=3,
        max_adapters=4,
    )
    ((digest, key),) = parse_keys(text).keys.items()
    assert digest.hex() == DIGEST
    assert (key.name, key.tenant, key.adapters, key.weight) == ("ci", "acme", ("sql", "acme/*"), 2.5)
    assert (key.base, key.admin, key.metrics, key.load_on_use) == (False, True, True, True)
    assert (key.limits, key.max_adapters) == (Limits(1, 2, 3), 4)
    ((_, plain),) = parse_keys(document()).keys.items()
    assert (plain.adapters, plain.weight, plain.limits) == (("acme/*",), 1.0, Limits())
    assert plain.max_adapters is None
    assert (plain.base, plain.admin, plain.metrics, plain.load_on_use) == (True, False, False, False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected a list under 'keys:'"),
        ("[]", "expected a list"),
        ("keys: 3", "expected a list"),
        ("keys: []\nmore: 1", "nothing else"),
        ("keys: [3]", "keys[0]: expected name"),
        ("keys:\n  - {name: a\n  secret-in-broken-yaml", "not YAML at line"),
        ("keys: !!python/object/apply:os.system ['true']", "not YAML"),
        (document(name=...), "keys[0].name"),
        (document(name="a b"), "keys[0].name"),
        (document(tenant=""), "keys[0].tenant"),
        (document(tenant=".."), "keys[0].tenant"),
        (document(tenant="a/b"), "keys[0].tenant"),
        (document(tenant="hub"), "namespace of adapters loaded on first use"),
        (document(tenant=7), "keys[0].tenant: it is missing, or no text"),
        (document(sha256="secret"), "keys[0].sha256"),
        (document(sha256=DIGEST.upper()), "keys[0].sha256"),
        (document(key="secret"), "a field that is not known"),
        (document(secret=1), "a field that is not known"),
        (document(admin="yes"), "keys[0].admin: expected true or false"),
        (document(weight=0), "keys[0].weight"),
        (document(weight=True), "keys[0].weight"),
        (document(weight=float("nan")), "keys[0].weight"),
        (document(adapters="*"), "keys[0].adapters"),
        (document(adapters=["a b"]), "keys[0].adapters"),
        (document(requests_per_minute=0), "keys[0].requests_per_minute"),
        (document(tokens_per_minute=1.5), "keys[0].tokens_per_minute"),
        (document(max_concurrent=True), "keys[0].max_concurrent"),
        (document(max_adapters=0), "keys[0].max_adapters: expected a whole number from 1 on"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_secret_with_it(text: str, told: str) -> None:
    with pytest.raises(KeysError) as found:
        parse_keys(text)
    assert told in str(found.value)
    assert "secret" not in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"name": "b"}, "the same sha256 as 'ci'"),
        ({"sha256": "0" * 64}, "'ci' is there twice"),
        ({"name": "b", "sha256": "0" * 64, "weight": 2}, "tenant 'acme' has weight 1 with another key"),
        ({"name": "b", "sha256": "0" * 64, "max_adapters": 2}, "tenant 'acme' may have any number with another key"),
    ],
)
def test_keys_that_contradict_each_other(second: dict[str, Any], told: str) -> None:
    first = yaml.safe_load(document())["keys"]
    with pytest.raises(KeysError, match=told):
        parse_keys(yaml.safe_dump({"keys": [*first, {**first[0], **second}]}))


def test_an_admins_key_of_a_tenant_needs_no_bound() -> None:
    first = yaml.safe_load(document(max_adapters=2))["keys"]
    others = [{"name": "b", "sha256": "0" * 64, "max_adapters": 2}, {"name": "c", "sha256": "1" * 64, "admin": True}]
    keys = parse_keys(
        yaml.safe_dump({"keys": [*first, *({**first[0], "max_adapters": None} | each for each in others)]})
    )
    assert [key.max_adapters for key in keys.keys.values()] == [2, 2, None]


def test_a_new_key_fits_its_entry_and_its_entry_does_not_hold_it() -> None:
    made = [new_key("ci", "acme", adapters=["*"], admin=True, weight=None) for _ in range(2)]
    assert made[0][0] != made[1][0]
    secret, entry = made[0]
    assert secret.startswith("lpx_")
    assert len(secret) == 4 + 43
    assert secret not in entry
    assert "weight" not in entry
    found = parse_keys("keys:\n" + entry).find(secret)
    assert found is not None
    assert found[1].admin
    assert found[1].adapters == ("*",)
    with pytest.raises(KeysError, match=r"key\.tenant"):
        new_key("ci", "a/b")


def write(path: Path, *names: str, **fields: Any) -> None:
    """Keys called `names`, the secret of each being its name."""
    entries = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "tenant": "t", **fields} for name in names
    ]
    path.write_text(yaml.safe_dump({"keys": entries}))


class Followed:
    """A file with the keys "one" and "two", and a server that follows it."""

    def __init__(self, path: Path) -> None:
        self.path, self.clock = path, Clock()
        self.write("one", "two")
        self.file = KeysFile(path, self.clock)
        self.access = Access(self.file, clock=self.clock)
        self.find = self.access.find

    def write(self, *names: str, **fields: Any) -> None:
        write(self.path, *names, **fields)

    def later(self) -> None:
        self.clock.now += CHECK_SECONDS + 0.01


@pytest.fixture
def followed(tmp_path: Path) -> Followed:
    return Followed(tmp_path / "keys.yaml")


async def test_changes_arrive_within_the_interval(followed: Followed) -> None:
    followed.write("two", "three")
    assert await followed.find(["one"]) is not None  # not looked at yet
    followed.later()
    assert await followed.find(["one"]) is None
    assert await followed.find(["wrong", "three"]) is not None
    assert followed.access.num_refused == 1


async def test_a_wrong_file_changes_nothing_and_is_said_once(
    followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:

    async def states() -> list[tuple[bool, bool]]:
        found = []
        for _ in range(2):
            followed.later()
            found.append((await followed.find(["one"]) is not None, followed.file.is_current))
        return found

    with caplog.at_level(logging.DEBUG):
        followed.path.write_text("keys: [{lpx_pasted-by-mistake: 1}]")
        assert await states() == [(True, False)] * 2
        followed.path.unlink()
        assert await states() == [(True, False)] * 2
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "not known" in errors[0]
    assert "cannot be read" in errors[1]
    assert "lpx_" not in caplog.text
    followed.write("one")
    assert await states() == [(True, True)] * 2
    assert followed.file.num_reloads == 1
    followed.write("two")
    assert await states() == [(False, True)] * 2


async def test_all_who_come_while_it_is_read_wait_for_the_new_keys(followed: Followed) -> None:
    followed.write("two")
    followed.later()
    assert await asyncio.gather(*(followed.find(["one"]) for _ in range(20))) == [None] * 20
    assert followed.file.num_reloads == 1


async def test_keys_that_were_read_for_somebody_who_has_left_count_as_well(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread reads on when the request that asked is cancelled, and nobody reads the same file again."""
    followed.write("two")
    followed.later()
    begun, go_on, reload = threading.Event(), threading.Event(), followed.file._reload

    def wait_and_reload() -> bool:
        begun.set()
        go_on.wait(20)
        return reload()

    monkeypatch.setattr(followed.file, "_reload", wait_and_reload)
    leaving = asyncio.create_task(followed.find(["two"]))
    await asyncio.to_thread(begun.wait, 20)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    go_on.set()
    assert await followed.find(["one"]) is None
    assert followed.access.refuses(["one"])
    assert followed.access.num_keys == 1


async def test_what_a_key_has_used_outlives_a_change(followed: Followed) -> None:
    followed.write("one", requests_per_minute=2)
    followed.later()

    async def admit() -> None:
        caller = await followed.find(["one"])
        assert caller is not None
        caller.admit()

    await admit()
    await admit()
    followed.write("one", "two", requests_per_minute=3)
    followed.later()
    await admit()  # 2 of 3 are used
    with pytest.raises(RateLimited):
        await admit()


def test_a_file_that_cannot_be_used_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with pytest.raises(KeysError, match="cannot be read: No such file"):
        KeysFile(path)
    path.write_bytes(b"keys: [\xff]")
    with pytest.raises(KeysError, match="not UTF-8"):
        KeysFile(path)
    path.write_text("keys: []")
    assert isinstance(KeysFile(path).keyring, Keyring)


def test_who_else_may_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """To the file, or to any folder on the way to it; by links, it is their target that counts."""
    folder, other = tmp_path / "a" / "b", tmp_path / "links"
    folder.mkdir(parents=True)
    other.mkdir()
    path, link = folder / "keys.yaml", other / "keys.yaml"
    path.write_text("keys: []")
    link.symlink_to(path)  # its own mode is 0777
    for mode in (0o600, 0o644, 0o640, 0o444):
        path.chmod(mode)
        KeysFile(link)
    assert caplog.text == ""
    path.chmod(0o664)
    KeysFile(link)
    assert "its group" in caplog.text
    path.chmod(0o646)
    with pytest.raises(KeysError, match="everybody on this machine may write to it"):
        KeysFile(link)
    path.chmod(0o600)
    for open_to_all in (tmp_path / "a", folder, other):
        open_to_all.chmod(0o777)
        with pytest.raises(KeysError, match=f"may write to {open_to_all};"):
            KeysFile(link)
        open_to_all.chmod(0o1777)  # as /tmp: nobody replaces what is another's; so are Kubernetes' secrets mounted
        KeysFile(link)
        open_to_all.chmod(0o755)


def test_what_is_mounted_read_only_may_have_any_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret with defaultMode: 0777, or a folder of another system in a container: nobody writes to it from here."""
    path = tmp_path / "keys.yaml"
    path.write_text("keys: []")
    path.chmod(0o666)
    with pytest.raises(KeysError):
        KeysFile(path)
    mounted = os.statvfs_result([0] * 8 + [os.ST_RDONLY, 255])
    monkeypatch.setattr(os, "fstatvfs", lambda handle: mounted)
    KeysFile(path)


async def test_a_file_that_everybody_may_write_to_from_now_on_changes_nothing(
    followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    followed.write("forged")
    followed.path.chmod(0o666)
    followed.later()
    assert await followed.find(["forged"]) is None
    assert await followed.find(["one"]) is not None
    assert not followed.file.is_current
    assert "may write to it" in caplog.text
    followed.path.chmod(0o600)
    followed.write("two")
    followed.later()
    assert await followed.find(["one"]) is None
    assert followed.file.is_current


async def test_it_is_read_whatever_the_threads_of_all_do(followed: Followed) -> None:
    followed.write("three")
    followed.later()
    go_on = threading.Event()
    busy = [asyncio.create_task(asyncio.to_thread(go_on.wait)) for _ in range(100)]
    await asyncio.sleep(0)
    try:
        async with asyncio.timeout(20):
            assert await followed.find(["three"]) is not None
    finally:
        go_on.set()
        await asyncio.gather(*busy)


def test_an_entry_that_finds_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(document())

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeysError, match="No space left"):
        add_entry(path, new_key("new", "acme")[1])
    assert path.read_text() == document()
    assert [each.name for each in tmp_path.iterdir()] == ["keys.yaml"]


FILES = {
    "none": None,
    "empty list": "keys: []\n",
    "no list": "keys:\n",
    "as yaml writes it": document(),
    "indented, with comments, no newline": f"# ours\nkeys:  # all\n\n  # first\n  - name: ci\n    sha256: {DIGEST}\n"
    "    tenant: acme  # them",
    "in one line": f"keys:\n    - {{name: ci, sha256: {DIGEST}, tenant: acme}}\n",
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_an_entry_is_added_and_the_rest_stays(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys.yaml"
    if text is not None:
        path.write_text(text)
        path.chmod(0o640)
    secrets = []
    for name in ("one", "two"):
        secret, entry = new_key(name, "acme", adapters=["acme/*", "sql"], max_concurrent=3)
        add_entry(path, entry)
        secrets.append(secret)
    ring = KeysFile(path).keyring
    assert [found[1].name for secret in secrets if (found := ring.find(secret))] == ["one", "two"]
    had = text is not None and "ci" in text
    assert len(ring) == 2 + had
    assert not had or path.read_text().startswith((text or "").rstrip("\n"))
    assert path.stat().st_mode & 0o777 == (0o600 if text is None else 0o640)
    assert [each.name for each in tmp_path.iterdir()] == ["keys.yaml"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("keys: [{}]", "by hand"),
        ("{keys: []}", "by hand"),
        (document(name="new"), "there twice"),
        ("x: 1\n", "by hand"),
    ],
)
def test_a_file_that_would_be_wrong_stays_as_it_was(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeysError, match=told):
        add_entry(path, new_key("new", "acme")[1])
    assert path.read_text() == text
    with pytest.raises(KeysError, match="No such file"):
        add_entry(tmp_path / "no/folder", new_key("new", "acme")[1])


def test_a_link_to_the_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_text(document())
    (tmp_path / "link").symlink_to("real")
    add_entry(tmp_path / "link", new_key("new", "acme")[1])
    assert (tmp_path / "link").is_symlink()
    assert len(KeysFile(tmp_path / "real").keyring) == 2
