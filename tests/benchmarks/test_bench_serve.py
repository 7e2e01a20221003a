"""`loraplex bench serve` against a server whose timings are known: what it reports is what was served."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from loraplex.benchmarks import drive
from loraplex.benchmarks.arrivals import Arrivals
from loraplex.benchmarks.bench_serve import served_models
from loraplex.benchmarks.drive import Run, Sample, closed_loop, open_loop
from loraplex.benchmarks.load import Address, Request, send
from loraplex.benchmarks.measures import Objective, Spread, jain, measure
from loraplex.benchmarks.workload import Lengths, Planned, Spec, plan
from loraplex.server.command.cli import app
from tests.support.answering import HEAD, answering
from tests.support.command import LORAPLEX
from tests.support.stub_openai import Stub, serving
from tests.support.waiting import LIMIT

FIRST, GAP = 0.1, 0.02
CARDS = [{"id": "base", "parent": None}, *({"id": f"ad{n}", "parent": "base"} for n in range(3))]


def bench(url: str, words: str, *more: str) -> tuple[int, str]:
    """`loraplex bench serve` with these words, of which those in `more` may have spaces: exit code and output."""
    command = ["bench", "serve", *(("--base-url", url) if url else ()), *words.split(), *more]
    result = CliRunner().invoke(app, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_figures_are_the_servers(tmp_path: Path) -> None:
    """Lower bounds are exact; upper ones tell seconds from milliseconds on the busiest machine."""
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    with serving(Stub(FIRST, GAP, models=CARDS)) as stub:
        words = "--api-key sesame --rate 40 --requests 60 --output 4:12 --prompt 5:9 --slo-first 5000"
        code, told = bench(f"{stub.url}/v1", words, "--json", str(figures), "--html", str(page))
    assert code == 0, told
    content = json.loads(figures.read_text())
    found, samples = content["figures"], content["samples"]
    assert (found["requests"], found["failed"], len(stub.seen)) == (60, 0, 60)
    assert found["tokens"] == sum(asked["max_tokens"] for asked in stub.seen) == sum(s["tokens"] for s in samples)
    assert found["prompt_tokens"] == sum(len(asked["prompt"]) for asked in stub.seen)
    assert all(len(sample["gaps"]) == sample["tokens"] - 1 for sample in samples)
    assert FIRST <= found["first"]["p50"] < 100 * FIRST
    assert all(s["ended"] - s["due"] >= FIRST + GAP * (s["tokens"] - 1) for s in samples)
    rest = [(s["ended"] - s["due"] - s["first"]) / (s["tokens"] - 1) for s in samples]
    assert found["per_token"]["p50"] == pytest.approx(np.median(rest))
    assert found["per_token"]["p50"] < 100 * GAP
    assert all(s["first"] >= FIRST and s["due"] <= s["sent"] <= s["ended"] for s in samples)
    assert found["whole"]["mean"] == pytest.approx(np.mean([s["ended"] - s["due"] for s in samples]))
    assert found["attained"] == 1
    assert {asked["model"] for asked in stub.seen} == {"ad0", "ad1", "ad2"}
    assert {asked["_headers"]["authorization"] for asked in stub.seen} == {"Bearer sesame"}
    assert "sesame" not in figures.read_text() + page.read_text() + told
    assert "60 requests" in told


def test_the_page_needs_nothing_from_anywhere(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with serving(Stub(0.0, 0.0, models=[{"id": "<b>&"}, {"id": "ad1"}])) as stub:
        bench(stub.url, "--streams 2 --requests 8 --output 3", "--html", str(page))
    text = page.read_text()
    assert not re.search(r"(src=|href=|url\(|@import|<script)", text)
    assert "&lt;b&gt;&amp;" in text
    assert "<b>&" not in text
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) == 6
    for plot in plots:
        ElementTree.fromstring(plot)
        assert "nan" not in plot


def test_words_for_chats_and_chunks() -> None:
    with serving(Stub(0.01, 0.0, models=CARDS, chunked=True)) as stub:
        code, told = bench(stub.url, "--chat --streams 2 --requests 6 --output 5 --models ad{} --adapters 2")
    assert code == 0, told
    assert {asked["_path"] for asked in stub.seen} == {"/v1/chat/completions"}
    assert all(len(asked["messages"][0]["content"].split()) == 96 for asked in stub.seen)
    assert {asked["model"] for asked in stub.seen} <= {"ad0", "ad1"}


def test_a_proxy_that_refuses_http_1_0() -> None:
    with serving(Stub(0.01, 0.0, models=CARDS, chunked=True, modern=True)) as stub:
        code, told = bench(stub.url, "--rate 50 --requests 6 --output 5")
    assert code == 0, told
    assert len(stub.seen) == 6


@pytest.mark.parametrize("ends", [False, True])
def test_a_server_that_knows_openais_fields_alone(ends: bool) -> None:
    """With --eos nothing is sent that OpenAI's reference does not have."""
    with serving(Stub(0.0, 0.0, models=CARDS)) as stub:
        bench(stub.url, "--streams 1 --requests 2" + " --eos" * ends)
    for asked in stub.seen:
        sent = {name for name in asked if not name.startswith("_")}
        theirs = {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
        assert sent == (theirs if ends else {*theirs, "ignore_eos"})


async def test_a_chats_role_is_no_token() -> None:
    with serving(Stub(0.05, 0.0)) as stub:
        reply = await send(Address.of(stub.url), Request("m", "hello", 3, chat=True))
    assert reply.ok
    assert len(reply.arrivals) == reply.tokens == 3
    assert reply.first >= 0.05
    assert reply.finishes == ["length"]


async def test_times_count_from_when_a_request_was_due() -> None:
    """A server of one place, and four requests due at once: each waits for those before it, and all of it is counted.

    A client that waited before it sent would tell 4 times the same; that is what a closed loop of one stream tells.
    """
    planned = [Planned(0.0, Request("m", [1], 1), 1) for _ in range(4)]
    with serving(Stub(0.1, 0.0, at_once=1)) as stub:
        address = Address.of(stub.url)
        opened = await open_loop(address, planned)
        closed = await closed_loop(address, planned, streams=1)
    waits = sorted(sample.first for sample in opened.samples)
    assert all(wait >= (n + 1) * 0.1 for n, wait in enumerate(waits))
    assert sum(sample.first for sample in closed.samples) <= closed.seconds  # these do not overlap
    for before, after in pairwise(closed.samples):
        assert before.ended <= after.due <= after.sent
    assert closed.seconds >= 0.4


async def test_a_late_client_says_so_and_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is held up for 0.3 s and more while three requests fall due: none of them is sent before its end."""
    loop = asyncio.get_running_loop()
    planned = [Planned(at, Request("m", [1], 1), 1) for at in (0.0, 0.1, 0.15, 0.2)]
    asked: list[float] = []  # the first is the run's start
    ends: list[float] = []  # of the hold-up

    def perf_counter() -> float:
        asked.append(time.perf_counter())
        return asked[-1]

    def hold_up() -> None:
        time.sleep(max(0.3, asked[0] + 0.35 - time.perf_counter()))
        ends.append(time.perf_counter() - asked[0])

    monkeypatch.setattr(drive, "time", SimpleNamespace(perf_counter=perf_counter))
    with serving(Stub(0.01, 0.0)) as stub:
        loop.call_later(0.05, hold_up)
        run = await open_loop(Address.of(stub.url), planned)
    assert [sample.due for sample in run.samples] == pytest.approx([0.0, 0.1, 0.15, 0.2])
    assert all(sample.lag >= ends[0] - sample.due for sample in run.samples[1:])
    assert all(sample.lag == pytest.approx(sample.sent - sample.due) for sample in run.samples)
    assert all(sample.first >= sample.lag + 0.01 for sample in run.samples)


def test_what_fails_is_counted_and_never_left_out(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    with serving(Stub(0.0, 0.0, models=CARDS, fail=["ad1"])) as stub:
        words = "--streams 3 --requests 60 --output 2 --slo-whole 10000"
        code, told = bench(stub.url, words, "--json", str(figures))
    found = json.loads(figures.read_text())["figures"]
    failed = sum(asked["model"] == "ad1" for asked in stub.seen)
    assert code == 1
    assert found["failed"] == failed > 0
    assert found["attained"] == pytest.approx(1 - failed / 60)
    assert "out of luck" in told
    assert found["fair_service"] == pytest.approx(2 / 3)  # one of three adapters got nothing
    gone = Address.of(stub.url)
    run = asyncio.run(open_loop(gone, [Planned(0.0, Request("m", [1], 1), 1)]))
    assert not run.samples[0].ok
    assert "Refused" in run.samples[0].error


@pytest.mark.parametrize("words", ["--rate 50", "--streams 4"])
def test_nothing_answered_is_reported_as_that(tmp_path: Path, words: str) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    with serving(Stub(models=CARDS, fail=["ad0", "ad1", "ad2"])) as stub:
        code, told = bench(stub.url, f"{words} --requests 9", "--json", str(figures), "--html", str(page))
    found = json.loads(figures.read_text())["figures"]
    assert code == 1
    assert (found["failed"], found["tokens_per_second"], found["attained"], found["goodput"]) == (9, 0, 0, 0)
    assert found["first"]["count"] == 0
    assert "9 x 500 answer" in told
    assert "out of luck" in page.read_text()
    for plot in re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL):
        ElementTree.fromstring(plot)
        assert "nan" not in plot


def test_a_server_that_dies_midway_fails_what_comes_after(tmp_path: Path) -> None:
    """Those under way are broken off, later ones find nobody; all are counted."""
    figures = tmp_path / "figures.json"
    with serving(Stub(0.05, 0.05, models=CARDS, dies_after=10)) as stub:
        code, _ = bench(stub.url, "--rate 30 --requests 40 --output 4", "--json", str(figures))
    found = json.loads(figures.read_text())
    assert code == 1
    assert found["figures"]["requests"] == 40
    alive = [sample for sample in found["samples"] if not sample["error"]]
    assert 0 < len(alive) < 40
    assert 40 - len(alive) == found["figures"]["failed"]
    assert len(alive) == found["figures"]["first"]["count"]
    assert sum(found["figures"]["errors"].values()) == 40 - len(alive)


@pytest.mark.parametrize("words", [["--rate", "20"], ["--streams", "5"]])
def test_control_c_ends_with_a_report(tmp_path: Path, words: list[str]) -> None:
    """Every answer but the first takes a minute: those under way fail, those to come are not counted."""
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    with serving(Stub(0.0, 60.0)) as stub:
        command = [*LORAPLEX, "bench", "serve", *words]
        command += ["--base-url", stub.url, "--requests", "1000", "--output", "1:2", "--json", figures, "--html", page]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while len(stub.seen) < 5 and run.poll() is None:
            time.sleep(0.01)
        time.sleep(0.3)
        run.send_signal(signal.SIGINT)
        told, _ = run.communicate(timeout=LIMIT)
    assert run.returncode == 130, told
    found = json.loads(figures.read_text())
    errors = [sample["error"] for sample in found["samples"]]
    assert 5 <= len(stub.seen) <= len(errors) <= len(stub.seen) + 1 < 1000  # one may have been on its way
    assert set(errors) <= {"", "stopped while under way"}
    assert 0 < found["figures"]["failed"] == len(errors) - errors.count("")
    assert "Stopped: after" in told
    assert "Stopped: after" in page.read_text()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\n\r\n[1, 2]",
        b'HTTP/1.1 200 OK\r\n\r\n{"data": [{"name": "x"}]}',
        b'HTTP/1.1 200 OK\r\n\r\n{"data": null}',
        b"HTTP/1.1 404 Not Found\r\n\r\nnothing here",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n{}",
    ],
)
async def test_what_is_no_openai_server(answer: bytes) -> None:
    """Neither the list of models nor a completion takes such an answer for one, nor falls over it."""

    async with answering(answer) as address:
        with pytest.raises(ValueError, match=f"127.0.0.1:{address.port}/v1/models"):
            await served_models(address)
        sent = await send(address, Request("m", [1], 1))
    assert not sent.ok
    assert sent.error


@pytest.mark.parametrize(
    "event", [b"[]", b"3", b'{"choices": [null]}', b'{"usage": {"prompt_tokens": 1}}', b'{"choices": 7}', b"{"]
)
async def test_events_that_are_none_of_a_completions(event: bytes) -> None:
    async with answering(HEAD + b"data: " + event + b"\n\ndata: [DONE]\n\n") as address:
        sent = await send(address, Request("m", [1], 1))
    assert not sent.ok
    assert sent.error


async def test_events_as_the_standard_lets_them_be() -> None:
    """No space after the colon, lines that end in CR LF, comments and names of events between."""
    events = b': hello\r\n\r\nevent: x\r\ndata:{"choices": [{"text": "a"}]}\r\n\r\ndata:[DONE]\r\n\r\n'

    async with answering(HEAD + events) as address:
        sent = await send(address, Request("m", [1], 1))
    assert sent.ok
    assert len(sent.arrivals) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--base-url http://127.0.0.1:1 --rate 1 --requests 3", "nothing answers at http://127.0.0.1:1/"),
        ("--base-url http://127.0.0.1:99999 --rate 1 --requests 3", "99999"),
        ("--base-url gopher://x --rate 1 --requests 3", "no base URL"),
        ("--rate nan --requests 3", "a rate of nan"),
        ("--rate inf --seconds 3", "a rate of inf"),
        ("--rate 1 --requests 3 --cv 1e-200", "a coefficient of variation of 1e-200"),
        ("--rate 1 --requests 3 --popularity zipf --alpha nan", "Zipf's exponent is nan"),
        ("--rate 9 --requests 3 --warmup 60", "and the warm-up is longer"),
        ("--streams 0 --requests 3", "0 streams"),
        ("--rate 1 --requests 3 --json nowhere/at/all.json", "cannot be written"),
        ("--rate 1 --requests 3 --html .", "cannot be written"),
        ("--rate 1 --streams 2", "--rate is an open loop"),
        ("--requests 3", "give --rate"),
        ("--rate 1", "a number of requests is needed"),
        ("--streams 1 --seconds 3", "needs --requests"),
        ("--rate -1 --requests 3", "a rate of -1"),
        ("--streams 1 --requests 3 --prompt 9:3", "lengths from 9 to 3"),
        ("--streams 1 --requests 3 --adapters 9", "9 models are wanted, and there are 3"),
        ("--streams 1 --requests 3 --models x{}", "needs --adapters"),
        ("--streams 1 --requests 3 --export wrk=x", "expected aiperf=FILE or guidellm=FILE"),
        ("--rate 1 --trace nowhere.csv", "nowhere.csv"),
    ],
)
def test_options_that_cannot_be_run(words: str, told: str) -> None:
    with serving(Stub(models=CARDS)) as stub:
        code, output = bench("" if "--base-url" in words else stub.url, words)
    assert code == 2
    assert told in output
    assert stub.seen == []


# ---- arithmetic -----------------------------------------------------------------------------------------------------

TIMES = st.floats(0.001, 100)


@given(st.lists(TIMES, min_size=1, max_size=60))
def test_spreads_are_numpys(values: list[float]) -> None:
    found = Spread.of(iter(values))
    assert [found.p50, found.p90, found.p95, found.p99] == pytest.approx(list(np.percentile(values, [50, 90, 95, 99])))
    assert (found.count, found.most, found.mean) == (len(values), max(values), pytest.approx(np.mean(values)))


@given(st.lists(TIMES, min_size=1, max_size=30), st.floats(0.1, 10))
def test_jains_index(values: list[float], scale: float) -> None:
    index = jain(values)
    assert 1 / len(values) - 1e-9 <= index <= 1 + 1e-9
    assert index == pytest.approx(jain(value * scale for value in values))
    variation = np.std(values) / np.mean(values)
    assert index == pytest.approx(1 / (1 + variation**2))  # the index in other words


def test_jains_index_of_the_extremes() -> None:
    assert jain([5.0] * 7) == pytest.approx(1)
    assert jain([0.0, 3.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([]) == jain([0.0, 0.0]) == 1


def sample(**changed: Any) -> Sample:
    given: dict[str, Any] = {
        **{"model": "a", "due": 1.0, "sent": 1.01, "ended": 2.1, "first": 0.1, "gaps": (0.5, 0.5), "tokens": 3},
        **{"asked": 3, "prompt_tokens": 4, "error": ""},
    }
    return Sample(**{**given, **changed})


def test_objectives_and_goodput() -> None:
    samples = [
        sample(due=0.0, ended=9.0, first=9.0),  # warm-up
        sample(),
        sample(model="b", first=0.3),
        sample(model="b", error="500 answer"),
        sample(due=2.0, ended=5.0, first=0.1, tokens=7, asked=7),
    ]
    found = measure(Run(samples, 9.0), Objective(first=0.2, per_token=0.6), warmup=0.5)
    assert (found.requests, found.failed, found.seconds) == (4, 1, 4.0)
    assert found.attained == 0.5
    assert found.goodput == 0.5
    assert found.requests_per_second == 0.75
    assert found.tokens_per_second == 13 / 4
    assert found.per_token.most == pytest.approx(0.5)
    by_model = {each.model: each for each in found.adapters}
    assert by_model["a"].speed == pytest.approx(10 / (1.1 + 3.0))
    assert by_model["b"].speed == pytest.approx(3 / (1.1 + 1.1))
    assert by_model["b"].attained == 0
    assert found.fair_service == pytest.approx((1 + 0.5) ** 2 / (2 * (1 + 0.25)))
    with pytest.raises(ValueError, match="no request was due after"):
        measure(Run(samples, 9.0), Objective(), warmup=50)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:81", Address("h", 81)),
        ("https://h/v1/", Address("h", 443, "", True)),
        ("127.0.0.1:9", Address("127.0.0.1", 9)),
        ("https://h:8/team/v1", Address("h", 8, "/team", True)),
        ("http://[::1]:8000/v1", Address("::1", 8000)),
    ],
)
def test_base_urls(url: str, expected: Address) -> None:
    assert Address.of(url) == expected


@pytest.mark.parametrize("url", ["", "ftp://h", "http://"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="no base URL"):
        Address.of(url)


def test_ten_thousand_adapters_are_drawn_at_once() -> None:
    names = [f"ad{n}" for n in range(10_000)]
    planned = plan(Spec(names, arrivals=Arrivals(100), prompt=Lengths(1, 1), output=Lengths(1, 1)), 20_000)
    asked = {each.request.model for each in planned}
    assert len(asked) == pytest.approx(10_000 * (1 - np.exp(-2)), rel=0.02)
