"""The AI SDK of JavaScript, in Node, against the demo base and the example adapters (scenarios.mjs)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PACKAGES = Path(sys.prefix) / "node_modules"
SECONDS = 150.0

Run = Callable[[str], dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, url: str, key: str) -> Run:
    """What a scenario prints."""
    if not PACKAGES.is_dir():
        pytest.skip(f"the packages of {HERE.name}/package.json are not installed: npm had none when that was tried")
    script = tmp_path / "scenarios.mjs"
    script.write_bytes((HERE / script.name).read_bytes())  # modules look for packages beside themselves
    (tmp_path / PACKAGES.name).symlink_to(PACKAGES)

    def done(name: str) -> dict[str, Any]:
        command = [Path(sys.executable).with_name("node"), script, name]
        environ = {"LORAPLEX_URL": url, "LORAPLEX_KEY": key, "AI_SDK_LOG_WARNINGS": "false"}
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environ, check=False)
        assert ended.returncode == 0, ended.stderr[-4000:]
        told: dict[str, Any] = json.loads(ended.stdout)
        return told

    return done


def check_text(told: dict[str, Any]) -> None:
    whole, streamed = told["whole"], told["streamed"]
    assert whole["text"]
    assert whole["answered"] == "pirate"
    assert len(streamed["deltas"]) > 5
    assert "".join(streamed["deltas"]) == whole["text"]
    assert streamed["finish"] == whole["finish"] in ("stop", "length")
    for name in ("inputTokens", "outputTokens", "totalTokens"):
        assert streamed["usage"][name] == whole["usage"][name] > 0


def test_text(run: Run) -> None:
    check_text(run("text"))


def test_both_apis_of_openai(run: Run) -> None:
    told = run("openai")
    check_text(told["chat"])
    check_text(told["responses"])
    assert told["chat"]["whole"]["text"] == told["responses"]["whole"]["text"]


def test_objects(run: Run) -> None:
    """zod has checked them: here it is that they are the same as a stream, which came in pieces."""
    for told in run("object").values():
        assert set(told["object"]) == {"name", "age", "member"}
        assert told["streamed"] == told["object"]
        assert told["partials"] > 2
        assert told["finish"] == "stop"


def test_tools_in_two_steps(run: Run) -> None:
    for told in run("tools").values():
        calling, answering = told["steps"]
        assert told["streamed"] == told["steps"]
        assert calling["finish"] == "tool-calls"
        assert calling["calls"]
        assert calling["calls"] + calling["calls"] == told["calls"]  # each was called, once and in the stream
        assert all(set(call) == {"city", "unit"} for call in calling["calls"])
        assert not answering["calls"]
        assert answering["text"]


def test_embeddings(run: Run) -> None:
    told = run("embeddings")
    assert told["sizes"] == [576, 576]  # the demo's hidden size
    assert told["tokens"] > 2


def test_failures_are_the_sdks_own(run: Run) -> None:
    told = run("failures")
    assert (told["name"]["known"], told["name"]["status"]) == (True, 404)
    assert "nobody" in told["name"]["message"]
    assert (told["key"]["known"], told["key"]["status"]) == (True, 401)


def test_a_stream_that_is_aborted_ends(run: Run) -> None:
    assert run("abort")["kinds"][-1] == "abort"
