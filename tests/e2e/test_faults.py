"""What goes wrong around a server, done to a whole one over HTTP: it answers, it says why, and others go on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from safetensors.torch import load_file, save_file

from loraplex.server.config_adapters import DownloadConfig
from loraplex.server.config_engine import EngineConfig
from tests.support.command import address, serving
from tests.support.live_server import Api, LiveServer, live_server
from tests.support.version_world import register_all
from tests.support.waiting import LIMIT, wait_for
from tests.support.web_server import Page, WebServer, web_server

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def web() -> Iterator[WebServer]:
    with web_server(secure=False) as server:
        yield server


@pytest.fixture(scope="module")
def live(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    downloads = DownloadConfig(tmp_path_factory.mktemp("downloads"), max_seconds=5.0, allowed_hosts=("127.0.0.1",))
    config = EngineConfig(device="cpu", memory=32 << 20, max_num_seqs=8)
    with live_server(base, "tiny", config, downloads=downloads) as server:
        yield server


def publish(web: WebServer, folder: Path, at: str, **fields: Any) -> str:
    """The adapter in `folder` as pages; `fields` are those of its weights'. Returns its source."""
    for name in FILES:
        page = Page((folder / name).read_bytes(), **(fields if name == FILES[1] else {}))
        web.pages[f"{at}/{name}"] = page
    return web.url(at, host="127.0.0.1")


