"""The engine step that the benchmark times is one that the engine takes, and its figures add up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loraplex.benchmarks.kernels import serving, step
from loraplex.benchmarks.kernels.machine import Limits
from loraplex.benchmarks.kernels.model import CONTEXT, MODEL_LEN, Model, make_batch, make_model
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.server.models.rotary import RopeConfig
from tests.support.configs import TINY

# One KV group, as SmolLM2 has.
SMALL = replace(TINY, windows=(None,) * 3, ropes=(RopeConfig("default", 1e4, TINY.head_dim, MODEL_LEN),))


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(adapters=2, config=SMALL)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_step_is_timed_and_its_pages_come_back(model: Model, adapters: bool) -> None:
    free = model.kv.pool.num_free
    result = serving.run(model, rows=2, adapters=adapters, steps=8)
    timing = result.timing
    assert timing.calls == 1  # the forward pass, the logits and the draw
    assert 0 < timing.kernels < timing.total
    assert timing.schedule + timing.commit < timing.outside
    assert 0 < timing.batch < timing.total
    assert result.share == timing.outside / timing.total
    assert model.kv.pool.num_free == free


def test_rows_of_the_kernels_step(model: Model) -> None:
    """Distinct pages and distinct adapters for every row."""
    batch = make_batch(model, 2, adapters=True)
    (group,) = batch.attention.groups
    assert group.block_table.shape == (2, CONTEXT // BLOCK_SIZE)
    assert len(set(group.block_table.flatten().tolist())) == 2 * CONTEXT // BLOCK_SIZE
    assert batch.adapters is not None
    slots = [slot for ((slot, _),) in batch.adapters.mixes]
    assert slots == [model.residency.slot_of("ad0"), model.residency.slot_of("ad1")]
    assert len(set(slots)) == 2
    assert make_batch(model, 2, adapters=False).adapters is None


@pytest.mark.parametrize("adapters", [False, True])
def test_a_profile_has_each_op_that_runs(model: Model, adapters: bool) -> None:
    """Every linear of a layer has its adapter there; the places for blocks, which no adapter has, are left out."""
    machine = Limits(threads=1, read=1e9, bf16=1e9, fp32=1e9, instructions="", bf16_by="fp32", library=1e9)
    kinds = step.profile(model, rows=2, adapters=adapters, machine=machine, seconds=0.01)
    counts = {kind.name: kind.count for kind in kinds}
    sites = {name: count for name, count in counts.items() if name.startswith("adapter")}
    layers = SMALL.num_layers
    linears = sum(count for name, count in counts.items() if name.startswith("linear"))
    assert linears == 4 * layers + 1, counts  # and the head
    assert sites == (
        dict.fromkeys([f"adapter {site}" for site in ("qkv", "o", "gate_up", "down")], layers) if adapters else {}
    )
    assert all(kind.least > 0 for kind in kinds)
    result = step.StepResult(2, adapters, 1.0, 0.5, machine)
    assert all(name in step.format_profile(2, adapters, result, kinds) for name in counts)
