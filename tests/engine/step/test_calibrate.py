"""Calibration: the arithmetic on a machine whose speed is known, and that it measures the real decoder's steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.kernels.select import load_backend
from loraplex.server.engine.policy.budget import StepCost, default_budget
from loraplex.server.engine.policy.kv_groups import kv_groups
from loraplex.server.engine.step import calibrate as calibration
from loraplex.server.engine.step.arena import kv_layers
from loraplex.server.engine.step.calibrate import SCRATCH_PAGES, calibrate, measure
from loraplex.server.engine.step.memory import page_bytes
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.inputs import ForwardBatch
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.recorded import RecordedDecoder, record
from loraplex.server.models.weights import load_checkpoint
from tests.support.tiny import make_tiny_model


class Machine:
    """Steps take what `seconds(tokens)` says, on a clock of their own."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now = 0.0
        self.steps: list[int] = []
        self._seconds = seconds

    def run_step(self, tokens: int) -> None:
        self.steps.append(tokens)
        self.now += self._seconds(tokens)

    def clock(self) -> float:
        return self.now

    def cost(self) -> StepCost:
        return measure(self.run_step, self.clock)


def test_a_line_is_found_again() -> None:
    cost = Machine(lambda tokens: 0.004 + tokens * 0.0003).cost()
    assert cost.fixed_seconds == pytest.approx(0.004)
    assert cost.token_seconds == pytest.approx(0.0003)
    assert default_budget(cost) == 320  # (0.1 - 0.004) / 0.0003


def test_what_others_take_of_the_machine_does_not_count() -> None:
    calls = 0

    def seconds(tokens: int) -> float:
        nonlocal calls
        calls += 1
        return 0.002 + tokens * 0.0002 + (0.004 if calls % 3 else 0.0)

    assert default_budget(Machine(seconds).cost()) == 480


def test_a_slow_machine_is_measured_by_two_small_steps() -> None:
    machine = Machine(lambda tokens: 0.5 + tokens * 0.1)
    cost = machine.cost()
    assert max(machine.steps) == 16
    assert len(machine.steps) == 3, "warmed up, and once each"
    assert cost.token_seconds == pytest.approx(0.1)
    assert default_budget(cost) == 64


@settings(max_examples=200, deadline=None)
@given(st.floats(0.0, 1.0), st.floats(1e-7, 0.1))
def test_time_and_budget_are_bounded(fixed: float, token: float) -> None:
    machine = Machine(lambda tokens: fixed + tokens * token)
    budget = default_budget(machine.cost())
    assert 64 <= budget <= 2048
    assert budget % 16 == 0
    if 64 < budget < 2048:
        assert fixed + budget * token <= 0.1 + 1e-9
        assert fixed + (budget + 16) * token > 0.1 - 1e-9
    assert machine.now <= 0.35 + 2 * (fixed + token) + (fixed + 16 * token) + 1e-9, "and two steps at least"


@given(st.lists(st.floats(0.0, 1.0), min_size=20, max_size=20))
def test_any_times_at_all_make_a_budget(times: list[float]) -> None:
    left = iter(times)
    assert 64 <= default_budget(Machine(lambda tokens: next(left)).cost()) <= 2048


class TimedDecoder:
    """A decoder whose forward passes take `machine`'s time and, beside that, are computed."""

    def __init__(self, inner: Decoder | RecordedDecoder, machine: Machine) -> None:
        self._inner = inner
        self._machine = machine

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        self._machine.run_step(batch.input_ids.shape[0])
        return self._inner.forward(batch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._inner.logits(hidden)
        assert torch.isfinite(logits).all()
        return logits


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi4mini"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_real_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, backend: str) -> None:
    """Its own forward passes, of all sizes and nothing else, are what is timed: their line is found again."""
    path = make_tiny_model(family, tmp_path)
    config, ops = ModelConfig.from_hf(path), load_backend(backend, "cpu")
    groups = kv_groups(config.windows)
    arena = torch.zeros(SCRATCH_PAGES * len(groups), page_bytes(config, torch.float32, groups), dtype=torch.uint8)
    views = kv_layers(arena, config, torch.float32, groups)
    machine = Machine(lambda tokens: 0.004 + tokens * 0.0001)

    def timed(decoder: Decoder, tokens: int, rows: int) -> TimedDecoder:
        return TimedDecoder(record(decoder, tokens, rows), machine)

    monkeypatch.setattr(calibration, "record", timed)
    cost = calibrate(
        Decoder(config, load_checkpoint(open_checkpoint(path), config, ops, torch.float32), ops, views, arena),
        machine.clock,
    )
    assert cost.fixed_seconds == pytest.approx(0.004)
    assert cost.token_seconds == pytest.approx(0.0001)
    assert machine.steps == [1, *(tokens for tokens in (1, 16, 64, 256) for _ in range(3))]
    for layer in views:  # the largest step measured wrote its 256 tokens to every layer
        own = slice(layer.group * SCRATCH_PAGES, (layer.group + 1) * SCRATCH_PAGES)
        assert layer.k[own].abs().amax((1, 3)).all()
