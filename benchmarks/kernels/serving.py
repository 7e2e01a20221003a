"""What a decode step of the engine spends outside the kernels: scheduler, batch, sampling, and Python around them.

    python -m loraplex.benchmarks.kernels.serving [--quantize int4]

The engine's own Scheduler, KVCache, DeviceTier and LocalWorker over SmolLM2-135M with random weights: rows at 256
tokens and more, every one with an adapter of its own or none. Prompts are planned and committed but not computed. Left
out are the API, detokenizing and adapters that come and go.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.adapters.version import AdapterVersion
from loraplex.benchmarks.kernels.machine import Others, read_memory
from loraplex.benchmarks.kernels.model import CONTEXT, MODEL_LEN, ROWS, Model, make_model
from loraplex.server.engine.policy.plan import SchedulerLimits
from loraplex.server.engine.policy.rows import Drawn, RowResult
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.engine.step.batch import build_batch
from loraplex.server.engine.step.worker import LocalWorker
from loraplex.server.models.quantizing import SCHEMES

STEPS = 60
"""Measured, of a sequence's MODEL_LEN - CONTEXT."""


class Everywhere:
    """The scheduler's Placement where all adapters are on the device for good."""

    def __init__(self, residency: DeviceTier) -> None:
        self.slot_of = residency.slot_of

    def request(self, version: AdapterVersion) -> None:
        pass

    def cancel(self, version: AdapterVersion) -> None:
        pass

    def missing_pages(self, versions: Sequence[AdapterVersion]) -> list[int]:
        return [0] * len(versions)

    def load(self, version: AdapterVersion) -> bool:
        return True

    def is_ready(self, version: AdapterVersion) -> bool:
        return True

    def start_step(self, busy: bool) -> bool:
        return False

    def pin(self, digest: str) -> None:
        pass

    def unpin(self, digest: str) -> None:
        pass

    def evict_for_slot(self) -> bool:
        return False


@dataclass(frozen=True)
class Timing:
    """Seconds of one step, or of a typical one (medians)."""

    total: float
    kernels: float  # inside the library
    calls: float  # into it
    schedule: float
    batch: float  # StepInput -> ForwardBatch
    commit: float

    @property
    def outside(self) -> float:
        return self.total - self.kernels


@dataclass(frozen=True)
class Result:
    rows: int
    adapters: bool
    greedy: bool
    timing: Timing

    @property
    def share(self) -> float:
        """Of the step that is spent outside the kernels."""
        return self.timing.outside / self.timing.total

    def __str__(self) -> str:
        t = self.timing
        rest = t.outside - t.schedule - t.batch - t.commit
        return (
            f"engine step, {self.rows} rows, {f'{self.rows} adapters' if self.adapters else 'base'}, "
            f"{'greedy' if self.greedy else 'sampled'}: {t.total * 1e3:.2f} ms; {t.calls:.0f} calls, outside them "
            f"{t.outside * 1e6:.0f} us ({self.share:.1%}): schedule {t.schedule * 1e6:.0f}, batch {t.batch * 1e6:.0f}, "
            f"commit {t.commit * 1e6:.0f}, the rest {rest * 1e6:.0f}"
        )


class _Engine:
    """A scheduler and a runner over a model, and `rows` requests that decode."""

    def __init__(self, model: Model, rows: int, adapters: bool, greedy: bool) -> None:
        self._model = model
        limits = SchedulerLimits(
            max_model_len=MODEL_LEN,
            max_num_seqs=rows,
            token_budget=rows * CONTEXT,
            num_slots=max(ROWS),
            vocab_size=model.config.vocab_size,
            prefix_cache=False,
        )
        self._worker = LocalWorker(model.decoder, model.residency, model.kv.block_size, model.ops.device)
        self._scheduler = Scheduler(model.kv, Everywhere(model.residency), limits)
        registry = Registry()
        for row in range(rows):
            name = f"ad{row}"
            registry.register(name, name, AdapterInfo(16, ("q_proj",), 1, 1, digest=name if adapters else ""))
            params = SamplingParams(MODEL_LEN - CONTEXT, 0.0 if greedy else 0.8, top_p=0.95, seed=row)
            prompt = tuple((7 * row + i) % 1000 for i in range(CONTEXT))
            mix = ((registry.lease(name), 1.0),) if adapters else ()
            self._scheduler.add(GenerationRequest(name, prompt, params, mix))
        plan = self._scheduler.schedule()
        assert [row.draws for row in plan.step.rows] == [1] * rows
        self._scheduler.commit(plan, [RowResult((Drawn(1),))] * rows)
        for seq in plan.seqs:
            model.touch(seq.number)

    def step(self) -> Timing:
        model = self._model
        model.team.inside, model.team.calls = 0.0, 0
        start = time.perf_counter()
        plan = self._scheduler.schedule()
        planned = time.perf_counter()
        results = self._worker.run(self._worker.prepare(plan.step))
        executed = time.perf_counter()
        self._scheduler.commit(plan, results)
        end = time.perf_counter()
        inside, calls = model.team.inside, model.team.calls
        return Timing(end - start, inside, calls, planned - start, 0.0, end - executed)

    def build(self) -> float:
        """Seconds of build_batch alone, for a step that is then taken."""
        model = self._model
        plan = self._scheduler.schedule()
        start = time.perf_counter()
        build_batch(plan.step, model.residency.table, model.kv.block_size, model.ops.device)
        taken = time.perf_counter() - start
        self._scheduler.commit(plan, self._worker.run(self._worker.prepare(plan.step)))
        return taken

    def close(self) -> None:
        for seq in tuple(self._scheduler.running):
            self._scheduler.abort(seq.request.request_id)


def run(model: Model, rows: int, adapters: bool, greedy: bool = True, steps: int = STEPS) -> Result:
    """Caches are as cold before each step as a step leaves them."""
    engine = _Engine(model, rows, adapters, greedy)
    builds, timings = [], []
    for _ in range(steps // 2):
        builds.append(engine.build())
        timings.append(engine.step())
    engine.close()
    middle = {
        name: sorted(getattr(timing, name) for timing in timings)[len(timings) // 2]
        for name in ("total", "kernels", "calls", "schedule", "commit")
    }
    return Result(rows, adapters, greedy, Timing(**middle, batch=sorted(builds)[len(builds) // 2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", choices=SCHEMES, help="what the base is in; bf16 without it")
    model = make_model(quantize=parser.parse_args().quantize)
    read_memory()
    for rows in (1, 16):
        for adapters in (False, True):
            for greedy in (True, False):
                others = Others.watch()
                print(run(model, rows, adapters, greedy), f"(others took {others.read():.0%} of the CPUs)", flush=True)


if __name__ == "__main__":
    main()
