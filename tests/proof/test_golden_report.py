"""Reports: the score, and a page that is self-contained whatever answers hold."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

from loraplex.server.proof.golden_report import Answered, GoldenReport

EVIL = "</td><script>alert(1)</script>{x}"
GOOD = Answered("1", 1, "2 + 2 =", "exact", "4", "4", 1.0, True)
BAD = Answered("evil", 2, EVIL, "contains", EVIL, EVIL, 0.0, False)
GONE = replace(BAD, id="gone", line=3, asked="?", expected="5", answer="", error="the queue is full")
REPORT = GoldenReport("team/sql", "ab" * 32, "cd" * 32, 1.7e9, (GOOD, BAD, GONE), 0.5, 0.25, 0.125)


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def test_json() -> None:
    told = json.loads(REPORT.as_json())
    assert (told["score"], told["passed"], told["failed"]) == (1 / 3, 1, 2)
    assert [answer["answer"] for answer in told["answers"]] == ["4", EVIL, ""]
    assert (told["previous"], told["digest"]) == (0.5, "ab" * 32)
    assert (told["prompt_divergence"], told["answer_divergence"]) == (0.25, 0.125)


def test_the_page_shows_failures_first_and_runs_nothing() -> None:
    page = REPORT.as_html()
    cells = _Cells()
    cells.feed(page)
    assert "script" not in cells.tags
    assert not re.search(r"""(?:src|href)=""", page)
    rows = [cells.cells[i : i + 4] for i in range(0, len(cells.cells), 4)]
    assert [row[0].split(" ")[0] for row in rows] == ["evil", "gone", "1"]
    assert rows[0][1:3] == [f"contains\n{EVIL}", EVIL]
    assert "the queue is full" in rows[1][2]
    assert "0.3333" in page


def test_a_page_without_failures() -> None:
    page = replace(REPORT, answers=(GOOD,), previous=None, prompt_divergence=None, answer_divergence=None).as_html()
    assert "<p>None.</p>" in page
    assert "not measured" in page
