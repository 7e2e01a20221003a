"""deploy/ray on a small Ray of its own: two replicas, their adapters kept apart, and either of them killed.

Ray has an environment of its own, made by `make test-routers`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.processes import answers, free_port, running
from tests.support.replicas import (
    ADAPTERS,
    PROMPT,
    SLOWED,
    Load,
    ask,
    body_of,
    expected_of,
    make_base,
    requests_of,
)
from tests.support.waiting import LIMIT, wait_for

RAY = Path(__file__).parents[2] / ".venv-routers" / "ray" / "bin"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_base(tmp_path_factory.mktemp("models"), ADAPTERS)


@pytest.fixture(scope="module")
def url(model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the application."""
    if not (RAY / "ray").exists():
        pytest.skip("no .venv-routers/ray: make test-routers makes it")
    base, adapters = model
    command = [sys.executable, "-c", SLOWED, "serve", str(base), "--served-model-name", "tiny", "--device", "cpu"]
    command += ["--adapter-dir", str(adapters), "--memory", "512M", "--batch-invariant"]
    logs, port = tmp_path_factory.mktemp("logs"), free_port()
    driver = [str(RAY / "python"), str(Path(__file__).with_name("serve_local.py")), str(port), shlex.join(command)]
    with ray_head(logs) as environ, running(driver, logs / "serve", f"http://127.0.0.1:{port}/health", environ):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def ray_head(logs: Path) -> Iterator[Mapping[str, str]]:
    """A Ray of one node; what its drivers need in their environment.

    Its agents are given ports: else its node waits 15 seconds for them to find some, too few on a loaded machine.
    """
    port = free_port()
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: there are sockets in it
    command = [str(RAY / "ray"), "start", "--head", "--block", "--temp-dir", folder]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(port)]
    command += ["--num-cpus", "4", "--object-store-memory", str(80 << 20), "--include-dashboard=false"]
    for agent in ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent"):
        command += [f"--{agent}-port", str(free_port())]
    command += ["--metrics-export-port", str(free_port())]
    environ = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",  # what listens, listens on loopback; else a token is left in the home folder
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S": "30",  # not 1: a loaded machine is slower than that
    }
    with (logs / "ray").open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environ)
    try:
        wait_for(lambda: b"Ray runtime started" in (logs / "ray").read_bytes(), "Ray does not start")
        yield {**environ, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        process.terminate()  # its own children are ended by it
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def expected(url: str) -> dict[str, str]:
    """What a server answers without Ray."""
    return expected_of(servers(url)[0])


def servers(url: str) -> list[str]:
    """Of the replicas that live."""
    answer = httpx.get(f"{url}/replicas", timeout=60)
    return [f"http://{target}" for target in answer.json()[0]["targets"]] if answer.status_code == 200 else []


def processes(adapters: Path) -> list[int]:
    """The servers', by an argument that only they have."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if b"--batch-invariant" in arguments and str(adapters).encode() in arguments:
            found.append(int(folder.name))
    return sorted(found)


def parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))


def is_listening(pid: int, port: int) -> bool:
    """Whether this process listens on that port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    found = {row[9] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    links = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    return any(f"socket:[{inode}]" in links for inode in found)


def homes_of(url: str, before: Mapping[str, Mapping[str, int]]) -> dict[str, Counter[str]]:
    """Requests of each adapter by the server that answered them, since the servers told `before`."""
    found: dict[str, Counter[str]] = {name: Counter() for name in ADAPTERS}
    for server in servers(url):
        for name, number in requests_of(server).items():
            if name in found:
                found[name][server] = number - before[server].get(name, 0)
    return found


def test_the_same_answers_whole_and_streamed(url: str, expected: dict[str, str]) -> None:
    before = {server: requests_of(server) for server in servers(url)}
    assert len(before) == 2
    for name, text in expected.items():
        assert ask(url, name, PROMPT) == text
        streamed = {**body_of(name, PROMPT), "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=streamed, timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert len(lines) > 2, "it was not streamed"
    homes = homes_of(url, before)
    assert [sum(counts.values()) for counts in homes.values()] == [2] * len(ADAPTERS)
    assert (
        httpx.post(f"{url}/v1/completions", json={"model": "nobody", "prompt": "x"}, timeout=LIMIT).status_code == 404
    )


def test_adapters_are_spread_and_stay(url: str, expected: dict[str, str]) -> None:
    for name in ADAPTERS:  # one after the other: no adapter's first requests go to both at once
        ask(url, name, PROMPT)
    before = {server: requests_of(server) for server in servers(url)}
    with Load(url, ADAPTERS) as load:
        load.wait_more(5 * len(ADAPTERS))
    assert load.lost(expected) == []
    homes = homes_of(url, before)
    total, at_home = (sum(f(c.values()) for c in homes.values()) for f in (sum, max))
    assert at_home >= 0.9 * total  # Ray sends elsewhere what waits for its replica for too long
    residents = Counter(max(counts, key=lambda server: counts[server]) for counts in homes.values())
    assert len(residents) == 2
    assert min(residents.values()) >= len(ADAPTERS) // 4


@pytest.mark.parametrize(
    ("whole", "number"),
    [(False, signal.SIGKILL), (False, signal.SIGTERM), (True, signal.SIGKILL)],
    ids=["server", "server told to stop", "replica"],
)
def test_nothing_is_lost_when_one_ends(
    url: str, model: tuple[Path, Path], expected: dict[str, str], whole: bool, number: signal.Signals
) -> None:
    """The server alone, with which the replica ends; and the replica, with which the server ends."""
    old = processes(model[1])
    assert len(old) == 2
    with Load(url, ADAPTERS) as load:
        load.wait_more(40)
        os.kill(parent_of(old[0]) if whole else old[0], number)
        load.wait_more(80)
        wait_for(lambda: old[0] not in processes(model[1]), "the replica's server lives on")
        wait_for(lambda: len(servers(url)) == len(processes(model[1])) == 2, "Ray does not replace the replica")
        load.wait_more(40)
    assert load.lost(expected) == []
    assert old[1] in processes(model[1])


def test_adapters_are_loaded_into_all_replicas(url: str, model: tuple[Path, Path], expected: dict[str, str]) -> None:
    source = str(model[1] / ADAPTERS[3])
    body = {"lora_name": "late", "lora_path": source}
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60).status_code == 200
    assert [ask(server, "late", PROMPT) for server in servers(url)] == [expected[ADAPTERS[3]]] * 2
    refused = httpx.post(f"{url}/v1/load_lora_adapter", json={**body, "lora_path": "/nowhere"}, timeout=60)
    assert refused.status_code >= 400
    assert httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "late"}, timeout=60).status_code == 200
    assert not any(answers(f"{server}/v1/models/late") for server in servers(url))


def test_a_stream_that_has_begun_is_not_begun_again(url: str, model: tuple[Path, Path]) -> None:
    """What was already said cannot be unsaid: the caller sees it end without [DONE], and asks again itself."""
    body = {**body_of(ADAPTERS[0], PROMPT), "max_tokens": 400, "stream": True}
    lines: list[str] = []
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for line in filter(None, answer.iter_lines()):
                if not lines:
                    [home] = [s for s in servers(url) if httpx.get(f"{s}/load", timeout=LIMIT).json()["server_load"]]
                    [pid] = [p for p in processes(model[1]) if is_listening(p, httpx.URL(home).port or 0)]
                    os.kill(pid, signal.SIGKILL)
                lines.append(line)
    except httpx.HTTPError:
        pass
    assert 0 < len(lines) < 400
    assert lines[-1] != "data: [DONE]"
    assert ask(url, ADAPTERS[0], PROMPT)
