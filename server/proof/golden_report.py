"""What a golden set came to: for programs as JSON, for people as one HTML page with the failures side by side."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Answered:
    """One question and its answer."""

    id: str
    line: int
    asked: str
    kind: str  # Expectation.kind
    expected: str
    answer: str
    score: float
    passed: bool
    error: str | None = None  # there is no answer, and why


@dataclass(frozen=True)
class GoldenReport:
    """All of one run."""

    adapter: str  # as it was asked for
    digest: str | None  # of the version that was asked
    golden: str  # sha256 of the file
    when: float  # seconds since 1970
    answers: tuple[Answered, ...]
    previous: float | None = None  # score of the version in place
    prompt_divergence: float | None = None  # mean KL of the version in place from this one, in nats a token
    answer_divergence: float | None = None

    @property
    def score(self) -> float:
        """Return the mean of all scores."""
        return sum(each.score for each in self.answers) / len(self.answers)

    @property
    def failures(self) -> tuple[Answered, ...]:
        """List what did not pass, in the file's order."""
        return tuple(each for each in self.answers if not each.passed)

    def as_json(self) -> str:
        """Write all of it."""
        told: dict[str, Any] = {"score": self.score, "passed": len(self.answers) - len(self.failures)}
        return json.dumps({**told, "failed": len(self.failures), **asdict(self)}, indent=2, ensure_ascii=False)

    def as_html(self) -> str:
        """Write a page that needs nothing else: what failed first, then all."""
        facts = {
            "score": f"{self.score:.4f}",
            "passed": f"{len(self.answers) - len(self.failures)} of {len(self.answers)}",
            "version": self.digest or "not known",
            "golden set": self.golden,
            "version in place": "not known" if self.previous is None else f"{self.previous:.4f}",
            "mean KL from it, prompts": _nats(self.prompt_divergence),
            "mean KL from it, answers": _nats(self.answer_divergence),
        }
        rows = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
        passed = [each for each in self.answers if each.passed]
        return _PAGE.format(
            title=html.escape(f"{self.adapter}: {self.score:.4f}"),
            facts=rows,
            failed=_table(self.failures) if self.failures else "<p>None.</p>",
            passed=_table(passed) if passed else "<p>None.</p>",
        )


def _nats(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6f}"


def _table(answers: Sequence[Answered]) -> str:
    head = "<tr><th>question</th><th>expected</th><th>answer</th><th>score</th></tr>"
    return f"<table>{head}{''.join(map(_row, answers))}</table>"


def _row(answered: Answered) -> str:
    answer = answered.answer if answered.error is None else f"no answer: {answered.error}"
    cells = (
        f"{answered.id} (line {answered.line})\n{answered.asked}",
        f"{answered.kind}\n{answered.expected}",
        answer,
        f"{answered.score:.3f}",
    )
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100%; table-layout: fixed }}
th, td {{ border-bottom: 1px solid #8884; padding: .5rem; text-align: left; vertical-align: top }}
td {{ white-space: pre-wrap; overflow-wrap: anywhere }}
th:last-child, td:last-child {{ width: 5rem }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem }}
dd {{ margin: 0; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
<dl>{facts}</dl>
<h2>Failed</h2>
{failed}
<h2>Passed</h2>
{passed}
</html>
"""
