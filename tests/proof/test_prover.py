"""Receipts of a whole engine: the probe sees what is computed wrong, and what cannot be proved is said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.image.tiles import AdapterImage, LowRank
from loraplex.adapters.version import AdapterVersion
from loraplex.server.command.build import EngineParts
from loraplex.server.command.proving import make_prover
from loraplex.server.config_engine import Device, DType, EngineConfig
from loraplex.server.engine.request import Overloaded
from loraplex.server.proof.prober import ProbeFailed, probe_ids
from loraplex.server.proof.prover import MAX_OFFERED, Prover
from tests.support.peft_adapters import make_peft_adapter
from tests.support.tiny import VOCAB_SIZE, load_oracle, make_tiny_model
from tests.support.waiting import LIMIT
from tests.support.whole_engine import whole_engine

CONFIG = EngineConfig(Device.cpu, DType.float32, memory=256 << 20)
OPTIONS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen2", tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_peft_adapter(load_oracle(base), tmp_path / "adapter", **OPTIONS).folder


@asynccontextmanager
async def proving(
    base: Path, adapter: Path, config: EngineConfig = CONFIG
) -> AsyncIterator[tuple[EngineParts, Prover]]:
    async with whole_engine(base, config, {"a": adapter}) as parts:
        prover = make_prover(parts, ("base", str(base)), rest=0.0)
        try:
            yield parts, prover
        finally:
            prover.close()


def version_of(parts: EngineParts, name: str = "a") -> AdapterVersion:
    found = parts.adapters.registry.get(name)
    assert found is not None
    return found


@pytest.mark.parametrize(("dtype", "most"), [(DType.float32, 1e-4), (DType.bfloat16, 0.2)])
async def test_a_sound_adapter_has_a_small_difference(base: Path, adapter: Path, dtype: DType, most: float) -> None:
    async with proving(base, adapter, EngineConfig(Device.cpu, dtype, memory=256 << 20)) as (parts, prover):
        receipt = await prover.wait(version_of(parts), LIMIT)
        assert receipt is not None
        assert receipt.probe is not None
        assert receipt.probe.tokens == 11
        assert 0 <= receipt.probe.base < most
        assert 0 < receipt.probe.adapter < most
        assert receipt.measured.digest == version_of(parts).digest
        assert receipt.as_json()["base"]["is_named"] is True
        assert prover.begin(version_of(parts)).result is not None  # made: told again, not made again
        assert await prover.wait(version_of(parts), LIMIT) is receipt


async def test_the_probe_sees_an_image_that_is_packed_wrong(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplex.adapters.tiers import reader

    loaded = reader._loaded

    def wrong(info: Any, image: AdapterImage, bytes_read: int) -> Any:
        image.pages.view(torch.float32).mul_(1.05)
        return loaded(info, image, bytes_read)

    monkeypatch.setattr(reader, "_loaded", wrong)
    async with proving(base, adapter) as (parts, prover):
        receipt = await prover.wait(version_of(parts), LIMIT)
        assert receipt is not None
        assert receipt.probe is not None
        assert receipt.probe.base < 1e-4
        assert receipt.probe.adapter > 1e-2


async def test_an_engine_that_does_not_answer_leaves_a_receipt_without_a_probe_which_is_tried_again(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proving(base, adapter) as (parts, prover):
        with monkeypatch.context() as busy:

            def refuse(*_: object) -> None:
                raise Overloaded("the queue is full", 1.0)

            busy.setattr(parts.engine._requests, "enter", refuse)
            receipt = await prover.wait(version_of(parts), LIMIT)
        assert receipt is not None
        assert (receipt.probe, receipt.probe_error) == (None, "the queue is full")
        assert receipt.measured.relative > 0
        again = await prover.wait(version_of(parts), LIMIT)
        assert again is not None
        assert again.probe is not None


async def test_other_files_by_now_are_no_receipt(base: Path, adapter: Path) -> None:
    async with proving(base, adapter) as (parts, prover):
        make_peft_adapter(load_oracle(base), adapter, seed=2, **OPTIONS)
        version = version_of(parts)
        assert await prover.wait(version, LIMIT) is None
        assert "by now" in (prover.failure(version) or "")
        assert not prover.is_under_way(version)


async def test_a_version_that_nobody_has_read_is_read_for_its_receipt(base: Path, adapter: Path) -> None:
    async with proving(base, adapter) as (parts, prover):
        parts.adapters.register_unread(adapter)
        version = version_of(parts, adapter.name)
        assert version.digest is None
        receipt = await prover.wait(version, LIMIT)
        assert receipt is not None
        assert receipt.measured.digest == version.digest == version_of(parts).digest


async def test_loads_are_offered_and_bounded(base: Path, adapter: Path) -> None:
    async with proving(base, adapter) as (parts, prover):
        versions = [await parts.adapters.register(f"a{i}", str(adapter)) for i in range(MAX_OFFERED + 3)]
        for version in versions:
            prover.offer(version)
        assert sum(map(prover.is_under_way, versions)) == MAX_OFFERED
        await asyncio.gather(*(prover.begin(version) for version in versions[:MAX_OFFERED]))
        assert all(prover.known(version) for version in versions)  # they have the same content
        prover.offer(versions[-1])
        assert not prover.is_under_way(versions[-1])


async def test_a_noop_that_is_allowed_is_served_as_the_base_and_its_receipt_says_so(base: Path, tmp_path: Path) -> None:
    noop = make_peft_adapter(load_oracle(base), tmp_path / "noop", strength=None, **OPTIONS).folder
    async with whole_engine(base, CONFIG, {"noop": noop}, allow_noop=True) as parts:
        prover = make_prover(parts, ("base",), rest=0.0)
        receipt = await prover.wait(version_of(parts, "noop"), LIMIT)
        prover.close()
        assert receipt is not None
        assert receipt.measured.is_noop
        assert receipt.probe is not None
        assert receipt.probe.adapter == receipt.probe.base < 1e-4


async def test_an_activated_adapter_is_called_by_its_invocation(base: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "alora_invocation_tokens": [9, 4]}
    folder = make_peft_adapter(load_oracle(base), tmp_path / "activated", **options).folder
    async with proving(base, folder) as (parts, prover):
        fused = await prover._prober.ask(version_of(parts))
        assert (fused.acts[0].first, fused.base.ids[6:8]) == (6, (9, 4))
        assert fused.base.logprobs[:5] == pytest.approx(fused.adapted.logprobs[:5], abs=1e-5)  # of what is before it
        receipt = await prover.wait(version_of(parts), LIMIT)
        assert receipt is not None
        assert receipt.probe is not None
        assert receipt.probe.adapter < 1e-4
        assert abs(fused.base.logprobs[6] - fused.adapted.logprobs[6]) > 1e-2


def test_an_invocation_too_long_is_not_probed() -> None:
    assert len(probe_ids(320, range(11))) == 12
    with pytest.raises(ProbeFailed, match="12 tokens"):
        probe_ids(320, range(12))


OWN: dict[str, dict[str, Any]] = {
    "trained tokens": {**OPTIONS, "trainable_token_indices": {"embed_tokens": [3, 5, 7, 9, 311]}},
    "norms": {"kind": "LN_TUNING", "target_modules": ["input_layernorm", "norm"]},
    "tables": {**OPTIONS, "modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on tables": {"r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "added tokens": OPTIONS,
}


def make_own(base: Path, folder: Path, case: str) -> Path:
    """Have PEFT write the adapter; added tokens are rows of both tables beyond the base's."""
    oracle = load_oracle(base)
    if case == "added tokens":
        oracle.resize_token_embeddings(oracle.config.vocab_size + 3)
    adapter = make_peft_adapter(oracle, folder, **OWN[case])
    if case == "added tokens":
        adapter.model.save_pretrained(folder, save_embedding_layers=True)
    return adapter.folder


