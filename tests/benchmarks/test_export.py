"""Workloads for other load generators: the files say what ours does, and aiperf measures what we do.

The last test runs aiperf where there is one: on the PATH, or named by LORAPLEX_AIPERF. `make test-aiperf` brings one,
in an environment of its own, since it pins what we do not (1.2 GB).
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from loraplex.benchmarks.arrivals import Arrivals
from loraplex.benchmarks.drive import open_loop
from loraplex.benchmarks.export import for_aiperf, for_guidellm
from loraplex.benchmarks.load import Address
from loraplex.benchmarks.measures import Objective, measure
from loraplex.benchmarks.popularity import Law
from loraplex.benchmarks.traces import read_trace
from loraplex.benchmarks.workload import Lengths, Planned, Popularity, Spec, plan
from tests.support.stub_openai import Stub, serving
from tests.support.tiny import make_tiny_tokenizer

AIPERF = os.environ.get("LORAPLEX_AIPERF") or shutil.which("aiperf")
AGREE = 0.05


FIRST, GAP = 4.0, 0.4
"""Seconds that the stub takes at least. On a busy machine a process is late by up to a tenth of a second; 5 % of these
are 0.2 s for a first token, and 0.14 s over the gaps of the shortest answer."""


def workload(requests: int = 40) -> list[Planned]:
    names = [f"ad{number}" for number in range(12)]
    popular = Popularity(Law.zipf, 1.0)
    return plan(Spec(names, popular, Arrivals(10.0), Lengths(4, 40), Lengths(8, 20), seed=3), requests)


def test_aiperfs_file_holds_the_requests_themselves(tmp_path: Path) -> None:
    planned, path = workload(), tmp_path / "workload.jsonl"
    words = shlex.split(for_aiperf(planned, path, Address.of("https://h/team/v1")))
    assert words[:2] == ["aiperf", "profile"]
    assert words[words.index("--url") + 1] == "https://h:443/team"
    assert words[words.index("--input-file") + 1] == str(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["payload"] for line in lines] == [json.loads(each.request.body()) for each in planned]
    assert [line["timestamp"] for line in lines] == pytest.approx([each.at * 1000 for each in planned])


def test_guidellms_file_holds_times_and_lengths(tmp_path: Path) -> None:
    planned, path = workload(), tmp_path / "workload.jsonl"
    words = shlex.split(for_guidellm(planned, path, Address.of("http://h:1")))
    assert words[words.index("--data") + 1] == f"kind=trace_synthetic,path={path}"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["timestamp"] for line in lines] == [each.at for each in planned]
    assert [line["input_length"] for line in lines] == [len(each.request.prompt) for each in planned]
    assert [line["output_length"] for line in lines] == [each.request.max_tokens for each in planned]
    # the columns are Mooncake's, in seconds: read as milliseconds, they are the trace a thousand times as fast
    assert [row.at * 1000 for row in read_trace(path)] == pytest.approx([each.at - planned[0].at for each in planned])


def known(stub: Stub) -> dict[str, list[float]]:
    """By aiperf's names, what the stub says of each request, seconds; and of all, a second."""
    times = [asked["_times"] for asked in stub.seen]  # when it came, and when each token was sent
    seconds = max(each[-1] for each in times) - min(each[0] for each in times)
    return {
        "time_to_first_token": [each[1] - each[0] for each in times],
        "inter_token_latency": [(each[-1] - each[1]) / (len(each) - 2) for each in times],
        "request_latency": [each[-1] - each[0] for each in times],
        "request_throughput": [len(times) / seconds],
        "output_token_throughput": [sum(len(each) - 1 for each in times) / seconds],
    }


@pytest.mark.skipif(not AIPERF, reason="no aiperf on the PATH or in LORAPLEX_AIPERF; see the top of this file")
@pytest.mark.timeout(600)
def test_aiperf_measures_what_we_measure(tmp_path: Path) -> None:
    """The same file of requests at the same times, against servers with the same timings.

    How far either is from what its server did is compared: that is late too where the machine is busy.
    """
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    make_tiny_tokenizer(tokenizer)
    planned, path, out = workload(), tmp_path / "workload.jsonl", tmp_path / "out"
    with serving(Stub(FIRST, GAP)) as stub:
        words = [str(AIPERF), *shlex.split(for_aiperf(planned, path, Address.of(stub.url)))[1:]]
        words[words.index("builtin")] = str(tokenizer)
        command = [*words, "--artifact-dir", str(out), "--ui", "none"]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        subprocess.run(command, check=True, capture_output=True, timeout=500, cwd=tmp_path, env=offline)
    bodies = [{name: value for name, value in asked.items() if not name.startswith("_")} for asked in stub.seen]
    # sorted: two that are due within a millisecond may overtake each other
    assert sorted(map(json.dumps, bodies)) == sorted(json.dumps(each.request.content()) for each in planned)
    with serving(Stub(FIRST, GAP)) as mine:
        ours = measure(asyncio.run(open_loop(Address.of(mine.url), planned)), Objective())
    theirs = json.loads((out / "profile_export_aiperf.json").read_text())
    assert theirs["request_count"]["avg"] == ours.requests == len(planned)
    spreads = {
        "time_to_first_token": ours.first,
        "inter_token_latency": ours.per_token,
        "request_latency": ours.whole,
    }
    for key, spread in spreads.items():
        for name, found, of in (
            ("avg", spread.mean, np.mean),
            ("p50", spread.p50, np.median),
            ("p90", spread.p90, lambda values: np.percentile(values, 90)),
        ):
            ratio, their_ratio = found / of(known(mine)[key]), theirs[key][name] / 1e3 / of(known(stub)[key])
            assert ratio == pytest.approx(1, rel=AGREE), f"{key}, {name}"
            assert their_ratio == pytest.approx(ratio, rel=AGREE), f"{key}, {name}"
    for key, found in (
        ("request_throughput", ours.requests_per_second),
        ("output_token_throughput", ours.tokens_per_second),
    ):
        ratio, their_ratio = found / known(mine)[key][0], theirs[key]["avg"] / known(stub)[key][0]
        assert ratio == pytest.approx(1, rel=AGREE), key
        assert their_ratio == pytest.approx(ratio, rel=AGREE), key
