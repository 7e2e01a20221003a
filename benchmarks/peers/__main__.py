"""Served tokens per second beside other programs, on one machine, turn by turn.

    python -m loraplex.benchmarks.peers [--rounds 2] [--loads 1,2,3] [--peers NAMES] [--minutes 25] [--out [FOLDER]]

SmolLM2-135M; prompts of 96 tokens (rows 1 to 4), 4,096 (5) and 16,384 (6), 64 tokens out, greedy, end of sequence
ignored, closed loop, ours streamed over HTTP; adapters of rank 16 on all seven linears, random weights. In every round
all run one after the other, in an order that turns from round to round, and a ratio is the median over the rounds of
the two rates of a round: a machine that others use slows both. A peer that cannot run here is left out with the reason.
What is missing is built or installed first, in --folder: llama.cpp in ten minutes of one core, OpenVINO 1.6 GB, vLLM
3.4 GB; --prepare does that and nothing else. The file is written after every row.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from loraplex.benchmarks import kept
from loraplex.benchmarks.peers import llamacpp, mistral_rs, openvino_ir, peft_batch, vllm_cpu
from loraplex.benchmarks.peers.peer import Figures, Peer, Running, Skipped, base_for, ours
from loraplex.benchmarks.peers.report import OURS, QUANTIZED, Row, table, targets
from loraplex.benchmarks.random_adapters import make_adapters
from loraplex.benchmarks.readme_loads import CONTEXTS, LOADS, Load
from loraplex.server.config import DEMO
from loraplex.server.models.demo import default_cache_dir, ensure_demo_base

ALL_LOADS = (*LOADS, *CONTEXTS)


def makers(folder: Path, base: Path, adapters: Sequence[Path], jobs: int) -> dict[str, Callable[[], Peer]]:
    """Of every peer, by name. They raise Skipped."""
    found: dict[str, Callable[[], Peer]] = {
        name: partial(_quantized, name, kind, folder, base, adapters) for name, kind in QUANTIZED.items()
    }
    for name in llamacpp.WEIGHTS:
        found[name] = partial(llamacpp.peer, name, folder, base, adapters, jobs)
    for name in openvino_ir.WEIGHT_FORMATS:
        found[name] = partial(openvino_ir.peer, name, folder, base, adapters)
    found[mistral_rs.NAME] = partial(mistral_rs.peer, folder, base, adapters)
    found["vLLM"] = partial(vllm_cpu.peer, folder, base, adapters)
    found["PEFT"] = partial(peft_batch.peer, base, adapters)
    return found


def _quantized(name: str, kind: str, folder: Path, base: Path, adapters: Sequence[Path]) -> Peer:
    """Our own server with --quantize `kind`; native: with the demo's own GGUF, in its own context only."""
    native = kind == "native"

    def start(load: Load) -> AbstractContextManager[Running]:
        path = DEMO if native else base_for(load, base, folder)
        return ours(path, adapters[0].parent, "--quantize", kind)

    loads = [load.name for load in (LOADS if native else ALL_LOADS)]
    return Peer(name, {}, start, loads, f"--quantize {kind}")


ALL_PEERS = (*QUANTIZED, *llamacpp.WEIGHTS, *openvino_ir.WEIGHT_FORMATS, mistral_rs.NAME, "vLLM", "PEFT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loads", default="1,2,3,4,5,6", help="which rows, comma separated")
    parser.add_argument("--peers", default=",".join(ALL_PEERS), help="comma separated; all: %(default)s")
    parser.add_argument("--requests", type=int, help="of each load and round; fewer for a quick look")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no row and no round is begun")
    parser.add_argument("--prepare", action="store_true", help="build, install and convert, and measure nothing")
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
    loads = [ALL_LOADS[int(number) - 1] for number in arguments.loads.split(",")]
    if arguments.requests:
        loads = [replace(load, requests=arguments.requests) for load in loads]

    base = ensure_demo_base()
    own = default_cache_dir() / "benchmarks" / "r16"
    adapters = make_adapters(base, own, max(load.adapters for load in LOADS))
    found = makers(arguments.folder, base, adapters, arguments.jobs)
    peers, missing = prepare({name: found[name] for name in wanted})
    deadline = time.monotonic() + 60 * arguments.minutes
    rows: list[Row] = []
    for load in [] if arguments.prepare else loads:
        if time.monotonic() > deadline:
            print(f"{load.name} is left out: {arguments.minutes:g} minutes are over", flush=True)
            continue
        with ours(base_for(load, base, arguments.folder), own) as mine:
            rows.append(measure(load, mine, peers, arguments.rounds, deadline))
        if arguments.out:
            save(arguments.out, rows, peers, missing)
    print("\n".join(["", *table(rows), "", *map(str, targets(rows)), ""]))
    print("\n".join(f"{peer.name}: {peer.settings}" for peer in peers))


def save(out: Path, rows: Sequence[Row], peers: Sequence[Peer], missing: Mapping[str, str]) -> None:
    """Everything that was found, and with what, into the file of this kind of CPU in the folder `out`."""
    content = {
        "peers": {peer.name: dict(peer.versions) for peer in peers},
        "settings": {peer.name: peer.settings for peer in peers},
        "left_out": missing,
        "rows": [row.as_json() for row in rows],
        "targets": [
            {"text": each.text, "wanted": each.wanted, "found": each.found, "met": each.met} for each in targets(rows)
        ],
    }
    kept.write("peers", content, out)


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


def measure(load: Load, mine: Running, peers: Sequence[Peer], rounds: int, deadline: float = float("inf")) -> Row:
    """All that can run `load`, warmed up, in turns; a peer that does not start, or fails, is left out.

    One round at least; no further one is begun after `deadline`, of time.monotonic().
    """
    with ExitStack() as stack:
        running = {OURS: mine}
        mine.warm(load)
        for peer in peers:
            if load.name not in peer.loads:
                continue
            try:
                running[peer.name] = stack.enter_context(peer.start(load))
                running[peer.name].warm(load)
            except (Skipped, RuntimeError) as reason:
                print(f"{load.name}: {peer.name} is left out: {reason}", flush=True)
                running.pop(peer.name, None)
        found: dict[str, list[Figures]] = {name: [] for name in running}
        names = list(running)
        for seed in range(rounds):
            if seed and time.monotonic() > deadline:
                break
            turn = seed % len(names)
            for name in names[turn:] + names[:turn]:
                try:
                    found[name].append(running[name].measure(load, seed))
                except RuntimeError as reason:
                    if name == OURS:
                        raise
                    print(f"{load.name}: {name} is left out: {reason}", flush=True)
                    del found[name]
                    continue
                print(f"{load.name}, round {seed + 1}: {name} {_said(found[name][-1])}", flush=True)
            names = list(found)
    return Row(load.name, found)


def _said(run: Figures) -> str:
    first = "" if run.first is None else f", first {run.first:.3f} s"
    return f"{run.tokens_per_second:.1f} tokens/s{first}" + ("" if run.decode is None else f", then {run.decode:.1f}")


if __name__ == "__main__":
    main()
