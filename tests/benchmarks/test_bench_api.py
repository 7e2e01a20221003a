"""The benchmark of masks and HTTP for a moment, with a tiny base: do both sides do the same work?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from loraplex.benchmarks.api import __main__ as command
from loraplex.benchmarks.api.__main__ import Load, Run, held_to, http_kinds, in_turns, mask_kinds, prompts
from loraplex.benchmarks.api.host import Host, serve_host
from loraplex.benchmarks.many.figures import Report
from loraplex.benchmarks.many.served import NotStarted

SHORT = Load(streams=3, requests=6, tokens=10)


@pytest.fixture(scope="module")
def host(tiny_base: Path) -> Iterator[Host]:
    with serve_host(str(tiny_base), rows=4) as started:
        assert started.model == "tiny"
        yield started
    assert started.process.returncode == 0


def test_all_kinds_of_a_load_are_of_the_same_tokens(host: Host) -> None:
    for kinds in (mask_kinds(host, SHORT), http_kinds(host, SHORT)):
        for name, runs in in_turns(kinds, rounds=2).items():
            assert [run.tokens for run in runs] == [60, 60]
            assert all(run.seconds > 0 for run in runs)
            assert all((run.client == 0) == (name == "alone") for run in runs)


def test_no_answer_of_the_length_fits_a_schema() -> None:
    schema = held_to(3, tokens=10)
    shortest = {"name_3": "", "age": 0, "kind": None, "marks": []}
    jsonschema.Draft202012Validator(schema).validate([shortest] * 10)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate([shortest] * 9)
    assert len(json.dumps([shortest] * 9)) > 10 * 16  # characters, more than ten tokens have
    assert schema != held_to(4, tokens=10)


def test_prompts_are_all_others() -> None:
    found = [prompt for seed in range(3) for what in "ab" for prompt in prompts(5, seed, what)]
    assert len(set(found)) == 30
    assert {len(prompt.split()) for prompt in found} == {command.PROMPT_WORDS + 1}
    assert prompts(5, 0, "a") == prompts(5, 0, "a")


def test_the_client_is_allowed_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    over, alone = Run(10.0, 850, client=2.0, server=7.0), Run(10.0, 1000, client=0.0, server=6.0)
    assert (over.rate, over.allowed) == (85.0, pytest.approx(850 / 9))
    report = Report()
    command.judge(report, "over", [over] * 3, [alone] * 3, 0.9)
    assert report.missed == []
    command.judge(report, "over", [over] * 3, [alone] * 3, 0.95)
    assert len(report.missed) == 1
    assert "0.850" in capsys.readouterr().out


def test_a_base_that_is_none_is_told() -> None:
    with pytest.raises(NotStarted, match="nowhere"), serve_host("/nowhere", rows=1):
        pass
