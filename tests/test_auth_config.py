"""Which servers may start, and the command that makes keys."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from loraplex.server import cli
from loraplex.server.config import AuthConfig, ConfigError, ServeConfig
from loraplex.server.engine.build import EngineConfig
from loraplex.server.greeting import greet
from loraplex.server.keys_file import KeysFile, parse_keys

KEYS = AuthConfig(api_keys=("k",))
FILE = AuthConfig(keys_file=Path("keys.yaml"))
NOBODY = AuthConfig()
OPEN = AuthConfig(no_auth=True)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1"])
@pytest.mark.parametrize("auth", [NOBODY, OPEN, KEYS, FILE])
def test_on_loopback_everything_goes(auth: AuthConfig, address: str) -> None:
    auth.check(address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.7", "8.8.8.8", "fe80::1%eth0"])
def test_elsewhere_it_takes_keys_or_a_word(address: str) -> None:
    for auth in (KEYS, FILE, OPEN):
        auth.check(address)
    with pytest.raises(ConfigError, match=r"--no-auth") as found:
        NOBODY.check(address)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "auth",
    [
        AuthConfig(keys_file=Path("f"), api_keys=("k",)),
        AuthConfig(keys_file=Path("f"), no_auth=True),
        AuthConfig(api_keys=("k",), no_auth=True),
        AuthConfig(api_keys=("k", " ")),
    ],
)
def test_contradictions(auth: AuthConfig) -> None:
    with pytest.raises(ConfigError):
        auth.check("127.0.0.1")


def test_settings_are_shown_without_keys() -> None:
    assert "hidden" not in repr(AuthConfig(api_keys=("hidden",)))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["loraplex", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_keys_new_prints_the_key_and_an_entry_that_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        *("--tenant", "acme", "--adapters", "acme/*", "--adapters", "sql", "--no-base"),
        *("--weight", "2", "--tokens-per-minute", "9", "--max-adapters", "5"),
    ]
    assert run(monkeypatch, "keys", "new", "ci", *options) == 0
    printed = capsys.readouterr().out
    (secret,) = re.findall(r"lpx_\S+", printed)
    found = parse_keys("keys:\n" + printed[printed.index("- name") :]).find(secret)
    assert found is not None
    key = found[1]
    assert (key.name, key.tenant, key.adapters, key.base, key.weight) == ("ci", "acme", ("acme/*", "sql"), False, 2.0)
    assert key.limits.tokens_per_minute == 9
    assert key.limits.max_concurrent is None
    assert key.max_adapters == 5


def test_keys_new_adds_its_entry_to_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    made = []
    for tenant in ("acme", "byte"):
        assert run(monkeypatch, "keys", "new", tenant, "--tenant", tenant, "--to", str(path)) == 0
        made += re.findall(r"lpx_\S+", capsys.readouterr().out)
    ring = KeysFile(path).keyring
    assert [ring.find(secret)[1].tenant for secret in made] == ["acme", "byte"]  # type: ignore[index]
    assert not any(secret in path.read_text() for secret in made)
    assert run(monkeypatch, "keys", "new", "acme", "--tenant", "acme", "--to", str(path)) == cli.MISUSED
    refused = capsys.readouterr()
    assert "there twice" in refused.err
    assert "lpx_" not in refused.out, "no key that no file has"


def test_what_is_there_to_try_has_a_place_for_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    plan = SimpleNamespace(parts=list, shared=True, total_bytes=1, max_model_len=64)
    registry = SimpleNamespace(list=lambda: [SimpleNamespace(name="sql")])
    parts = SimpleNamespace(memory=plan, token_budget=8, adapters=SimpleNamespace(registry=registry))
    for auth in (NOBODY, FILE):
        config = ServeConfig("demo", ("demo",), EngineConfig(), auth=auth)
        greet(config, parts, SimpleNamespace(has_chat_template=True), 8000)  # type: ignore[arg-type]
        lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  curl")]
        assert len(lines) == 3
        wanted = ["Authorization: Bearer $LORAPLEX_API_KEY"] if auth is FILE else []
        assert all([word for word in line if word.startswith("Authorization")] == wanted for line in lines)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("keys", "new", "a b", "--tenant", "t"), "key.name"),
        (("keys", "new", "a"), "--tenant"),
        (("serve", "demo", "--port", "0", "--host", "0.0.0.0"), "--no-auth"),
        (("serve", "demo", "--port", "0", "--api-keys", "/no/such/file"), "cannot be read"),
        (("serve", "demo", "--port", "0", "--api-key", "x", "--no-auth"), "--no-auth: there are keys"),
    ],
)
def test_what_cannot_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    assert run(monkeypatch, *arguments) == cli.MISUSED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in printed.err
    assert printed.err.count("\n") == 1