@pytest.mark.parametrize("case", OWN)
async def test_what_it_has_outside_the_linears_is_probed_on_its_own_tokens(
    base: Path, tmp_path: Path, case: str
) -> None:
    folder = make_own(base, tmp_path / "own", case)
    async with proving(base, folder) as (parts, prover):
        receipt = await prover.wait(version_of(parts), LIMIT)
        assert receipt is not None, prover.failure(version_of(parts))
        assert receipt.probe is not None, receipt.probe_error
        assert receipt.probe.base < 1e-4
        assert 0 < receipt.probe.adapter < 1e-4
        assert receipt.doubt is None
        asked = receipt.probe.own_tokens
        least = {"norms": 0, "tables": 12, "lora on tables": 12, "added tokens": 12}.get(case, 4)
        assert (asked == 0) if case == "norms" else least <= asked <= 12
        added = [token for token in (await prover._prober.ask(version_of(parts))).adapted.ids if token >= VOCAB_SIZE]
        assert len(added) >= 3 if case == "added tokens" else not added
        assert "whose norm is not measured" in receipt.remark
        assert receipt.as_json()["probe"]["own_tokens"] == asked


@pytest.mark.parametrize("case", OWN)
async def test_the_probe_sees_what_is_packed_wrong_outside_the_linears(
    base: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By 5 %: of the rows and the changes of tables alone."""
    from loraplex.adapters.tiers import making

    make_rows, make_parts = making.make_rows, making.make_parts

    def wrong_rows(*given: Any) -> Any:
        return [replace(row, rows=row.rows * 1.05) for row in make_rows(*given)]

    def wrong_parts(*given: Any) -> Any:
        for part in make_parts(*given):
            is_table = isinstance(part, LowRank) and part.projection.name in ("embed_tokens", "lm_head")
            yield replace(part, scaling=part.scaling * 1.05) if is_table else part

    monkeypatch.setattr(making, "make_rows", wrong_rows)
    monkeypatch.setattr(making, "make_parts", wrong_parts)
    folder = make_own(base, tmp_path / "own", case)
    async with proving(base, folder) as (parts, prover):
        receipt = await prover.wait(version_of(parts), LIMIT)
        assert receipt is not None, prover.failure(version_of(parts))
        assert receipt.probe is not None, receipt.probe_error
        assert receipt.probe.base < 1e-4
        assert receipt.probe.adapter > 1e-3
