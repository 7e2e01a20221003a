"""From the command to the first answer, with all adapters in a folder and with none."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from loraplex.benchmarks.many import pagecache
from loraplex.benchmarks.many.figures import Report, Target
from loraplex.benchmarks.many.served import serve
from loraplex.benchmarks.many.world import World
from loraplex.benchmarks.random_adapters import CONFIG, WEIGHTS

MOST = 10.0
"""Seconds."""


def run(world: World, report: Report, rounds: int = 3) -> None:
    """Starts take turns: none, all, all with nothing of their files in the page cache."""

    def nothing() -> None:
        pass

    def forget() -> None:
        for index in range(world.count):
            for name in (CONFIG, WEIGHTS):
                pagecache.drop(world.folder / f"ad{index}" / name)

    folder = ("--adapter-dir", str(world.folder))
    starts: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
        "none": (nothing, ()),
        "all": (nothing, folder),
        "all, from disk": (forget, folder),
    }
    ready: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(rounds):
        for name, (prepare, flags) in starts.items():
            prepare()
            with serve(world.base, *flags) as server:
                ready[name].append(server.ready_seconds)
                if flags and not server.told(rf"\b{world.count} adapters"):
                    report.fail(f"the server does not say that it has {world.count} adapters")
    medians = {name: statistics.median(seconds) for name, seconds in ready.items()}
    report.say(f"ready with no adapters after {medians['none']:.2f} s; {rounds} rounds, medians")
    for name in ("all", "all, from disk"):
        more = medians[name] - medians["none"]
        report.judge(f"{world.count} adapters, {name}: seconds more", more, Target("<=", MOST))
