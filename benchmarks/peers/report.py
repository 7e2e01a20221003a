"""What a run of the peers found: for a file, as README's tables, and against what the project means to reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from loraplex.benchmarks.peers import mistral_rs
from loraplex.benchmarks.peers.openvino_ir import WEIGHT_FORMATS
from loraplex.benchmarks.peers.peer import Figures
from loraplex.benchmarks.readme_loads import CONTEXTS, LOADS

OURS = "loraplex"

QUANTIZED = {f"{OURS} {kind}": kind for kind in ("native", "int8", "int4", "nf4")}
"""Our own server again, by its name here, and the word of --quantize that it was started with."""

SAME_BYTES = (
    (f"{OURS} native", "llama.cpp Q4_1", 1.2, 2.5),
    (f"{OURS} int8", "OpenVINO int8", None, 1.3),
    (f"{OURS} int4", "OpenVINO int4", None, 1.3),
)
"""Ours and the peer in the same format, and the ratios of tokens per second wanted at 1 and at 16 streams."""

WITHOUT_HTTP = (*WEIGHT_FORMATS, mistral_rs.NAME, "PEFT")
"""Peers that are asked in their own process."""

Of = Callable[[Figures], float | None]


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

    def median(self, name: str, of: Of) -> float | None:
        """Over the rounds; None of what does not have it."""
        found = [value for run in self.rounds[name] if (value := of(run)) is not None]
        return statistics.median(found) if found else None

    def ratio(self, name: str, of: Of, ours: str = OURS) -> float | None:
        """Of ours to theirs: the median of the rounds' ratios, so that what slows a whole round cancels."""
        return _ratio(self.rounds.get(ours, ()), self.rounds.get(name, ()), of)


def speed(run: Figures) -> float | None:
    return run.tokens_per_second


def first(run: Figures) -> float | None:
    return run.first


def decode(run: Figures) -> float | None:
    return run.decode


def _ratio(ours: Sequence[Figures], theirs: Sequence[Figures], of: Of) -> float | None:
    found = [a / b for mine, other in zip(ours, theirs, strict=False) if (a := of(mine)) and (b := of(other))]
    return statistics.median(found) if found else None


@dataclass(frozen=True)
class Target:
    """A ratio that the project means to reach."""

    text: str
    wanted: float
    found: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted

    def __str__(self) -> str:
        bound = "at most" if self.at_most else "at least"
        return f"{self.text}: {self.found:.2f}, {bound} {self.wanted:g}: {'met' if self.met else 'missed'}"


def targets(rows: Sequence[Row]) -> list[Target]:
    """Those that `rows` can tell of. OpenVINO's are told for each form of its weights."""
    by_load = {row.load: row for row in rows}
    one, many, _, mixed = (by_load.get(load.name) for load in LOADS)
    told: list[tuple[str, float, float | None, bool]] = []

    def tell(
        row: Row | None, what: str, name: str, of: Of, wanted: float, at_most: bool = False, ours: str = OURS
    ) -> None:
        if row is not None:
            mine = "ours" if ours == OURS else ours
            told.append((f"{what}, {mine} / {name}", wanted, row.ratio(name, of, ours), at_most))

    tell(one, "1 stream", "llama.cpp", speed, 1.35)
    for name in WEIGHT_FORMATS:
        tell(one, "1 stream", name, speed, 1.5)
    for name in WEIGHT_FORMATS:
        tell(many, "16 streams", name, speed, 1.3)
    if many is not None and mixed is not None:
        found = _ratio(mixed.rounds[OURS], many.rounds[OURS], speed)
        told.append(("32 adapters x 16 streams, ours / our base at 16 streams", 0.7, found, False))
    tell(mixed, "32 adapters x 16 streams", "PEFT", speed, 11.0)
    for name in WEIGHT_FORMATS:
        tell(one, "first token of 96", name, first, 0.9, at_most=True)
    for ours, name, alone, together in SAME_BYTES:
        if alone is not None:
            tell(one, "1 stream", name, speed, alone, ours=ours)
        tell(many, "16 streams", name, speed, together, ours=ours)
    for ours in QUANTIZED:
        for row, what, wanted in (
            (one, "1 stream", 2.3),
            (many, "16 streams", 1.4),
            (mixed, "32 adapters x 16 streams", 1.25),
        ):
            tell(row, what, OURS, speed, wanted, ours=ours)
        tell(one, "first token of 96", OURS, first, 1.0, at_most=True, ours=ours)
    return [Target(text, wanted, found, at_most) for text, wanted, found, at_most in told if found is not None]


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown's lines: a row a load, a column a program; long contexts in a table of their own.

    Tokens per second and the first token's time, and in brackets the ratio of ours to theirs; of long contexts the
    first token's time and the tokens per second after it, and the ratios of both.
    """
    long = {load.name for load in CONTEXTS}
    parts = [[row for row in rows if row.load not in long], [row for row in rows if row.load in long]]
    tables = [_table(part, cell) for part, cell in zip(parts, (_cell, _context_cell), strict=True) if part]
    return [line for each in tables for line in ["", *each]][1:]


def _table(rows: Sequence[Row], cell: Callable[[Row, str], str]) -> list[str]:
    names = [OURS, *dict.fromkeys(name for row in rows for name in row.rounds if name != OURS)]
    heads = [f"{name} (no HTTP)" if name in WITHOUT_HTTP else name for name in names]
    lines = [f"| load | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(names)}"]
    for row in rows:
        cells = (cell(row, name) if name in row.rounds else "-" for name in names)
        lines.append(f"| {row.load} | {' | '.join(cells)} |")
    return lines


def _cell(row: Row, name: str) -> str:
    seconds = row.median(name, first)
    shown = f"{row.median(name, speed):.0f}" + ("" if seconds is None else f", {1e3 * seconds:.0f} ms")
    return shown if name == OURS else f"{shown} ({row.ratio(name, speed):.2f})"


def _context_cell(row: Row, name: str) -> str:
    shown = f"{row.median(name, first):.1f} s, {row.median(name, decode):.1f}"
    return shown if name == OURS else f"{shown} ({row.ratio(name, first):.2f}, {row.ratio(name, decode):.2f})"
