"""Which servers may start, and the command that makes keys."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from loraplex.server.command import cli
from loraplex.server.command.greeting import greet
from loraplex.server.command.keys import with_file_keys
from loraplex.server.command.option_groups import grouped
from loraplex.server.config import ServeConfig
from loraplex.server.config_access import AuthConfig
from loraplex.server.options import ConfigError
from loraplex.server.startup import StartError
from loraplex.server.tenancy.keys_file import KeysFile, parse_keys

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
        config = ServeConfig("demo", auth=auth)
        greet(config, parts, SimpleNamespace(has_chat_template=True), 8000)  # type: ignore[arg-type]
        lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  curl")]
        assert len(lines) == 3
        wanted = ["Authorization: Bearer $LORAPLEX_API_KEY"] if auth is FILE else []
        assert all([word for word in line if word.startswith("Authorization")] == wanted for line in lines)


def test_what_cannot_be_printed_keeps_no_server_from_starting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = SimpleNamespace(parts=list, shared=True, total_bytes=1, max_model_len=64)
    registry = SimpleNamespace(list=list)
    parts = SimpleNamespace(memory=plan, token_budget=8, adapters=SimpleNamespace(registry=registry))
    config = ServeConfig("demo")
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        greet(config, parts, SimpleNamespace(has_chat_template=True), 8000)  # type: ignore[arg-type]
    assert "No space left" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("keys", "new", "a b", "--tenant", "t"), "key.name"),
        (("keys", "new", "a"), "--tenant"),
        (("serve", "demo", "--port", "0", "--host", "0.0.0.0"), "--no-auth"),
        (("serve", "demo", "--port", "0", "--api-keys", "/no/such/file"), "cannot be read"),
        (("serve", "demo", "--port", "0", "--api-key", "x", "--no-auth"), "--no-auth: there are keys"),
        (("serve", "demo", "--port", "0", "--api-key-file", "/no/such/file"), "cannot be read"),
        (("serve", "demo", "--port", "0", "--api-key-file", "/dev/null"), "/dev/null: "),
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


def key_options(*arguments: str, environ: dict[str, str] | None = None) -> AuthConfig:
    """What these options of `loraplex serve` say about keys."""
    command = typer.Typer()
    found = []

    @command.command()
    @grouped
    def serve(keys: AuthConfig) -> None:
        found.append(with_file_keys(keys))

    result = CliRunner().invoke(command, list(arguments), env=environ, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found[0]


def test_where_an_owners_key_may_come_from(tmp_path: Path) -> None:
    """Beside the command line, where others see it."""
    file = tmp_path / "key"
    file.write_text("one\n\n  two \r\n")
    assert key_options("--api-key-file", str(file)).api_keys == ("one", "two")
    assert key_options("--api-key-file", str(file), "--api-key", "three").api_keys == ("three", "one", "two")
    for name in ("LORAPLEX_API_KEY", "VLLM_API_KEY"):
        assert key_options(environ={name: "given"}).api_keys == ("given",)
    assert "two" not in repr(key_options("--api-key-file", str(file)))


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [("", 0o600, "it is empty"), ("\xff", 0o600, "not UTF-8"), ("k", 0o602, "may write to it")],
)
def test_a_key_file_that_cannot_be_used(tmp_path: Path, text: str, mode: int, told: str) -> None:
    file = tmp_path / "key"
    file.write_bytes(text.encode("latin-1"))
    file.chmod(mode)
    with pytest.raises(StartError, match=told):
        key_options("--api-key-file", str(file))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where the arguments lie")
def test_keys_are_not_to_be_seen_among_the_arguments() -> None:
    script = """
import sys
from pathlib import Path
from loraplex.server.startup import hide_arguments
hide_arguments(["", "s3cret", "-x"])
print(Path("/proc/self/cmdline").read_text().split("\\0")[3:], sys.argv[1:])
"""
    given = ["--api-key", "s3cret", "--api-key=s3cret", "s3cret-too", "as3cret", "-xy"]
    said = subprocess.run([sys.executable, "-c", script, *given], capture_output=True, text=True, check=True).stdout
    hidden = ["--api-key", "******", "--api-key=******", *given[3:], ""]
    assert said == f"{hidden} {given}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where the arguments lie")
@pytest.mark.parametrize("command", [["serve", "/no/base"], ["bench", "serve"]])
def test_the_commands_hide_theirs(command: list[str]) -> None:
    """They end at once; what the kernel shows of them is read in the last moment."""
    script = """
import atexit, sys
from pathlib import Path
atexit.register(lambda: print(Path("/proc/self/cmdline").read_text()))
from loraplex.server.command.cli import main
main()
"""
    arguments = [*command, "--api-key", "s3cret", *(("--base-url", "http://127.0.0.1:9") if "bench" in command else ())]
    said = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert "--api-key" in said.stdout
    assert "s3cret" not in said.stdout + said.stderr
