"""The figures of a run: percentiles, throughput, attainment of an SLO, goodput, and fairness between adapters.

- first token: from when a request was due to the first part of its answer. Per token: mean time between the tokens of
  an answer after its first. Between parts: every single gap in a stream, of all streams. Whole: to the answer's end.
  Send lag: how late the client was. Percentiles interpolate linearly, as numpy's do.
- attainment: the share of *all* requests that were answered within the objective; one that failed or was refused has
  not been. Goodput: such requests per second.
- fairness: Jain's index over adapters, (sum x)^2 / (n sum x^2): 1 when all fare alike, 1/n when one has everything.
  `service`: x is the share of an adapter's asked tokens that it got. `speed`: x is the tokens that its requests got per
  second of waiting. An adapter with few requests fares by chance: compare fairness at equal numbers of requests.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loraplex.benchmarks.drive import Run, Sample

SHARES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Objective:
    """Seconds that an answer may take; None: as long as it likes."""

    first: float | None = None
    per_token: float | None = None
    whole: float | None = None

    def met(self, sample: Sample) -> bool:
        limits = (self.first, self.per_token, self.whole)
        found = (sample.first, sample.per_token, sample.whole)
        return sample.ok and all(limit is None or value <= limit for limit, value in zip(limits, found, strict=True))

    def __str__(self) -> str:
        named = (("first token", self.first), ("per token", self.per_token), ("whole", self.whole))
        parts = [f"{name} {limit * 1e3:g} ms" for name, limit in named if limit is not None]
        return ", ".join(parts) or "an answer at all"


@dataclass(frozen=True)
class Spread:
    """Of some seconds; all 0 of none."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = np.fromiter(values, float)
        if not found.size:
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        p50, p90, p95, p99 = (float(value) for value in np.percentile(found, SHARES))
        return cls(int(found.size), float(found.mean()), p50, p90, p95, p99, float(found.max()))


@dataclass(frozen=True)
class AdapterFigures:
    """How one adapter's requests fared."""

    model: str
    requests: int
    failed: int
    tokens: int
    first: float  # seconds, mean
    speed: float  # tokens per second of waiting
    attained: float  # share of its requests


@dataclass(frozen=True)
class Figures:
    """Of the requests that were due after the warm-up."""

    seconds: float  # from the first due to the last end
    requests: int
    failed: int
    errors: Mapping[str, int]  # the most frequent ones
    prompt_tokens: int
    tokens: int
    requests_per_second: float  # answered
    tokens_per_second: float  # of answers
    first: Spread
    per_token: Spread
    between: Spread
    whole: Spread
    lag: Spread
    attained: float
    goodput: float  # requests per second
    fair_service: float
    fair_speed: float
    adapters: Sequence[AdapterFigures]  # most requests first

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(run: Run, objective: Objective, warmup: float = 0.0) -> Figures:
    """Figures of a run. Raises ValueError where no request was due after `warmup` seconds."""
    samples = [sample for sample in run.samples if sample.due >= warmup]
    if not samples:
        raise ValueError(f"no request was due after {warmup:g} s of warm-up")
    answered = [sample for sample in samples if sample.ok]
    seconds = max(sample.ended for sample in samples) - min(sample.due for sample in samples)
    adapters = _adapters(samples, objective)
    attained = sum(map(objective.met, samples))
    return Figures(
        seconds=seconds,
        requests=len(samples),
        failed=len(samples) - len(answered),
        errors=dict(Counter(sample.error[:200] for sample in samples if sample.error).most_common(10)),
        prompt_tokens=sum(sample.prompt_tokens for sample in answered),
        tokens=sum(sample.tokens for sample in answered),
        requests_per_second=len(answered) / seconds,
        tokens_per_second=sum(sample.tokens for sample in answered) / seconds,
        first=Spread.of(sample.first for sample in answered),
        per_token=Spread.of(sample.per_token for sample in answered if sample.tokens > 1),
        between=Spread.of(gap for sample in answered for gap in sample.gaps),
        whole=Spread.of(sample.whole for sample in answered),
        lag=Spread.of(sample.lag for sample in samples),
        attained=attained / len(samples),
        goodput=attained / seconds,
        fair_service=jain(_service(samples).values()),
        fair_speed=jain(each.speed for each in adapters),
        adapters=adapters,
    )


def jain(values: Iterable[float]) -> float:
    """Jain's index of fairness; 1 of nothing, and of nothing but zeros."""
    found = list(values)
    squares = len(found) * sum(value**2 for value in found)
    return sum(found) ** 2 / squares if squares else 1.0


def _service(samples: Iterable[Sample]) -> dict[str, float]:
    """Share of the tokens asked for that each model's requests got."""
    got: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for sample in samples:
        got[sample.model] += sample.tokens if sample.ok else 0
        asked[sample.model] += sample.asked
    return {model: got[model] / asked[model] for model in asked}


def _adapters(samples: Iterable[Sample], objective: Objective) -> list[AdapterFigures]:
    by_model: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_model[sample.model].append(sample)
    found = []
    for model, mine in by_model.items():
        answered = [sample for sample in mine if sample.ok]
        tokens, waited = sum(s.tokens for s in answered), sum(s.whole for s in mine)
        found.append(
            AdapterFigures(
                model,
                len(mine),
                len(mine) - len(answered),
                tokens,
                sum(s.first for s in answered) / len(answered) if answered else 0.0,
                tokens / waited if waited > 0 else 0.0,
                sum(map(objective.met, mine)) / len(mine),
            )
        )
    return sorted(found, key=lambda each: (-each.requests, each.model))
