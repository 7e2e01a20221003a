"""`loraplex adapters eval`: a golden set asked of a server, scored, and held against the version in place."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from loraplex.server.command.divergence import AT_ONCE, mean_divergence
from loraplex.server.command.remote import Remote, RemoteError
from loraplex.server.proof.golden import GoldenQuestion
from loraplex.server.proof.golden_report import Answered, GoldenReport
from loraplex.server.whole_file import replace_file

SCORES = "golden.scores.json"
"""Beside a golden set: the score of each version that was asked, by digest and set."""


@dataclass(frozen=True)
class Demands:
    """What a run has to come to."""

    fail_under: float | None = None  # least score
    drift: float | None = None  # most that the score may be below that of the version in place

    def unmet(self, report: GoldenReport) -> list[str]:
        """Say which are not met."""
        found = []
        if self.fail_under is not None and report.score < self.fail_under:
            found.append(f"the score is {report.score:.4f}; at least {self.fail_under:g} was asked for")
        if self.drift is not None and report.previous is not None and report.score < report.previous - self.drift:
            found.append(
                f"the score is {report.score:.4f} and that of the version in place {report.previous:.4f}; it may be "
                f"{self.drift:g} below at most"
            )
        return found


def run_golden(
    remote: Remote,
    adapter: str,
    questions: Sequence[GoldenQuestion],
    golden: Path,
    in_place: str | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> GoldenReport:
    """Ask all questions of `adapter`, and compare with `in_place`, another name on the same server, if there is one.

    The score of the version in place is the one recorded beside the golden set, or else it is asked as well. What was
    asked is recorded on the server, too; where that refuses, `warn` is told. Raises RemoteError where the server is not
    there or does not know a name; single questions may fail.
    """

    def record(name: str, version: str | None, score: float) -> None:
        record_score(golden, version, set_digest, score)
        try:
            post_score(remote, name, version, set_digest, score)
        except RemoteError as error:
            warn(f"the score of {name!r} is not recorded on {remote.url}: {error}")

    set_digest = hashlib.sha256(golden.read_bytes()).hexdigest()
    digest = _read(remote, adapter)
    answers = ask_all(remote, adapter, questions)
    previous = divergence = None
    if in_place is not None:
        placed = _read(remote, in_place)
        previous = read_score(golden, placed, set_digest)
        if previous is None:
            previous = _mean([each.score for each in ask_all(remote, in_place, questions)])
            record(in_place, placed, previous)
        divergence = mean_divergence(remote, in_place, adapter, questions)
    nats = (None, None) if divergence is None else (divergence.prompts, divergence.answers)
    report = GoldenReport(adapter, digest, set_digest, time.time(), tuple(answers), previous, *nats)
    record(adapter, digest, report.score)
    return report


def ask_all(remote: Remote, model: str, questions: Sequence[GoldenQuestion]) -> list[Answered]:
    """Ask each question, greedily, and score its answer."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(partial(_ask, remote, model), questions))


def read_score(golden: Path, digest: str | None, set_digest: str) -> float | None:
    """Read the recorded score of a version; None: it was not asked yet, or the set was another one."""
    found = _scores(golden).get(f"{digest}/{set_digest}", {}).get("score")
    return float(found) if isinstance(found, int | float) and digest else None


def record_score(golden: Path, digest: str | None, set_digest: str, score: float) -> None:
    """Record the score of a version beside the golden set; one without a digest is left out. Raises OSError."""
    if digest is None:
        return
    known = _scores(golden)
    known[f"{digest}/{set_digest}"] = {"score": score, "when": time.time()}
    replace_file(golden.with_name(SCORES), json.dumps(known, indent=2, sort_keys=True), 0o644)


def post_score(remote: Remote, adapter: str, digest: str | None, set_digest: str, score: float) -> None:
    """Record the score of a version on the server, for promotions that demand it; not of what has no name or digest.

    Raises RemoteError.
    """
    name = adapter.partition("@")[0]
    if name and digest is not None:
        body = {"score": score, "version": digest}
        remote.ask("PUT", f"/v1/adapters/{quote(name)}/scores/{set_digest}", body)


def _scores(golden: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(golden.with_name(SCORES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}


def _read(remote: Remote, name: str) -> str | None:
    """The digest of what a name stands for, which is read in full for it; None of the base, or of an alias."""
    try:
        found = remote.adapter(name, wait=1.0)
    except RemoteError as error:
        if error.status == 404:
            remote.ask("GET", f"/v1/models/{name}")  # raises where there is no such name at all
            return None
        raise
    return found["digest"] if isinstance(found.get("digest"), str) else None


def _ask(remote: Remote, model: str, question: GoldenQuestion) -> Answered:
    body: dict[str, Any] = {"model": model, "max_tokens": question.max_tokens, "temperature": 0}
    expected, error, answer, score = question.expected, None, "", 0.0
    asked = question.prompt or "\n".join(f"{each['role']}: {each['content']}" for each in question.messages)
    try:
        if question.prompt is not None:
            found = remote.ask("POST", "/v1/completions", {**body, "prompt": question.prompt})
            answer = str(found["choices"][0]["text"])
        else:
            found = remote.ask("POST", "/v1/chat/completions", {**body, "messages": list(question.messages)})
            answer = str(found["choices"][0]["message"]["content"] or "")
        score = expected.score(answer)
    except (RemoteError, KeyError, IndexError, TypeError) as failure:
        error = str(failure) or type(failure).__name__
    passed = error is None and score >= expected.at_least
    return Answered(question.id, question.line, asked, expected.kind, expected.told, answer, score, passed, error)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
