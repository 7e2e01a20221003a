"""A cluster of replicas under traffic, by discrete events: what they would answer, how fast, and what it moves.

What is assumed, and what is left out, is in docs/benchmarks.md.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from loraplex.benchmarks.measures import Spread
from loraplex.benchmarks.replica import Job, Replica, ReplicaSpec
from loraplex.benchmarks.routing import ROUTERS


@dataclass(frozen=True)
class Result:
    """Of what happened after the warm-up. Seconds, of requests due then that ended within the time simulated."""

    routing: str
    requests: int  # due after the warm-up
    unended: int  # of them
    requests_per_second: float  # ended after the warm-up, whenever they were due
    tokens_per_second: float  # likewise
    first: Spread
    per_token: Spread
    whole: Spread
    attained: float  # share with their first token in time; of all due, so that what did not end counts against it
    hits: float  # share that found their adapter in a slot
    loads_per_second: float  # of a replica, mean
    busy: float  # share of the time that replicas computed, mean
    filled: float  # share of the slots that held an adapter when the warm-up ended, mean
    adapters: int  # distinct ones asked for
    adapters_per_replica: float  # distinct ones that a replica was asked for, mean


def simulate(
    spec: ReplicaSpec,
    replicas: int,
    routing: str,
    jobs: Iterable[Job],
    seconds: float,
    warmup: float = 0.0,
    objective: float = 1.0,
    seed: int = 0,
) -> Result:
    """Route `jobs`, which come in order of time, for `seconds`. The jobs are written to. Raises KeyError (routing)."""
    cluster = [Replica(spec) for _ in range(replicas)]
    router = ROUTERS[routing](cluster, random.Random(seed))
    asked: list[set[int]] = [set() for _ in cluster]
    wakes: list[float | None] = [None] * replicas
    events: list[tuple[float, int]] = []
    sent: list[Job] = []
    filled = 0.0

    def schedule(number: int, at: float | None) -> None:
        wakes[number] = at
        if at is not None:
            heappush(events, (at, number))

    def run_until(end: float) -> None:
        while events and events[0][0] <= end:
            at, number = heappop(events)
            if wakes[number] == at:  # else something came before and moved it
                schedule(number, cluster[number].wake(at))

    warm: tuple[int, float] | None = None
    for job in jobs:
        if job.due > seconds:
            break
        run_until(job.due)
        if warm is None and job.due >= warmup:
            warm = _moved(cluster)
            filled = sum(replica.filled for replica in cluster) / replicas
        number = router.pick(job.adapter, job.due)
        at = cluster[number].arrive(job)
        planned = wakes[number]
        if at is not None and (planned is None or at < planned):
            schedule(number, at)
        sent.append(job)
        if job.due >= warmup:
            asked[number].add(job.adapter)
    run_until(seconds)
    loads, busy = (now - then for now, then in zip(_moved(cluster), warm or (0, 0.0), strict=True))
    return _result(routing, sent, asked, (loads, busy, filled), (warmup, seconds), objective)


def _moved(cluster: Sequence[Replica]) -> tuple[int, float]:
    return sum(replica.loads for replica in cluster), sum(replica.busy_seconds for replica in cluster)


def _result(
    routing: str,
    sent: list[Job],
    asked: list[set[int]],
    moved: tuple[float, float, float],
    window: tuple[float, float],
    objective: float,
) -> Result:
    (loads, busy, filled), span = moved, window[1] - window[0]
    jobs = [job for job in sent if job.due >= window[0]]
    ended = [job for job in jobs if job.ended]
    answered = [job for job in sent if job.ended >= max(window[0], 1e-12)]
    return Result(
        routing=routing,
        requests=len(jobs),
        unended=len(jobs) - len(ended),
        requests_per_second=len(answered) / span,
        tokens_per_second=sum(job.output_tokens for job in answered) / span,
        first=Spread.of(job.first - job.due for job in ended),
        per_token=Spread.of((j.ended - j.first) / (j.output_tokens - 1) for j in ended if j.output_tokens > 1),
        whole=Spread.of(job.ended - job.due for job in ended),
        attained=sum(bool(job.first) and job.first - job.due <= objective for job in jobs) / max(1, len(jobs)),
        hits=sum(job.hit for job in jobs) / max(1, len(jobs)),
        loads_per_second=loads / span / len(asked),
        busy=busy / span / len(asked),
        filled=filled,
        adapters=len(set().union(*asked)),
        adapters_per_replica=sum(map(len, asked)) / len(asked),
    )
