"""Served tokens per second beside other servers, on one machine, turn by turn.

    python -m loraplex.benchmarks.peers [--rounds 2] [--loads 1,2,3,4] [--peers llama.cpp,vllm,peft] [--out [FOLDER]]

SmolLM2-135M in bf16; prompts of 96 tokens, 64 tokens out, greedy, end of sequence ignored, streamed over HTTP, closed
loop; adapters of rank 16 on all seven linears, random weights. In every round all run one after the other, in an order
that turns from round to round, and a ratio is the median over the rounds of the two rates of a round: a machine that
others use slows both. A round takes ten minutes of two cores. A peer that cannot run here is left out with the reason.
llama.cpp is built once, ten minutes of one core, and vLLM is installed once, 3.4 GB, both in --folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from loraplex.benchmarks import kept
from loraplex.benchmarks.peers import llamacpp, peft_batch, vllm_cpu
from loraplex.benchmarks.peers.peer import Figures, Peer, Running, Skipped, ours
from loraplex.benchmarks.peers.report import OURS, Row, table
from loraplex.benchmarks.random_adapters import make_adapters
from loraplex.benchmarks.readme_loads import LOADS, Load
from loraplex.server.models.demo import default_cache_dir, ensure_demo_base

ALL_PEERS = ("llama.cpp", "vllm", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loads", default="1,2,3,4", help="which rows, comma separated")
    parser.add_argument("--peers", default=",".join(ALL_PEERS), help="comma separated")
    parser.add_argument("--requests", type=int, help="of each load and round; fewer for a quick look")
    parser.add_argument(
        "--folder", type=Path, default=default_cache_dir() / "peers", help="what is built, installed and converted"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="of building llama.cpp")
    kept.add_option(parser)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as on Ctrl-C, what was started is stopped
    wanted = arguments.peers.split(",")
    if unknown := set(wanted) - set(ALL_PEERS):
        parser.error(f"unknown peers {', '.join(sorted(unknown))}; there are: {', '.join(ALL_PEERS)}")
    loads = [LOADS[int(number) - 1] for number in arguments.loads.split(",")]
    if arguments.requests:
        loads = [replace(load, requests=arguments.requests) for load in loads]

    base = ensure_demo_base()
    folder = default_cache_dir() / "benchmarks" / "r16"
    adapters = make_adapters(base, folder, max(load.adapters for load in LOADS))
    makers: dict[str, Callable[[], Peer]] = {
        "llama.cpp": lambda: llamacpp.peer(arguments.folder, base, adapters, arguments.jobs),
        "vllm": lambda: vllm_cpu.peer(arguments.folder, base, adapters),
        "peft": lambda: peft_batch.peer(base, adapters),
    }
    peers, missing = prepare({name: makers[name] for name in wanted})
    with ours(folder) as mine:
        rows = [measure(load, mine, peers, arguments.rounds) for load in loads]
    print("\n".join(["", *table(rows)]))
    if arguments.out:
        content = {
            "peers": {peer.name: dict(peer.versions) for peer in peers},
            "left_out": missing,
            "rows": [row.as_json() for row in rows],
        }
        kept.write("peers", content, arguments.out)


def prepare(makers: Mapping[str, Callable[[], Peer]]) -> tuple[list[Peer], dict[str, str]]:
    """Those that can run here, and of the others by name why not."""
    peers, missing = [], {}
    for name, make in makers.items():
        try:
            peers.append(make())
        except Skipped as reason:
            missing[name] = str(reason)
            print(f"{name} is left out: {reason}", flush=True)
    return peers, missing


def measure(load: Load, mine: Running, peers: Sequence[Peer], rounds: int) -> Row:
    """All that can run `load`, warmed up, in turns; who does not start is left out."""
    with ExitStack() as stack:
        running = {OURS: mine}
        for peer in peers:
            if load.name not in peer.loads:
                continue
            try:
                running[peer.name] = stack.enter_context(peer.start(load))
            except Skipped as reason:
                print(f"{load.name}: {peer.name} is left out: {reason}", flush=True)
        for program in running.values():
            program.warm(load)
        found: dict[str, list[Figures]] = {name: [] for name in running}
        names = list(running)
        for seed in range(rounds):
            turn = seed % len(names)
            for name in names[turn:] + names[:turn]:
                found[name].append(running[name].measure(load, seed))
                shown = found[name][-1].tokens_per_second
                print(f"{load.name}, round {seed + 1}: {name} {shown:.1f} tokens/s", flush=True)
    return Row(load.name, found)


if __name__ == "__main__":
    main()
