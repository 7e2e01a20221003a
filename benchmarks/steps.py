"""Measured times of steps, as a file: what the cluster simulator is calibrated with.

    python -m loraplex.benchmarks.steps [FILE]

Measures decode steps of SmolLM2-135M at 1 to 32 rows with and without adapters (see kernels/step.py) and prefill, in
about half a minute, and writes them with the machine they were measured on. The file's form, for other models and GPUs:

    {"points": [{"rows": 16, "adapters": 16, "prefill_tokens": 0, "seconds": 0.0182}, ...],
     "model": "SmolLM2-135M", "rows": 32, "slots": 256, "kv_tokens": 40000, "load_seconds": 0.01, "prefill_budget": 512,
     "adapter_bytes": 9768960}

Only `points` are measured here; the rest says what a replica of the demo base holds, and is there to be edited.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loraplex.benchmarks.kind import Kind
from loraplex.benchmarks.replica import ReplicaSpec, StepTimes

DEFAULT = Path(__file__).resolve().parent / "results" / "steps.json"


class BadCalibration(Exception):
    """A file of step times cannot be used; the message says what is missing."""


@dataclass(frozen=True)
class Point:
    """One measured step."""

    rows: int
    adapters: int  # distinct
    prefill_tokens: int
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """A replica, and how well the fitted step times meet the measured ones."""

    spec: ReplicaSpec
    adapter_bytes: int
    worst: float  # the largest relative difference between a measured step and its fit
    what: str  # was measured


def fit(points: Sequence[Point]) -> tuple[StepTimes, float]:
    """Times by least squares of relative differences, none of them negative, and the largest such difference.

    Raises BadCalibration for fewer than two points.
    """
    if len(points) < 2:
        raise BadCalibration(f"{len(points)} measured steps; two are needed at least, and better eight")
    wanted = np.array([point.seconds for point in points])
    columns = np.array([[1.0, p.rows, p.adapters, p.prefill_tokens] for p in points]) / wanted[:, None]
    # of four numbers it is cheap to try every subset: the best one whose numbers are all positive is the answer
    best, least = np.zeros(4), np.inf
    for chosen in range(1, 16):
        used = [column for column in range(4) if chosen >> column & 1]
        found = np.linalg.lstsq(columns[:, used], np.ones(len(points)), rcond=None)[0]
        left = float(((columns[:, used] @ found - 1) ** 2).sum())
        if (found >= 0).all() and left < least - 1e-12:
            best, least = np.zeros(4), left
            best[used] = found
    times = StepTimes(*(float(value) for value in best))
    return times, float(np.abs(columns @ best - 1).max())


def read(path: Path = DEFAULT) -> Calibration:
    """Raises BadCalibration."""
    try:
        found: Mapping[str, Any] = json.loads(path.read_text())
        points = [Point(p["rows"], p["adapters"], p["prefill_tokens"], p["seconds"]) for p in found["points"]]
        times, worst = fit(points)
        limits = {name: found[name] for name in ("rows", "slots", "kv_tokens", "load_seconds", "prefill_budget")}
        model = found.get("model", path.name)
        what = f"{model} on {Kind.from_json(found['kind'])}" if "kind" in found else path.name
        return Calibration(ReplicaSpec(times, **limits), found["adapter_bytes"], worst, what)
    except FileNotFoundError:
        how = "python -m loraplex.benchmarks.steps FILE measures this machine's"
        raise BadCalibration(f"no step times at {path}; {how}") from None
    except KeyError as error:
        raise BadCalibration(f"{path}: no {error} in it; see the form in steps.py") from None
    except (ValueError, TypeError) as error:
        raise BadCalibration(f"{path}: {error}") from None


def measure(seconds: float = 1.0) -> list[Point]:
    """Steps of this machine; `seconds` for each kind."""
    from loraplex.benchmarks.kernels import step
    from loraplex.benchmarks.kernels.machine import limits
    from loraplex.benchmarks.kernels.model import ROWS, make_model

    machine, model = limits(), make_model()
    points = []
    for rows in ROWS:
        for adapters in (False, True):
            found = step.measure_step(model, rows, adapters, machine, seconds)
            points.append(Point(rows, rows if adapters else 0, 0, found.seconds))
    from loraplex.server.engine.step.calibrate import calibrate

    # the line through steps of 64 and 256 tokens: at these two, what was measured
    cost = calibrate(model.decoder._decoder)
    return [*points, *(Point(1, 0, n, cost.fixed_seconds + n * cost.token_seconds) for n in (64, 256))]


def replica() -> dict[str, float | str]:
    """What a server of the demo base with 4 GB holds: 256 adapters of rank 16, 2.5 GB, and 0.9 GB of keys and values.

    An adapter's bytes are exact, a load's seconds are a round number.
    """
    return {
        "model": "SmolLM2-135M",
        "rows": 32,
        "slots": 256,
        "kv_tokens": 40_000,
        "load_seconds": 0.01,
        "prefill_budget": 512,
        "adapter_bytes": 9_768_960,
    }


def main() -> None:
    from loraplex.benchmarks.provenance import Provenance

    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    points = measure()
    times, worst = fit(points)
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {"kind": Kind.here().as_json(), "measured": Provenance.here().as_json()}
    content = {**where, "points": [asdict(point) for point in points], **replica()}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{path}: {len(points)} steps; {times}; the fit misses by up to {worst:.0%}")


if __name__ == "__main__":
    main()
