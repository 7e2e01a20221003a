"""What is asked of a server, decided before anything is sent: models, prompts, lengths and, in an open loop, times.

The same seed makes the same workload, so that servers and tools can be compared on it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from loraplex.benchmarks.arrivals import Arrivals
from loraplex.benchmarks.load import Request
from loraplex.benchmarks.popularity import popularity
from loraplex.benchmarks.traces import MOONCAKE_BLOCK, TraceRow

VOCAB = (1000, 30000)
"""Token ids of prompts are drawn from here: past what is special, and in every vocabulary of today's models."""

_IDS = tuple(range(*VOCAB))

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
"""One token each in most vocabularies."""


@dataclass(frozen=True)
class Lengths:
    """Whole numbers from low to high, both included, all alike."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Of "8:512" or "96". Raises ValueError."""
        low, _, high = text.partition(":")
        try:
            found = cls(int(low), int(high or low))
        except ValueError:
            raise ValueError(f"{text!r} is no range of lengths such as 8:512, nor a length such as 96") from None
        if not 1 <= found.low <= found.high:
            raise ValueError(f"lengths from {found.low} to {found.high}; they have to be 1 or more, and not fall")
        return found

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low} to {self.high}"

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class Popularity:
    """See popularity.py."""

    law: str = "uniform"
    parameter: float = 1.0

    def __str__(self) -> str:
        return self.law if self.law == "uniform" else f"{self.law} of {self.parameter:g}"


@dataclass(frozen=True)
class Planned:
    """A request and the seconds after the start at which it is due; 0 in a closed loop."""

    at: float
    request: Request
    prompt_tokens: int


@dataclass(frozen=True)
class Spec:
    """What a workload is drawn from."""

    models: Sequence[str]
    popularity: Popularity = field(default_factory=Popularity)
    arrivals: Arrivals | None = None  # None: closed loop, or the trace's own times
    prompt: Lengths = Lengths(96, 96)
    output: Lengths = Lengths(64, 64)
    trace: Sequence[TraceRow] = ()  # lengths; times too, unless there are arrivals
    trace_speed: float = 1.0  # of the trace's clock
    chat: bool = False  # texts instead of token ids, to the chat route
    text: bool = False  # texts instead of token ids
    ignore_eos: bool = True
    seed: int = 0


def plan(spec: Spec, requests: int | None = None, seconds: float | None = None) -> list[Planned]:
    """The first requests of the workload, or those that are due within `seconds`, or both.

    A trace ends where it ends. Raises ValueError where nothing would end it, or nothing is due.
    """
    timed = spec.arrivals is not None or bool(spec.trace)
    if requests is None and not (spec.trace or (seconds is not None and timed)):
        raise ValueError("a number of requests is needed" + ("" if timed else ", since a closed loop has no times"))
    drawn = islice(_draw(spec), requests)
    planned = []
    for each in drawn:
        if seconds is not None and timed and each.at > seconds:
            break
        planned.append(each)
    if not planned:
        raise ValueError(f"no request is due within {seconds:g} s" if seconds is not None else "no requests")
    return planned


def _draw(spec: Spec) -> Iterator[Planned]:
    # a generator for each decision: another law of popularity leaves times and lengths as they were
    rngs = {name: random.Random(f"{spec.seed} {name}") for name in ("arrivals", "models", "lengths", "prompts")}
    model = popularity(spec.popularity.law, spec.popularity.parameter, len(spec.models), rngs["models"])
    lengths = _lengths(spec, rngs["lengths"])
    times = spec.arrivals.times(rngs["arrivals"]) if spec.arrivals else _own_times(spec)
    prompts = _prompts(spec, rngs["prompts"])
    for at, row in zip(times, lengths, strict=False):
        prompt = prompts(row)
        fields = {} if spec.ignore_eos else {"ignore_eos": None}  # which OpenAI's own servers refuse
        request = Request(spec.models[model()], prompt, row.output_tokens, fields, spec.chat)
        yield Planned(at, request, row.prompt_tokens)


def _lengths(spec: Spec, rng: random.Random) -> Iterator[TraceRow]:
    if spec.trace:
        yield from spec.trace
        return
    while True:
        yield TraceRow(0.0, spec.prompt.draw(rng), spec.output.draw(rng))


def _own_times(spec: Spec) -> Iterator[float]:
    if spec.trace:
        return (row.at / spec.trace_speed for row in spec.trace)
    return iter(float, 1.0)  # 0.0 for ever


def _prompts(spec: Spec, rng: random.Random) -> Callable[[TraceRow], str | list[int]]:
    """Random prompts, which no cached prefix can help, except where a trace says what prompts share."""
    blocks: dict[int, int] = {}  # of a trace's hash ids: the seeds of their tokens

    def tokens(row: TraceRow) -> list[int]:
        if not row.blocks:
            return _tokens(rng, row.prompt_tokens)
        seeds = (blocks.setdefault(block, rng.getrandbits(63)) for block in row.blocks)
        shared = chain.from_iterable(_tokens(random.Random(seed), MOONCAKE_BLOCK) for seed in seeds)
        prompt = list(islice(shared, row.prompt_tokens))
        return prompt + _tokens(rng, row.prompt_tokens - len(prompt))

    def words(row: TraceRow) -> str:
        return " ".join(WORDS[token % len(WORDS)] for token in tokens(row))

    return words if spec.text or spec.chat else tokens


def _tokens(rng: random.Random, count: int) -> list[int]:
    return rng.choices(_IDS, k=count)  # of one table: a new int for each token of a long trace would be gigabytes
