"""`loraplex adapters eval` against a whole server: scores, what is demanded, drift from the version in place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.server.command import cli
from loraplex.server.command.divergence import LIKELIEST, divergence_at, mean_divergence
from loraplex.server.command.golden import SCORES, read_score
from loraplex.server.command.remote import Remote, RemoteError
from loraplex.server.proof.golden import read_golden
from tests.support.served import Served, serve_new
from tests.support.tiny import EOS

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    adapters = {name: {"r": 4, "target_modules": ["q_proj", "o_proj"]} for name in ("new", "old")}
    with serve_new(tmp_path_factory.mktemp("served"), adapters) as made:
        yield made


@pytest.fixture
def golden(served: Served, tmp_path: Path) -> Path:
    """Two questions that "new" passes, one that nobody does, and a conversation."""
    path = tmp_path / "golden.jsonl"
    lines = [
        {"prompt": prompt, "exact": served.live.text("new", 6, prompt=prompt), "max_tokens": 6}
        for prompt in ("the", "fox")
    ]
    lines += [{"prompt": "the", "exact": "never", "max_tokens": 2}]
    lines += [{"messages": [{"role": "user", "content": "the dog"}], "regex": "(?s).*", "max_tokens": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(served: Served, adapter: str, golden: Path, *more: str) -> int:
    given = ["adapters", "eval", adapter, "--golden", str(golden), "--url", served.live.url, *more]
    try:
        return int(cli.app(given, standalone_mode=False) or 0)
    except SystemExit as ended:
        return int(ended.code or 0)


def test_a_run_is_scored_reported_and_recorded(served: Served, golden: Path, tmp_path: Path) -> None:
    report, page = tmp_path / "report.json", tmp_path / "report.html"
    assert run(served, "new", golden, "--json", str(report), "--html", str(page)) == 0
    told = json.loads(report.read_text())
    assert (told["score"], [answer["passed"] for answer in told["answers"]]) == (0.75, [True, True, False, True])
    digest = served.live.ask("GET", "/v1/adapters/new").json()["digest"]
    assert told["digest"] == digest
    assert read_score(golden, digest, told["golden"]) == 0.75
    assert read_score(golden, digest, "another set") is None
    assert "<h1>new: 0.7500</h1>" in page.read_text()


def test_what_is_demanded_decides_the_exit_code(
    served: Served, golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(served, "new", golden, "--fail-under", "0.75") == 0
    assert run(served, "new", golden, "--fail-under", "0.76") == 1
    assert "0.7500; at least 0.76" in capsys.readouterr().err
    assert run(served, "new", golden, "--in-place", "old", "--drift", "0.02") == 0
    assert run(served, "old", golden, "--in-place", "new", "--drift", "0.02") == 1
    assert "0.02 below at most" in capsys.readouterr().err
    assert len(json.loads(golden.with_name(SCORES).read_text())) == 2


def test_the_recorded_score_of_the_version_in_place_counts(served: Served, golden: Path) -> None:
    assert run(served, "old", golden) == 0
    scores = golden.with_name(SCORES)
    known = json.loads(scores.read_text())
    scores.write_text(json.dumps({key: {**value, "score": 0.9} for key, value in known.items()}))
    assert run(served, "new", golden, "--in-place", "old", "--drift", "0.1") == 1
    assert run(served, "new", golden, "--in-place", "old", "--drift", "0.2") == 0


def test_a_server_that_records_no_score_is_told_of(
    served: Served, golden: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Remote.ask

    def forbid(remote: Remote, method: str, path: str, body: Any = None) -> Any:
        if "/scores/" in path:
            raise RemoteError("this key may not manage the adapter", 403)
        return ask(remote, method, path, body)

    monkeypatch.setattr(Remote, "ask", forbid)
    assert run(served, "new", golden) == 0
    assert "the score of 'new' is not recorded" in capsys.readouterr().err


ORDERS = (("new", "old"), ("old", "new"))


def test_a_promotion_waits_for_what_was_scored(
    served: Served, golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def promote() -> int:
        given = ["adapters", "promote", "front", "--url", served.live.url]
        try:
            return int(cli.app(given, standalone_mode=False) or 0)
        except SystemExit as ended:
            return int(ended.code or 0)

    targets, swapped = ([{"adapter": a, "weight": 9}, {"adapter": b, "weight": 1}] for a, b in ORDERS)
    served.live.ask("PUT", "/v1/aliases/front", json={"targets": targets, "requires": "eval >= previous"})
    golden.write_text(golden.read_text() + json.dumps({"prompt": "a", "regex": "(?s).*", "max_tokens": 1}) + "\n")
    assert promote() == 1  # a set that nobody was asked
    assert run(served, "old", golden, "--in-place", "new") == 0  # asks both; new passes more
    capsys.readouterr()
    assert promote() == 1
    assert "scored less" in capsys.readouterr().err
    served.live.ask("PUT", "/v1/aliases/front", json={"targets": swapped, "requires": "eval >= previous"})
    assert promote() == 0
    assert capsys.readouterr().out.strip() == "front (revision 3): split new 1, requires eval >= previous"


def test_misuse(served: Served, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(served, "nobody", golden) == 2
    assert run(served, "new", golden, "--drift", "0.1") == 2
    assert run(served, "new", tmp_path / "none.jsonl") == 2
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x", "exact": "y"}\n{"prompt": "x"}\n')
    assert run(served, "new", bad) == 2
    assert "bad.jsonl, line 2: " in capsys.readouterr().err
    away = ["adapters", "eval", "new", "--golden", str(golden), "--url", "http://127.0.0.1:9"]
    with pytest.raises(SystemExit) as ended:
        cli.app(away, standalone_mode=False)
    assert ended.value.code == 2


def test_without_a_server_one_is_started(served: Served, golden: Path, tmp_path: Path) -> None:
    base = str(served.live.parts.proof.plain._checkpoint.folder)
    report = tmp_path / "report.json"
    given = ["adapters", "eval", str(served.folders["new"]), "--golden", str(golden), "--base", base]
    assert cli.app([*given, "--json", str(report), "--fail-under", "0.5"], standalone_mode=False) == 0
    assert json.loads(report.read_text())["digest"] == served.live.ask("GET", "/v1/adapters/new").json()["digest"]
    (tmp_path / "empty").mkdir()
    given[2] = str(tmp_path / "empty")
    with pytest.raises(SystemExit) as ended:
        cli.app(given, standalone_mode=False)
    assert ended.value.code == 2


def merged(p: torch.Tensor, q: torch.Tensor) -> float:
    """The KL of one place, [vocab] log-probabilities each, with all but the tokens that are likely in both as one."""
    both = sorted(set(p.topk(LIKELIEST).indices.tolist()) & set(q.topk(LIKELIEST).indices.tolist()))
    one, other = (torch.cat([x[both].exp(), 1 - x[both].exp().sum(0, keepdim=True)]) for x in (p, q))
    return float(torch.nn.functional.kl_div(other.log(), one, reduction="sum"))


def test_divergence_is_that_of_the_models(served: Served, golden: Path) -> None:
    """transformers' and PEFT's: over prompts, and over what the version in place answers, each after all before it."""
    questions = [*read_golden(golden), *read_golden(golden)[:1]]
    questions[-1] = replace(questions[0], max_tokens=30)  # an answer that is longer than its prompt
    found = mean_divergence(Remote(served.live.url), "old", "new", questions)
    prompts: list[tuple[float, float]] = []  # KL as it is measured, and as it is
    answers: list[tuple[float, float]] = []
    for question in questions:
        ids = served.live.tokenizer.encode(question.prompt or "")
        if question.messages:
            ids = served.live.tokenizer.chat(list(question.messages))
        said = served.greedy("old", ids, question.max_tokens)
        said = said[: said.index(EOS) + 1] if EOS in said else said
        p, q = (served.logprobs(name, ids + said[:-1]).double() for name in ("old", "new"))
        exact = (p.exp() * (p - q)).sum(-1).tolist()
        nats = [(merged(*each), exact[place]) for place, each in enumerate(zip(p, q, strict=True))]
        prompts, answers = prompts + nats[: len(ids) - 1], answers + nats[len(ids) - 1 :]
    for told, places in ((found.prompts, prompts), (found.answers, answers)):
        measured, whole = (sum(each) / len(places) for each in zip(*places, strict=True))
        assert told == pytest.approx(measured, rel=1e-3)
        assert 0 < told <= whole * 1.0001
    assert found.answers != pytest.approx(found.prompts, rel=0.01)
    same = mean_divergence(Remote(served.live.url), "new", "new", questions)
    assert max(same.prompts, same.answers) < 1e-9


def test_divergence_of_one_place() -> None:
    half = {"a": math.log(0.5), "b": math.log(0.25)}
    assert divergence_at(half, half) == 0
    other = {"a": math.log(0.25), "b": math.log(0.5)}
    assert divergence_at(half, other) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
