"""What trainers ask of a server around their rollouts: it stops where they say, and goes on as if it had not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.tenancy.keys_file import new_key
from tests.support.held_steps import Steps
from tests.support.live_server import LiveServer, live_server
from tests.support.waiting import LIMIT, wait_for

LENGTH = 100


@pytest.fixture
def steps(live: LiveServer) -> Iterator[Steps]:
    """Whatever a test leaves held or paused goes on for the next one."""
    found = Steps(live)
    yield found
    found.free()
    live.parts.engine.resume()


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def begun(live: LiveServer, steps: Steps) -> tuple[str, Iterator[Any]]:
    """A long answer's first text, and the rest of its chunks: the engine is in one of its steps and waits."""
    steps.hold(4)
    fields: dict[str, Any] = {"prompt": "the", "max_tokens": LENGTH, "temperature": 0}
    stream = live.openai().completions.create(model="tiny", stream=True, extra_body={"ignore_eos": True}, **fields)
    chunks = iter(stream)
    return next(chunks).choices[0].text, chunks


def read(chunks: Iterator[Any]) -> tuple[str, str]:
    """All the text that comes, and why it ended."""
    choices = [chunk.choices[0] for chunk in chunks]
    return "".join(choice.text for choice in choices), choices[-1].finish_reason


def pause(live: LiveServer, query: str = "") -> None:
    answer = live.ask("POST", f"/pause{query}")
    assert (answer.status_code, answer.json()) == (200, {"status": "paused"})


def resume(live: LiveServer) -> None:
    assert live.ask("POST", "/resume").json() == {"status": "resumed"}


def is_paused(live: LiveServer) -> bool:
    return bool(live.ask("GET", "/is_paused").json()["is_paused"])


def test_kept_where_it_is(live: LiveServer, steps: Steps, threads: ThreadPoolExecutor) -> None:
    whole = live.text(tokens=LENGTH)
    assert not is_paused(live)
    text, chunks = begun(live, steps)
    paused = threads.submit(pause, live, "?mode=keep&clear_cache=false")
    wait_for(lambda: not live.parts.engine._inbox.empty())  # between two steps it is looked at
    steps.free()
    paused.result(LIMIT)
    assert is_paused(live)
    other = threads.submit(live.text, tokens=20)
    wait_for(lambda: live.ask("GET", "/load").json()["server_load"] == 2)
    pause(live, "?mode=keep")  # again, which changes nothing
    assert not other.done()
    assert live.parts.engine.stats().running == 1
    resume(live)
    rest, reason = read(chunks)
    assert (text + rest, reason) == (whole, "length")
    assert whole.startswith(other.result(LIMIT))
    assert not is_paused(live)


def test_once_what_is_open_has_ended(live: LiveServer, steps: Steps, threads: ThreadPoolExecutor) -> None:
    whole = live.text(tokens=LENGTH)
    text, chunks = begun(live, steps)
    paused = threads.submit(pause, live, "?mode=wait")
    wait_for(lambda: not live.parts.engine._inbox.empty())
    late = threads.submit(live.text, tokens=20)
    steps.free()
    rest, reason = read(chunks)
    assert (text + rest, reason) == (whole, "length")
    paused.result(LIMIT)
    wait_for(lambda: live.ask("GET", "/load").json()["server_load"] == 1)
    assert is_paused(live)
    assert not late.done()
    resume(live)
    assert whole.startswith(late.result(LIMIT))


@pytest.mark.parametrize("path", ["/pause", "/pause?mode=abort", "/pause_generation", "/areal_pause_generation"])
def test_what_is_open_ends_with_what_it_has(
    live: LiveServer, steps: Steps, threads: ThreadPoolExecutor, path: str
) -> None:
    whole = live.text(tokens=LENGTH)
    text, chunks = begun(live, steps)
    paused = threads.submit(live.ask, "POST", path)
    wait_for(lambda: live.parts.engine._inbox.qsize() == 2)
    steps.free()
    rest, reason = read(chunks)
    assert reason == "abort"
    assert whole.startswith(text + rest)
    assert len(text + rest) < len(whole)
    assert paused.result(LIMIT).status_code == 200
    live.ask("POST", "/continue_generation")
    assert live.text(tokens=LENGTH) == whole


def test_nobody_pauses_by_mistake(live: LiveServer) -> None:
    answer = live.ask("POST", "/pause?mode=hard")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "mode")
    assert not is_paused(live)


def test_what_trainers_look_at(live: LiveServer) -> None:
    assert live.ask("GET", "/get_world_size").json() == {"world_size": 1}
    found = live.ask("GET", "/server_info?config_format=json").json()["vllm_config"]
    assert found["model_config"]["dtype"] == "torch.float32"
    assert found["parallel_config"]["data_parallel_size"] == 1
    assert found["lora_config"]["max_loras"] == 256


def test_a_tenant_stops_nobody(base: Path) -> None:
    with live_server(base, keys=[new_key("alice", "acme"), new_key("root", "ops", admin=True)]) as server:
        for path in ("/pause", "/pause?mode=keep", "/resume", "/pause_generation"):
            assert server.ask("POST", path, "alice").status_code == 403
        assert server.ask("POST", "/pause?mode=keep", "root").status_code == 200
        assert server.ask("GET", "/is_paused", "alice").json() == {"is_paused": True}
        assert server.ask("GET", "/is_paused").status_code == 401  # and a paused server stops all the same
