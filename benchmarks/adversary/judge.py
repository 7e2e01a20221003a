"""What was seen with an attack beside what was seen without, and which bounds that breaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraplex.benchmarks.adversary.watch import Seen

MOST_GAP = 1.5
"""Times the p99 without the attack, or beside as much plain work."""

MOST_HEALTH = 0.1
"""Seconds."""

COLUMNS = ("attack", "p50, ms", "p99, ms", "/health, ms", "RSS, MiB", "others", "answers to it", "broken")


@dataclass(frozen=True)
class Row:
    """One attack."""

    name: str
    calm: Seen
    attacked: Seen
    memory: int  # bytes of the plan; 0: unknown

    def broken(self) -> Iterator[str]:
        """The bounds that do not hold."""
        if self.attacked.gap(0.99) > MOST_GAP * self.calm.gap(0.99):
            yield "gaps"
        if self.attacked.slowest_health > max(MOST_HEALTH, self.calm.slowest_health):  # or the machine is no better
            yield "/health"
        if self.memory and self.attacked.resident > self.memory:
            yield "memory, ended" if self.attacked.killed else "memory"
        if self.attacked.failed:
            yield f"{len(self.attacked.failed)} failed ({self.attacked.failed[0]})"

    def cells(self) -> tuple[str, ...]:
        """For the table, each figure without the attack and with it."""
        calm, attacked = self.calm, self.attacked
        pairs = (
            *((1e3 * calm.gap(share), 1e3 * attacked.gap(share)) for share in (0.5, 0.99)),
            (1e3 * calm.slowest_health, 1e3 * attacked.slowest_health),
            (calm.resident / (1 << 20), attacked.resident / (1 << 20)),
        )
        shown = [f"{without:.0f} -> {with_it:.0f}" for without, with_it in pairs]
        if not attacked.resident:
            shown[-1] = ""
        answers = ", ".join(f"{count}x {status or 'none'}" for status, count in attacked.answers.most_common())
        return (self.name, *shown, f"{attacked.others:.0%}", answers, "; ".join(self.broken()))


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    cells = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
