"""Sends a workload and writes down what came of each request, with nothing left out when the server falls behind.

In an open loop every request is sent when it is due, however many are still under way, and its latencies count from
when it was due: a client that waited for the server, or counted from its own late sending, would measure only the
moments at which the server kept up (coordinated omission). How late requests were sent is reported as the send lag;
where it is large the client is the bottleneck, and the figures say more about it than about the server.

In a closed loop a request is due when its stream's last one has ended, by definition.

A run that is cancelled ends with what there is: requests under way then count as failed, those to come do not count.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.benchmarks.load import Address, Reply, Request, send
from loraplex.benchmarks.workload import Planned

STOPPED = "stopped while under way"
"""The error of a request that was under way when its run was cancelled."""

NO_ANSWER = 600.0
"""Seconds after which a request is given up: servers under more load than they can carry answer late, but they do."""

Notify = Callable[["Sample"], None]


@dataclass(frozen=True)
class Sample:
    """What came of one request, in seconds: `due`, `sent` and `ended` from the run's start, the others from `due`."""

    model: str
    due: float
    sent: float
    ended: float
    first: float  # to the first part of the answer; 0 where none came
    gaps: tuple[float, ...]  # between parts
    tokens: int  # of the answer: the server's count, or the number of parts where it told none
    asked: int  # tokens of the answer asked for
    prompt_tokens: int  # the server's count, else the workload's
    error: str  # empty when all is well

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def whole(self) -> float:
        """To the end of the answer."""
        return self.ended - self.due

    @property
    def lag(self) -> float:
        return self.sent - self.due

    @property
    def per_token(self) -> float:
        """Mean time between tokens after the first; 0 of fewer than two."""
        return max(0.0, self.whole - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass(frozen=True)
class Run:
    """All of a workload that was sent, in the order in which it was planned."""

    samples: Sequence[Sample]
    seconds: float  # from the start to the last end
    stopped: bool = False  # by being cancelled


async def open_loop(
    address: Address, planned: Sequence[Planned], notify: Notify = lambda _: None, limit: float = NO_ANSWER
) -> Run:
    """Send each request when it is due. `notify` hears of each as it ends. Raises nothing a server could cause."""
    allow_connections(len(planned))
    start = time.perf_counter()
    found: dict[int, Sample] = {}

    async def one(number: int, each: Planned, due: float) -> None:
        found[number] = await _send(address, each, start, due, notify, limit)

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for number, each in enumerate(planned):
                due = start + each.at
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                else:
                    await asyncio.sleep(0)  # those already due get under way one after the other
                group.create_task(one(number, each, due))

    return await _collect(all_of_them(), found)


async def closed_loop(
    address: Address,
    planned: Sequence[Planned],
    streams: int,
    notify: Notify = lambda _: None,
    seconds: float | None = None,
    limit: float = NO_ANSWER,
) -> Run:
    """Keep `streams` requests under way until all are sent, or `seconds` are over; those under way then are waited for.

    Raises ValueError for no streams, and nothing a server could cause.
    """
    if streams < 1:
        raise ValueError(f"{streams} streams; a closed loop has at least one")
    allow_connections(streams)
    start = time.perf_counter()
    numbered = iter(enumerate(planned))
    found: dict[int, Sample] = {}

    async def stream() -> None:
        due = time.perf_counter()
        while (seconds is None or due - start < seconds) and (nth := next(numbered, None)) is not None:
            number, each = nth
            found[number] = await _send(address, each, start, due, notify, limit)
            if found[number].error == STOPPED:
                return
            due = time.perf_counter()

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(stream())

    return await _collect(all_of_them(), found)


async def _collect(sending: Coroutine[Any, Any, None], found: Mapping[int, Sample]) -> Run:
    """The run whose samples `sending` puts into `found`, however it ends."""
    stopped = False
    try:
        await sending
    except asyncio.CancelledError:
        stopped = True
        if task := asyncio.current_task():
            task.uncancel()
    samples = [found[number] for number in sorted(found)]
    return Run(samples, max((sample.ended for sample in samples), default=0.0), stopped)


def allow_connections(count: int) -> None:
    """Raise the limit on open files as far as is allowed: every request under way is a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))


async def _send(address: Address, each: Planned, start: float, due: float, notify: Notify, limit: float) -> Sample:
    sent = time.perf_counter()
    try:
        reply = await send(address, each.request, limit=limit)
    except asyncio.CancelledError:
        reply = Reply(each.request.model, sent, error=STOPPED)
    ended = reply.arrivals[-1] if reply.ok and reply.arrivals else time.perf_counter()
    sample = _sample(each.request, reply, each.prompt_tokens, start, due, ended)
    notify(sample)
    return sample


def _sample(request: Request, reply: Reply, prompt_tokens: int, start: float, due: float, ended: float) -> Sample:
    error = "" if reply.ok else f"{reply.status or 'no'} answer: {reply.error or 'the stream ended without [DONE]'}"
    if reply.error == STOPPED:
        error = STOPPED
    if not error and not reply.arrivals:
        error = "an answer without a token"
    return Sample(
        model=request.model,
        due=due - start,
        sent=reply.sent - start,
        ended=ended - start,
        first=reply.arrivals[0] - due if reply.arrivals else 0.0,
        gaps=tuple(reply.gaps),
        tokens=reply.tokens or len(reply.arrivals),
        asked=request.max_tokens,
        prompt_tokens=reply.prompt_tokens or prompt_tokens,
        error=error,
    )
