"""Served tokens per second beside other servers, on one machine, turn by turn.

    python -m loraplex.benchmarks.peers [--rounds 3] [--loads 1,2,3,4] [--peers llama.cpp,peft] [--folder DIR]

SmolLM2-135M in bf16; prompts of 96 tokens, 64 tokens out, greedy, end of sequence ignored, streamed over HTTP, closed
loop; adapters of rank 16 on all seven linears, random weights. In every round ours and theirs run one after the other,
and the ratio is the median over the rounds of the two rates of a round: a machine that others use slows both. A peer
that cannot run here is left out with the reason. llama.cpp is built once, ten minutes of one core, into --folder.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loraplex.benchmarks.load import Outcome, closed_loop, send
from loraplex.benchmarks.peers import peft_batch
from loraplex.benchmarks.peers.llamacpp import convert, install, llamacpp
from loraplex.benchmarks.peers.peer import LOADS, Load, Served, Skipped, ours
from loraplex.benchmarks.random_adapters import make_adapters
from loraplex.server.models.demo import default_cache_dir, ensure_demo_base

ALL_PEERS = ("llama.cpp", "peft")
PEFT_ROWS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", default="1,2,3,4", help="which rows, comma separated")
    parser.add_argument("--peers", default=",".join(ALL_PEERS), help="comma separated")
    parser.add_argument("--requests", type=int, help="of each load and round; fewer for a quick look")
    parser.add_argument(
        "--folder", type=Path, default=default_cache_dir() / "peers", help="what is built and converted"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="of building llama.cpp")
    arguments = parser.parse_args()
    peers = arguments.peers.split(",")
    if unknown := set(peers) - set(ALL_PEERS):
        parser.error(f"unknown peers {', '.join(sorted(unknown))}; there are: {', '.join(ALL_PEERS)}")
    loads = [LOADS[int(number) - 1] for number in arguments.loads.split(",")]
    if arguments.requests:
        loads = [replace(load, requests=arguments.requests) for load in loads]

    base = ensure_demo_base()
    folder = default_cache_dir() / "benchmarks" / "r16"
    adapters = make_adapters(base, folder, max(load.adapters for load in LOADS))
    print(f"{os.cpu_count()} CPUs; medians of {arguments.rounds} rounds")
    if "llama.cpp" in peers:
        try:
            program = install(arguments.folder, arguments.jobs)
            model, converted = convert(arguments.folder / "gguf", base, adapters)
            print(f"{'':38}{'ours':>8}{'llama.cpp':>11}{'ratio':>7}   first token p50, ours and theirs")
            with ours(folder) as mine:
                for load in loads:
                    with llamacpp(program, model, converted[: load.adapters], load.streams) as theirs:
                        _report(load, asyncio.run(_alternate([mine, theirs], load, arguments.rounds)))
        except Skipped as reason:
            print(f"llama.cpp is left out: {reason}")
    if "peft" in peers:
        _peft(base, adapters[:PEFT_ROWS], arguments.rounds)


async def _alternate(servers: Sequence[Served], load: Load, rounds: int) -> list[list[Outcome]]:
    """Per server, an outcome a round."""
    for server in servers:  # what is loaded and compiled on first use
        for request in server.requests(replace(load, requests=max(1, load.adapters)), seed=-1):
            await send(server.address, replace(request, max_tokens=2))
    outcomes: list[list[Outcome]] = [[] for _ in servers]
    for seed in range(rounds):
        for server, mine in zip(servers, outcomes, strict=True):
            mine.append(await closed_loop(server.address, server.requests(load, seed), load.streams))
    return outcomes


def _report(load: Load, outcomes: list[list[Outcome]]) -> None:
    mine, theirs = outcomes
    ratio = statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in zip(mine, theirs, strict=True))
    rates = [statistics.median(run.tokens_per_second for run in runs) for runs in outcomes]
    firsts = [statistics.median(run.first_token(0.5) for run in runs) for runs in outcomes]
    shown = ", ".join(f"{1e3 * first:.0f} ms" for first in firsts)
    print(f"{load.name:38}{rates[0]:8.1f}{rates[1]:11.1f}{ratio:7.2f}   {shown}", flush=True)


def _peft(base: Path, adapters: Sequence[Path], rounds: int) -> None:
    try:
        rate = statistics.median(peft_batch.measure(base, adapters, rounds))
    except Skipped as reason:
        print(f"peft is left out: {reason}")
        return
    print(f"peft, one batch of {len(adapters)} rows and adapters, no server: {rate:.1f} tokens/s")


if __name__ == "__main__":
    main()
