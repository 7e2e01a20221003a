"""What stands between a client and the engine: masks of structured output, and HTTP.

    python -m loraplex.benchmarks.api [--rounds 3] [--base demo]

masks   16 streams over HTTP, each held to a JSON schema that no answer of its length can end, against the same load
        without: prompts of the same length, the same number of tokens out
http    64 streams asked of the engine in the server's own process, tokens to text but no HTTP, against the same
        requests over HTTP: answers in one piece, and streamed

Both kinds of a pair take turns in every round, with one engine; figures are medians over the rounds. Client and server
share the machine, as the engine alone does not have to: the client's CPU time is told apart, and a second ratio allows
for it, as if the server had had those seconds, spread over all cores, too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.benchmarks.api.host import Host, serve_host
from loraplex.benchmarks.load import Request, closed_loop
from loraplex.benchmarks.many.figures import Report, Target

PROMPT_WORDS = 24
WORDS = ("the", "one", "in", "three", "and", "what", "is", "some", "water", "of", "house", "time", "people", "day")


@dataclass(frozen=True)
class Load:
    """A closed loop: `requests` in all, `streams` at a time, each answered with `tokens`."""

    streams: int
    requests: int
    tokens: int


MASKS, HTTP = Load(16, 48, 64), Load(64, 128, 64)


@dataclass(frozen=True)
class Run:
    """One closed loop."""

    seconds: float
    tokens: int
    client: float  # CPU seconds of this process
    server: float  # of the other
    others: float = 0.0  # the share of the machine's CPU time that neither of them took: how far to trust the run

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def allowed(self) -> float:
        """The rate if the client's CPU seconds, spread over all cores, had been the server's."""
        return self.tokens / (self.seconds - self.client / (os.cpu_count() or 1))


Kind = Callable[[int], Run]
"""Measures one kind of load; the number is the seed of its prompts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--base", default="demo", help="demo, or a folder")
    parser.add_argument("--parts", default="masks,http", help="comma separated")
    arguments = parser.parse_args()
    report = Report()
    with serve_host(arguments.base, HTTP.streams) as host:
        report.say(f"{os.cpu_count()} CPUs; medians of {arguments.rounds} rounds")
        if "masks" in arguments.parts.split(","):
            report_masks(report, in_turns(mask_kinds(host, MASKS), arguments.rounds))
        if "http" in arguments.parts.split(","):
            report_http(report, in_turns(http_kinds(host, HTTP), arguments.rounds))


def in_turns(kinds: Mapping[str, Kind], rounds: int) -> dict[str, list[Run]]:
    """A run of each kind a round, after one that is not counted; every other round backwards."""
    for kind in kinds.values():
        kind(-1)
    runs: dict[str, list[Run]] = {name: [] for name in kinds}
    for number in range(rounds):
        for name in list(kinds)[:: -1 if number % 2 else 1]:
            runs[name].append(kinds[name](number))
    return runs


def prompts(count: int, seed: int, what: str) -> list[str]:
    """Of as many words, no two with the same beginning, so that no cached prefix helps; `what` keeps kinds apart."""
    rng = random.Random(f"{what} {seed}")
    return [" ".join([str(rng.randrange(10**6)), *rng.choices(WORDS, k=PROMPT_WORDS)]) for _ in range(count)]


