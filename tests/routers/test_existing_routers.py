"""Two replicas behind a router from PyPI that knows nothing of them: SGLang's, and vLLM's.

Each router has an environment of its own, made by `make test-routers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import free_port, running
from tests.support.replicas import (
    ADAPTERS,
    PROMPT,
    Load,
    Replica,
    ask,
    body_of,
    expected_of,
    make_base,
    replicas,
    spread,
)
from tests.support.waiting import wait_for

ENVIRONMENTS = Path(__file__).parents[2] / ".venv-routers"


@dataclass(frozen=True)
class Kind:
    """How a router is started, and its policy that keeps together what has the same header."""

    command: tuple[str, ...]
    sticky: tuple[str, ...]
    header: str


SGLANG = Kind(
    ("sglang/bin/python", "-m", "sglang_router.launch_router"),
    ("manual", "--assignment-mode", "min_group"),
    "X-SMG-Routing-Key",
)
VLLM = Kind(("vllm/bin/vllm-router",), ("consistent_hash",), "X-Session-ID")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_base(tmp_path_factory.mktemp("models"), ADAPTERS)


@pytest.fixture(scope="module")
def pair(model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Replica, ...]]:
    """Every test leaves both running."""
    with replicas(2, *model, tmp_path_factory.mktemp("logs")) as pair:
        yield pair


@pytest.fixture(scope="module")
def expected(pair: tuple[Replica, ...]) -> dict[str, str]:
    return expected_of(pair[0].url)


@pytest.fixture(params=[SGLANG, VLLM], ids=["sglang", "vllm"])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@contextmanager
def routing(kind: Kind, pair: tuple[Replica, ...], log: Path, *policy: str) -> Iterator[str]:
    """The router's URL, once both replicas are in. It asks them every second whether they are ready.

    Its tries last 3.1 seconds, longer than it takes to know of a dead replica: a hash leads all of them to the same.
    """
    port = free_port()
    program, rest = ENVIRONMENTS / kind.command[0], kind.command[1:]
    if not program.exists():
        pytest.skip(f"no {program}: make test-routers makes it")
    command = [str(program), *rest, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    command += ["--worker-urls", *(replica.url for replica in pair), "--policy", *policy]
    command += ["--worker-startup-check-interval", "1", "--health-check-endpoint", "/ready"]
    command += ["--health-check-interval-secs", "1", "--health-failure-threshold", "1"]
    command += ["--health-success-threshold", "1", "--cb-timeout-duration-secs", "1"]
    command += ["--retry-max-retries", "6", "--retry-initial-backoff-ms", "100", "--retry-backoff-multiplier", "2"]
    url = f"http://127.0.0.1:{port}"
    with running(command, log, f"{url}/readiness"):
        wait_for(lambda: len(workers(url)) == len(pair), "not all replicas are in")
        yield url


def workers(url: str) -> set[str]:
    """Those that the router holds for healthy."""
    found = httpx.get(f"{url}/workers", timeout=30).json()["workers"]
    return {worker["url"] for worker in found if worker["is_healthy"]}


def events_of(answer: httpx.Response) -> Iterator[Any]:
    """What a stream says; the last is "[DONE]", if it is told."""
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def test_the_same_answers_whole_and_streamed(
    kind: Kind, pair: tuple[Replica, ...], expected: dict[str, str], tmp_path: Path
) -> None:
    before = [replica.requests() for replica in pair]
    with routing(kind, pair, tmp_path / "log", "round_robin") as url:
        listed = httpx.get(f"{url}/v1/models", timeout=30)
        assert listed.status_code == 200
        for name, text in expected.items():
            assert ask(url, name, PROMPT) == text
            streamed = {**body_of(name, PROMPT), "stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=streamed, timeout=60) as answer:
                events = list(events_of(answer))
            assert events[-1] == "[DONE]"
            assert "".join(event["choices"][0]["text"] for event in events[:-1]) == text
    after = [replica.requests() for replica in pair]
    assert all(sum(now.values()) > sum(then.values()) for now, then in zip(after, before, strict=True))


def test_what_a_replica_says_of_itself_is_understood(pair: tuple[Replica, ...], tmp_path: Path) -> None:
    """SGLang's asks what a worker serves and what it has to do; where it cannot read that, it says "unknown" and -1."""
    with routing(SGLANG, pair, tmp_path / "log", "round_robin") as url:
        found = httpx.get(f"{url}/workers", timeout=30).json()["workers"]
        assert [worker["model_id"] for worker in found] == ["tiny", "tiny"]
        loads = httpx.get(f"{url}/get_loads", timeout=30).json()["workers"]
        assert [worker["load"] for worker in loads] == [0, 0]


def test_an_adapter_stays_on_its_replica(
    kind: Kind, pair: tuple[Replica, ...], expected: dict[str, str], tmp_path: Path
) -> None:
    before = [replica.requests() for replica in pair]
    with routing(kind, pair, tmp_path / "log", *kind.sticky) as url:
        with Load(url, ADAPTERS, header=kind.header) as load:
            load.wait_more(5 * len(ADAPTERS))
        assert load.lost(expected) == []
    homes = spread(pair, before)
    assert {name: len(homes[name]) for name in ADAPTERS} == dict.fromkeys(ADAPTERS, 1)
    assert len(set().union(*homes.values())) == 2  # and not all on one


def test_nothing_is_lost_when_a_replica_is_killed(
    kind: Kind, pair: tuple[Replica, ...], expected: dict[str, str], tmp_path: Path
) -> None:
    killed = pair[0]
    with routing(kind, pair, tmp_path / "log", *kind.sticky) as url:
        with Load(url, ADAPTERS, header=kind.header) as load:
            load.wait_more(40)
            assert killed.requests()
            killed.kill()
            load.wait_more(80)
            wait_for(lambda: killed.url not in workers(url), "the dead replica is still in")
            killed.start()
            wait_for(lambda: killed.url in workers(url), "the new replica is not taken in")
            wait_for(lambda: bool(killed.requests()), "the new replica gets no requests")
        assert load.lost(expected) == []


def test_nothing_is_lost_when_a_replica_is_told_to_stop(
    kind: Kind, pair: tuple[Replica, ...], expected: dict[str, str], tmp_path: Path
) -> None:
    stopped = pair[1]
    with routing(kind, pair, tmp_path / "log", *kind.sticky) as url:
        with Load(url, ADAPTERS, header=kind.header) as load:
            load.wait_more(40)
            assert stopped.requests()
            assert stopped.terminate() == 0
            load.wait_more(80)
            stopped.start()
            wait_for(lambda: bool(stopped.requests()), "the new replica gets no requests")
        assert load.lost(expected) == []


def test_a_stream_that_has_begun_is_not_begun_again(kind: Kind, pair: tuple[Replica, ...], tmp_path: Path) -> None:
    """What was already said cannot be unsaid: the caller sees it end without [DONE], and asks again itself."""
    body = {**body_of(ADAPTERS[0], PROMPT), "max_tokens": 400, "stream": True}
    with routing(kind, pair, tmp_path / "log", *kind.sticky) as url:
        headers = {kind.header: ADAPTERS[0]}
        events: list[Any] = []
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
                for event in events_of(answer):
                    if not events:
                        [home] = [replica for replica in pair if replica.is_busy()]
                        home.kill()
                    events.append(event)
        except httpx.HTTPError:
            pass
        assert 0 < len(events) < 400
        assert events[-1] != "[DONE]"
        assert ask(url, ADAPTERS[0], PROMPT, headers)
        home.start()
