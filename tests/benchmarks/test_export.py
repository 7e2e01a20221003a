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

import pytest

from loraplex.benchmarks.arrivals import Arrivals
from loraplex.benchmarks.drive import open_loop
from loraplex.benchmarks.export import for_aiperf, for_guidellm
from loraplex.benchmarks.load import Address
from loraplex.benchmarks.measures import Objective, measure
from loraplex.benchmarks.popularity import LAWS
from loraplex.benchmarks.traces import read_trace
from loraplex.benchmarks.workload import Lengths, Planned, Popularity, Spec, plan
from support.stub_openai import Stub, serving
from support.tiny import make_tiny_tokenizer

AIPERF = os.environ.get("LORAPLEX_AIPERF") or shutil.which("aiperf")
AGREE = 0.05


def workload(requests: int = 40) -> list[Planned]:
    names = [f"ad{number}" for number in range(12)]
    popular = Popularity(LAWS[1], 1.0)
    return plan(Spec(names, popular, Arrivals(10.0), Lengths(4, 40), Lengths(6, 24), seed=3), requests)


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


@pytest.mark.skipif(not AIPERF, reason="no aiperf on the PATH or in LORAPLEX_AIPERF; see the top of this file")
def test_aiperf_measures_what_we_measure(tmp_path: Path) -> None:
    """The same file of requests at the same times, against the same known timings."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    make_tiny_tokenizer(tokenizer)
    planned, path, out = workload(), tmp_path / "workload.jsonl", tmp_path / "out"
    with serving(Stub(first=0.2, gap=0.02)) as stub:
        address = Address.of(stub.url)
        words = [str(AIPERF), *shlex.split(for_aiperf(planned, path, address))[1:]]
        words[words.index("builtin")] = str(tokenizer)
        command = [*words, "--artifact-dir", str(out), "--ui", "none"]
        subprocess.run(command, check=True, capture_output=True, timeout=200, cwd=tmp_path)
        assert [asked["model"] for asked in stub.seen] == [each.request.model for each in planned]
        ours = measure(asyncio.run(open_loop(address, planned)), Objective())
    theirs = json.loads((out / "profile_export_aiperf.json").read_text())
    assert theirs["request_count"]["avg"] == ours.requests == len(planned)
    for key, found in (
        ("time_to_first_token", ours.first),
        ("inter_token_latency", ours.per_token),
        ("request_latency", ours.whole),
    ):
        assert theirs[key]["avg"] == pytest.approx(found.mean * 1e3, rel=AGREE), key
        assert theirs[key]["p50"] == pytest.approx(found.p50 * 1e3, rel=AGREE), key
        assert theirs[key]["p90"] == pytest.approx(found.p90 * 1e3, rel=AGREE), key
    assert theirs["output_token_throughput"]["avg"] == pytest.approx(ours.tokens_per_second, rel=AGREE)
    assert theirs["request_throughput"]["avg"] == pytest.approx(ours.requests_per_second, rel=AGREE)
