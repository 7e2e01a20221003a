"""What a run of the peers found: for a file, and as README's table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from loraplex.benchmarks.peers.peer import Figures

OURS = "loraplex"


@dataclass(frozen=True)
class Row:
    """A load, and by name what was measured: ours first, a round after the other."""

    load: str
    rounds: Mapping[str, Sequence[Figures]]

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> Row:
        """What as_json made."""
        rounds = content["rounds"]
        assert isinstance(rounds, Mapping)
        return cls(str(content["load"]), {name: [Figures(**run) for run in runs] for name, runs in rounds.items()})

    def rate(self, name: str) -> float:
        """Tokens per second, the median."""
        return statistics.median(run.tokens_per_second for run in self.rounds[name])

    def ratio(self, name: str) -> float:
        """Of ours to theirs: the median of the rounds' ratios, so that what slows a whole round cancels."""
        pairs = zip(self.rounds[OURS], self.rounds[name], strict=True)
        return statistics.median(mine.tokens_per_second / theirs.tokens_per_second for mine, theirs in pairs)

    def first(self, name: str) -> float | None:
        """Seconds to the first token: the median of the rounds' medians."""
        found = [run.first for run in self.rounds[name] if run.first is not None]
        return statistics.median(found) if found else None


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown's lines: tokens per second, first token, and in brackets the ratio of ours to theirs."""
    names = [OURS, *dict.fromkeys(name for row in rows for name in row.rounds if name != OURS)]
    lines = [f"| load | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    return lines + [f"| {row.load} | {' | '.join(_cell(row, name) for name in names)} |" for row in rows]


def _cell(row: Row, name: str) -> str:
    if name not in row.rounds:
        return "-"
    first = row.first(name)
    shown = f"{row.rate(name):.0f}" + ("" if first is None else f", {1e3 * first:.0f} ms")
    return shown if name == OURS else f"{shown} ({row.ratio(name):.2f})"
