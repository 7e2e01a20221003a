"""`loraplex bench limits`: this machine's limits, a decode step against them, and a GPU's on paper."""

from __future__ import annotations

from loraplex.benchmarks.of_limit import times_least
from loraplex.benchmarks.paper import H100, table


def run(paper_only: bool) -> None:
    """Print; a minute, or at once where only the paper is asked for."""
    if not paper_only:
        _measured()
    print(
        f"\nOn paper, not run: a decode step of Llama-3.1-8B in bf16 on {H100.name} at {H100.read / 1e12:g} TB/s and "
    )
    print(f"{H100.bf16 / 1e12:g} TFLOP/s; rank 16 on all linears, an adapter a row, 1024 tokens of context\n")
    print("\n".join(table()))


def _measured() -> None:
    from loraplex.benchmarks.kernels.machine import Others, limits
    from loraplex.benchmarks.kernels.model import ROWS, make_model
    from loraplex.benchmarks.kernels.step import measure_step

    machine = limits()
    print(machine)
    print("\nDecode steps of SmolLM2-135M in bf16, rank 16 on all linears, 256 tokens of context:")
    print(f"{'rows':>5}{'adapters':>10}{'step':>11}{'least':>11}{'others took':>13}  times the least")
    model = make_model()
    for rows in ROWS:
        for adapters in (False, True):
            others = Others.watch()
            found = measure_step(model, rows, adapters, machine)
            shown = f"{found.seconds * 1e3:8.2f} ms{found.least * 1e3:8.2f} ms{others.read():13.0%}"
            print(f"{rows:5}{rows if adapters else 0:10}{shown}  {times_least(found.ratio)}", flush=True)
