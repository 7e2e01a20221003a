"""How much of the machine's CPU time others took than this process and those it watches: how far to trust a run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reading:
    """Seconds, since whenever."""

    machine: float  # of CPU, everybody's; 0 where the system does not tell
    ours: float  # of CPU, this process' and the watched ones'
    wall: float

    def others_since(self, earlier: Reading) -> float:
        """The share of the machine that others took meanwhile; 0 where the system does not tell."""
        cpus = os.cpu_count() or 1
        others = (self.machine - earlier.machine) - (self.ours - earlier.ours)
        return max(0.0, others / max(1e-9, (self.wall - earlier.wall) * cpus))


def read(pids: Sequence[int] = ()) -> Reading:
    """Now; `pids` are watched beside this process."""
    ours = time.process_time() + sum(process(pid) for pid in pids)
    return Reading(machine(), ours, time.monotonic())


def machine() -> float:
    """Seconds of CPU that everybody has taken since boot; 0 where the system does not tell."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # without idle and iowait
    except (OSError, ValueError, IndexError):
        return 0.0


def process(pid: int) -> float:
    """Seconds of CPU that a process has taken; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