# ---- sources --------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_while_downloading(
    live: LiveServer, web: WebServer, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish(web, adapters / "one", "/disk")
    write, full = os.write, threading.Event()

    def into_little_room(handle: int, data: Any) -> int:
        if "downloads" in os.readlink(f"/proc/self/fd/{handle}"):
            if full.is_set():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            full.set()
            return write(handle, data[: len(data) // 2])  # as the kernel does with what still fits
        return write(handle, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", into_little_room)
        answer = live.load("disk", source)
        assert full.is_set()
    assert 400 <= answer.status_code < 600
    assert "No space left" in answer.json()["message"]
    assert "disk" not in live.names()
    assert live.complete().status_code == 200
    assert live.load("disk", source).status_code == 200  # there is room again
    assert live.text("disk") != live.text()


def test_a_source_that_hangs(live: LiveServer, web: WebServer, adapters: Path) -> None:
    """Others go on meanwhile, and whoever waits is told in the time that downloads may take."""
    gate = threading.Event()
    source = publish(web, adapters / "two", "/hangs", gate=gate)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(live.load, "hangs", source)
        wait_for(lambda: web.count(f"/hangs/{FILES[1]}") > 0)
        answered = 0
        while not loading.done():
            assert live.complete(tokens=4).status_code == 200
            answered += 1
        assert answered > 3
        answer = loading.result()
    assert answer.status_code >= 400
    assert "--download-timeout" in answer.json()["message"]
    gate.set()
    assert live.load("hangs", source).status_code == 200


def test_a_source_that_vanishes_before_it_was_read(live: LiveServer, adapters: Path, tmp_path: Path) -> None:
    """Registered by its config and header alone; its bytes are wanted only now, and gone."""
    for name in ("here", "gone"):
        shutil.copytree(adapters / "one", tmp_path / name)
    found = register_all(live.parts.adapters, tmp_path)
    assert [version.name for version in found] == ["gone", "here"]
    shutil.rmtree(tmp_path / "gone")
    answer = live.complete("gone")
    assert 400 <= answer.status_code < 500
    assert "gone" in answer.json()["error"]["message"]
    assert live.complete("here").status_code == 200
    assert live.ask("GET", "/health").status_code == 200


def test_a_source_that_vanishes_while_it_is_in_use(live: LiveServer, adapters: Path, tmp_path: Path) -> None:
    """What is on the device is served on, byte for byte."""
    shutil.copytree(adapters / "three", tmp_path / "used")
    assert live.load("used", str(tmp_path / "used")).status_code == 200
    before = live.text("used")
    shutil.rmtree(tmp_path / "used")
    assert live.text("used") == before


def test_an_adapter_whose_values_overflow(live: LiveServer, adapters: Path, tmp_path: Path) -> None:
    """Its weights are numbers, and what they compute is none: no token is made up, and its neighbours answer."""
    shutil.copytree(adapters / "one", tmp_path / "loud")
    weights = tmp_path / "loud" / FILES[1]
    save_file({name: tensor * 1e20 for name, tensor in load_file(weights).items()}, weights)
    assert live.load("loud", str(tmp_path / "loud")).status_code == 200
    alone = live.text()
    with ThreadPoolExecutor(6) as pool:
        asked = ["tiny", "loud"] * 6
        answers = list(pool.map(live.complete, asked))
    good = [answer.json()["choices"][0]["text"] for answer in answers[::2]]
    assert good == [alone] * 6
    for refused in answers[1::2]:
        assert refused.status_code == 400
        assert "'loud' are NaN or infinite" in refused.json()["error"]["message"]
    assert live.complete("loud", stream=True).status_code == 400  # known before the first event
    assert live.ask("GET", "/health").status_code == 200


# ---- clients --------------------------------------------------------------------------------------------------------


def connect(live: LiveServer, body: bytes, *, length: int | None = None, room: int | None = None) -> socket.socket:
    """A raw client that has sent `body` as a completion, and reads nothing; `room`: of its receive buffer."""
    where = urlsplit(live.url)
    client = socket.socket()
    if room is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    client.connect((where.hostname, where.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def test_a_client_that_reads_nothing_stalls_nobody(live: LiveServer) -> None:
    """Its tokens are computed and wait for it, at most max_tokens of them; the engine is free for others."""
    body = b'{"model": "tiny", "prompt": "the", "max_tokens": 400, "ignore_eos": true, "stream": true, "logprobs": 20}'
    deaf = [connect(live, body, room=4096) for _ in range(8)]  # as many as may run at once
    try:
        alone = live.text()
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _: live.text(), range(8))) == {alone}
        wait_for(lambda: live.parts.engine.stats().running == 0)  # nothing is held for those who do not read
    finally:
        for client in deaf:
            client.close()
    assert live.complete().status_code == 200


def test_half_open_connections_hold_nothing(live: LiveServer) -> None:
    peers = [connect(live, b'{"model": "ti', length=200) for _ in range(30)]
    try:
        assert live.complete().status_code == 200
        assert live.parts.engine.stats().running == 0
    finally:
        for peer in peers:
            peer.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux's")
def test_the_kernel_ends_connections_whose_peer_is_gone() -> None:
    """A peer that vanishes without a word cannot be played here; that accepted sockets have the options can be seen."""
    from loraplex.server.http.listening import bind

    with bind("127.0.0.1", 0) as held:
        held.listen()
        with socket.create_connection(held.getsockname()):
            accepted, _ = held.accept()
            with accepted:
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


# ---- the machine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-30 * 86400.0, 30 * 86400.0], ids=["back", "forward"])
def test_the_clock_on_the_wall_jumps(live: LiveServer, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """In the middle of a stream with a deadline: nothing expires, nothing is measured wrong, nothing waits for it."""
    expected = live.text(tokens=200)
    real, real_ns = time.time, time.time_ns
    body = {"model": "tiny", "prompt": "the", "max_tokens": 200, "ignore_eos": True, "temperature": 0, "timeout": LIMIT}
    with httpx.stream("POST", f"{live.url}/v1/completions", json={**body, "stream": True}, timeout=LIMIT) as response:
        lines = response.iter_lines()
        next(lines)
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(jump * 1e9))
        rest = list(lines)
    assert [line for line in rest if line][-1] == "data: [DONE]"
    assert live.text(tokens=200, timeout=LIMIT) == expected
    scraped = live.ask("GET", "/metrics").text
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "time_to_first_token_seconds"):
        [line] = [line for line in scraped.splitlines() if line.startswith(f"vllm:{name}_sum")]
        assert 0 <= float(line.split()[-1]) < 3600


def test_a_step_that_memory_runs_out_in(live: LiveServer) -> None:
    """The youngest of the step is computed again; nobody's answer changes, and the server goes on."""
    alone = live.text(tokens=60)
    worker, failures = live.parts.engine._worker, 0
    prepare = worker.prepare

    def short(step: Any) -> Any:
        nonlocal failures
        if failures < 3 and len(step.rows) > 1:
            failures += 1
            raise MemoryError("cannot allocate")
        return prepare(step)

    worker.prepare = short  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(6) as pool:
            answers = set(pool.map(lambda _: live.text(tokens=60), range(6)))
    finally:
        worker.prepare = prepare  # type: ignore[method-assign]
    assert failures > 0
    assert answers == {alone}
    assert live.ask("GET", "/health").status_code == 200


# ---- kill -9 --------------------------------------------------------------------------------------------------------


def test_killed_during_a_load_and_started_again(base: Path, adapters: Path, web: WebServer, tmp_path: Path) -> None:
    """What was acknowledged is there again, with the same answers; what was half there is not, and can be loaded."""
    arguments = [str(base), "--state-dir", str(tmp_path / "state"), "--download-dir", str(tmp_path / "downloads")]
    arguments += ["--allow-host", "127.0.0.1"]
    distant = publish(web, adapters / "two", "/kept")
    weights = (adapters / "three" / FILES[1]).read_bytes()
    half = publish(web, adapters / "three", "/half", cuts=[len(weights) // 2] * 50)
    with serving(*arguments) as (process, lines):
        server = Api(address(lines))
        assert server.load("local", str(adapters / "one")).status_code == 200
        assert server.load("distant", distant).status_code == 200
        before = {name: server.text(name) for name in ("tiny", "local", "distant")}
        assert len(set(before.values())) == 3
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(server.load, "half", half)
            partial = tmp_path / "downloads" / "partial"
            wait_for(lambda: any(path.stat().st_size for path in partial.glob(f"*/{FILES[1]}")))
            process.kill()
            with pytest.raises(httpx.HTTPError):
                loading.result()
    for name in FILES:
        web.pages[f"/kept/{name}"] = Page(status=503)  # out of reach; its files are here
    web.pages[f"/half/{FILES[1]}"].cuts.clear()
    with serving(*arguments) as (process, lines):
        server = Api(address(lines))
        assert {name: server.text(name) for name in before} == before
        assert server.names() == {"tiny", "local", "distant"}
        assert server.complete("half").status_code == 404
        assert server.load("half", half).status_code == 200
        assert server.text("half") not in before.values()
        assert server.unload("local").status_code == 200
        process.kill()
    with serving(*arguments) as (_, lines):
        server = Api(address(lines))
        assert server.complete("half").status_code == 200
        assert server.names() == {"tiny", "distant", "half"}


PATHS = [
    *("/" + "x" * 300, "x" * 300, "x/" * 2000, "~nosuch/x", "~nosuch", "~\0/x", "~/nowhere", "\ud800", "/\udcff/x"),
    *("/dev/null", "/proc/self/mem", "/proc/self/fd/0", "/proc/self/environ/x", "//", ".", "/./././."),
    *("file://" + "y" * 300, "file://~nosuch", "file:///\ud800", "hf://" + "z" * 300 + "/x", "https://\ud800/x"),
    *("https://" + "h" * 300 + "/x", "https://[::1]:99999/x", "s3://169.254.169.254/x", "gs://127.0.0.1/x"),
    *("s3://0xa9.254.0251.254/x", "hf://169.254.169.254/x", "169.254.169.254/x"),
]


@pytest.mark.parametrize("route", ["/v1/load_lora_adapter", "/load_lora_adapter", "/v1/completions", "/generate"])
def test_paths_that_no_system_takes_are_the_callers_mistake(live: LiveServer, route: str) -> None:
    """On every route that takes one: no answer is a 500, and nothing is asked of anybody far away."""
    statuses = {}
    with httpx.Client(base_url=live.url, timeout=LIMIT) as client:
        for i, path in enumerate(PATHS):
            load = {"lora_name": f"odd-{i}", "lora_path": path}
            for source in ("local", "hub", "s3"):
                named = {"adapter_id": path, "adapter_source": source}
                body = {
                    "/v1/completions": {"model": "tiny", "prompt": "the", "max_tokens": 1, **named},
                    "/generate": {"inputs": "the", "parameters": {"max_new_tokens": 1, **named}},
                }.get(route, load)
                answer = client.post(route, content=json.dumps(body))
                statuses[path, source] = answer.status_code
                assert answer.status_code < 500 or answer.status_code in (503, 504), (path, source, answer.text)
    wrong = {key: status for key, status in statuses.items() if not 400 <= status < 500}
    assert wrong == {}
    assert live.text(tokens=1)