def held_to(number: int, tokens: int) -> dict[str, Any]:
    """A schema whose shortest instance has far more than so many tokens; each number another one."""
    item = {
        "type": "object",
        "properties": {
            f"name_{number}": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["cat", "dog", "bird", None]},
            "marks": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 9}, "maxItems": 3},
        },
        "required": [f"name_{number}", "age", "kind", "marks"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": tokens}


def mask_kinds(host: Host, load: Load) -> dict[str, Kind]:
    """By name: the load free, and held to as many schemas as there are streams."""

    def kind(held: bool) -> Kind:
        def measure(seed: int) -> Run:
            requests = []
            for number, prompt in enumerate(prompts(load.requests, seed, f"masks {held}")):
                schema = {"name": "x", "schema": held_to(number % load.streams, load.tokens)}
                form = {"response_format": {"type": "json_schema", "json_schema": schema}, "ignore_eos": False}
                requests.append(Request(host.model, prompt, load.tokens, {"stream": False, **(form if held else {})}))
            return over_http(host, requests, load.streams)

        return measure

    return {"free": kind(False), "held": kind(True)}


def http_kinds(host: Host, load: Load) -> dict[str, Kind]:
    """By name: the load asked of the engine alone, and over HTTP in both ways."""

    def alone(seed: int) -> Run:
        requests = [(prompt, load.tokens) for prompt in prompts(load.requests, seed, "alone")]
        before, start = host.cpu_seconds(), host.reading()
        seconds, tokens = host.alone(requests, load.streams)
        server = host.cpu_seconds() - before
        return Run(seconds, tokens, 0.0, server, host.reading().others_since(start))

    def kind(stream: bool) -> Kind:
        def measure(seed: int) -> Run:
            texts = prompts(load.requests, seed, f"http {stream}")
            requests = [Request(host.model, text, load.tokens, {"stream": stream}) for text in texts]
            return over_http(host, requests, load.streams)

        return measure

    return {"alone": alone, "whole": kind(False), "streamed": kind(True)}


def over_http(host: Host, requests: Sequence[Request], streams: int) -> Run:
    """Raises RuntimeError on any error, also where an answer has not as many tokens as were asked for."""
    server, client, start = host.cpu_seconds(), time.process_time(), host.reading()
    outcome = asyncio.run(closed_loop(host.address, requests, streams))
    client, server = time.process_time() - client, host.cpu_seconds() - server
    others = host.reading().others_since(start)
    tokens = sum(reply.tokens for reply in outcome.replies)
    if tokens != sum(request.max_tokens for request in requests):
        raise RuntimeError(f"{tokens} tokens came of {sum(request.max_tokens for request in requests)} asked for")
    return Run(outcome.seconds, tokens, client, server, others)


def report_masks(report: Report, runs: Mapping[str, Sequence[Run]]) -> None:
    report.say(f"\n{MASKS.streams} streams, held to JSON schemas or free, {MASKS.tokens} tokens an answer")
    tell(report, runs)
    judge(report, "held to schemas, against free", runs["held"], runs["free"], 0.85)


def report_http(report: Report, runs: Mapping[str, Sequence[Run]]) -> None:
    report.say(f"\n{HTTP.streams} streams, {HTTP.tokens} tokens an answer")
    tell(report, runs)
    for name in ("whole", "streamed"):
        judge(report, f"over HTTP, {name}, against the engine alone", runs[name], runs["alone"], 0.9)


def tell(report: Report, runs: Mapping[str, Sequence[Run]]) -> None:
    report.say(
        f"{'':12}{'tok/s':>9}{'allowing for client':>21}{'client CPU s':>14}{'server CPU s':>14}{'wall s':>9}"
        f"{'others':>9}"
    )
    for name, each in runs.items():
        report.say(
            f"{name:12}{_median(each, lambda r: r.rate):9.1f}{_median(each, lambda r: r.allowed):21.1f}"
            f"{_median(each, lambda r: r.client):14.2f}{_median(each, lambda r: r.server):14.2f}"
            f"{_median(each, lambda r: r.seconds):9.2f}{_median(each, lambda r: r.others):9.0%}"
        )


def judge(report: Report, what: str, runs: Sequence[Run], others: Sequence[Run], least: float) -> None:
    """Median over the rounds of the ratios of a round, as it was and allowing for the client."""
    pairs = list(zip(runs, others, strict=True))
    report.note(what, statistics.median(run.rate / other.rate for run, other in pairs))
    allowed = statistics.median(run.allowed / other.allowed for run, other in pairs)
    report.judge("  allowing for the client's CPU time", allowed, Target(">=", least))


def _median(runs: Sequence[Run], of: Callable[[Run], float]) -> float:
    return statistics.median(of(run) for run in runs)


if __name__ == "__main__":
    main()
