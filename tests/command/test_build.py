"""The composition root: what it refuses, and what it makes of a folder."""

from __future__ import annotations

import ctypes
import json
import time
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.kernels.ops import BackendUnavailable
from loraplex.server.command import loaded_base, sizing
from loraplex.server.command.build import build_engine
from loraplex.server.config_engine import EngineConfig, LinearInputs, Quantize
from loraplex.server.engine.policy import multi_step
from loraplex.server.engine.policy.budget import StepCost
from loraplex.server.engine.request import FinishReason, GenerationRequest, SamplingParams
from loraplex.server.engine.step.memory import NotEnoughMemory
from loraplex.server.facts import BaseFormats
from loraplex.server.models.checkpoint import WeightsError
from loraplex.server.models.config import UnsupportedModel
from loraplex.server.models.inputs import ForwardBatch
from loraplex.server.models.recorded import RecordedDecoder
from tests.support.tiny import make_tiny_model

SMALL = {"device": "cpu", "memory": 64 << 20, "max_num_seqs": 4, "token_budget": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(
        "llama", tmp_path_factory.mktemp("base"), generation={"do_sample": True, "temperature": 0.25}
    )


async def test_a_folder_becomes_an_engine(base: Path) -> None:
    parts = build_engine(EngineConfig(**SMALL), base, "tiny")
    assert parts.memory.max_model_len == parts.model_config.max_position == 512
    assert parts.memory.total_bytes <= 64 << 20
    assert not parts.engine.alive
    parts.engine.start()
    request = GenerationRequest("r", (5, 6, 7), SamplingParams(4, temperature=0.0))
    events = [event async for event in parts.engine.submit(request)]
    assert len(events) == 4
    assert events[-1].finish is FinishReason.LENGTH
    parts.engine.stop()
    parts.adapters.close()


async def test_a_message_halts_steps_that_follow_one_another(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_step, "CALL_SECONDS", 1e9)
    parts = build_engine(EngineConfig(**SMALL, decode_steps=8), base, "tiny")
    parts.engine.start()
    decode, made = RecordedDecoder.decode, list[int]()

    def counted(model: RecordedDecoder, *rest: Any) -> int:
        made.append(decode(model, *rest))
        return made[-1]

    def woken(model: RecordedDecoder, *rest: Any) -> int:
        parts.engine.wake()  # while the kernels are about to begin
        return counted(model, *rest)

    for run, most in ((counted, 8), (woken, 1)):
        monkeypatch.setattr(RecordedDecoder, "decode", run)
        request = GenerationRequest(f"r{most}", (5, 6, 7), SamplingParams(40, temperature=0.0))
        assert len([event async for event in parts.engine.submit(request)]) == sum(made) + 1, "one came with the prompt"
        assert max(made) == most
        made.clear()
    parts.engine.stop()
    parts.adapters.close()


async def test_tokens_reach_their_reader_while_the_steps_after_theirs_run(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_step, "CALL_SECONDS", 1e9)
    parts = build_engine(EngineConfig(**SMALL, decode_steps=8), base, "tiny")
    decode, ends, read, early = RecordedDecoder.decode, SimpleQueue[int](), list[int](), list[int]()

    def slow(model: RecordedDecoder, batch: ForwardBatch, *rest: Any) -> int:
        """As if each step ended once the tokens of the one before it are read."""
        before = 1 + sum(early)
        done = decode(model, batch, *rest[:-1], None)
        until = time.monotonic() + 60
        for step in range(1, done):
            ends.put(step)
            while len(read) < before + step:
                assert time.monotonic() < until, f"{len(read)} tokens read of {before + step}"
                time.sleep(0.001)
        assert len(read) < before + done, "the last is the engine's own"
        if batch.steps > 1:  # else nobody waits
            ends.put(-1)
        early.append(done)
        return done

    monkeypatch.setattr(RecordedDecoder, "decode", slow)
    monkeypatch.setattr(RecordedDecoder, "await_step", lambda *_: ends.get(timeout=60))
    parts.engine.start()
    request = GenerationRequest("r", (5, 6, 7), SamplingParams(40, temperature=0.0))
    async for event in parts.engine.submit(request):
        assert event.token_id is not None
        read.append(event.token_id)
    parts.engine.stop()
    parts.adapters.close()
    monkeypatch.undo()
    alone = build_engine(EngineConfig(**SMALL, decode_steps=1), base, "tiny")
    alone.engine.start()
    again = GenerationRequest("r", (5, 6, 7), SamplingParams(40, temperature=0.0))
    assert read == [event.token_id async for event in alone.engine.submit(again)]
    alone.engine.stop()
    alone.adapters.close()
    assert max(early) == 8


async def test_a_call_that_fails_leaves_no_thread_waiting_for_its_steps(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_step, "CALL_SECONDS", 1e9)
    parts = build_engine(EngineConfig(**SMALL, decode_steps=8), base, "tiny")
    inputs, wait, seen_before = RecordedDecoder._inputs, RecordedDecoder.await_step, list[int]()

    def short_of_memory(model: RecordedDecoder, batch: ForwardBatch) -> Any:
        if batch.steps > 1:
            monkeypatch.setattr(RecordedDecoder, "_inputs", inputs)
            raise MemoryError
        return inputs(model, batch)

    def watched(model: RecordedDecoder, followed: ctypes.c_int32, seen: int) -> int:
        seen_before.append(seen)
        return wait(model, followed, seen)

    monkeypatch.setattr(RecordedDecoder, "_inputs", short_of_memory)
    monkeypatch.setattr(RecordedDecoder, "await_step", watched)
    parts.engine.start()
    for name, finish in (("first", FinishReason.ERROR), ("second", FinishReason.LENGTH)):
        request = GenerationRequest(name, (5, 6, 7), SamplingParams(40, temperature=0.0))
        assert [event async for event in parts.engine.submit(request)][-1].finish is finish
    parts.engine.stop()
    parts.adapters.close()
    assert seen_before.count(0) > 1, "the one thread that waits is with the first request's steps still"


@pytest.mark.parametrize(
    ("asked", "checkpoint", "expected"),
    [
        ("auto", "float32", torch.float32),
        ("auto", "bfloat16", torch.bfloat16),
        ("auto", "float16", torch.bfloat16),  # on the CPU
        ("float32", "bfloat16", torch.float32),
        ("bfloat16", "float32", torch.bfloat16),
    ],
)
def test_dtype(tmp_path: Path, base: Path, asked: str, checkpoint: str, expected: torch.dtype) -> None:
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": checkpoint}))
    parts = build_engine(EngineConfig(**SMALL, dtype=asked), tmp_path, "tiny")
    assert parts.formats.dtype == str(expected).removeprefix("torch.")
    parts.adapters.close()


def test_too_little_memory_is_refused_before_the_weights_are_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded_base, "load_checkpoint", None)
    with pytest.raises(NotEnoughMemory, match=r"976\.6 KiB of memory are too little"):
        build_engine(EngineConfig(**{**SMALL, "memory": 1_000_000, "max_model_len": 512}), base, "tiny")


def test_a_head_of_its_own_is_counted(base: Path, tmp_path: Path) -> None:
    """The config ties it to the embedding, the file says otherwise: more weights than planned, so fewer pages."""
    path = make_tiny_model("smollm2", tmp_path / "tied")
    config = EngineConfig(**SMALL, backend="reference")  # which pads nothing
    parts = build_engine(config, path, "tied")
    parts.adapters.close()
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    apart = build_engine(config, path, "apart")
    apart.adapters.close()
    assert apart.memory.weights_bytes - parts.memory.weights_bytes == tensors["model.embed_tokens.weight"].nbytes
    assert apart.memory.num_pages < parts.memory.num_pages
    assert apart.memory.total_bytes <= 64 << 20


def test_the_token_budget_is_calibrated_or_as_given(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One left open is what takes 100 ms here, and may grow; where its scratch does not fit, the least there is."""
    slow = StepCost(fixed_seconds=0.02, token_seconds=0.0005)
    monkeypatch.setattr(sizing, "calibrate", lambda decoder: slow)
    given, left_open = EngineConfig(**SMALL), EngineConfig(**{**SMALL, "token_budget": None})
    for config, expected in ((given, 32), (left_open, 160)):
        parts = build_engine(config, base, "tiny")
        parts.adapters.close()
        scheduler = parts.engine._scheduler
        assert parts.token_budget == scheduler.token_budget == expected
        assert scheduler.limits.token_budget == (512 if config is left_open else expected), "what memory is planned for"
        assert scheduler.kv.token_seconds == pytest.approx(slow.token_seconds + slow.fixed_seconds / expected)
        for _ in range(9):
            scheduler.budget.observe(expected, 0, 1e-3)
        assert (scheduler.token_budget > expected) == (config is left_open)
    with pytest.raises(NotEnoughMemory) as caught:
        build_engine(EngineConfig(**{**SMALL, "memory": 1 << 20, "token_budget": 64}), base, "tiny")
    least = int(str(caught.value).split("--memory ")[1].split(",")[0])
    parts = build_engine(EngineConfig(**{**SMALL, "memory": least, "token_budget": None}), base, "tiny")
    parts.adapters.close()
    assert parts.token_budget == parts.engine._scheduler.limits.token_budget == 64


def test_room_for_a_larger_budget_costs_little(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No context, and a sixteenth of the arena at most: with less memory the budget may grow less."""
    monkeypatch.setattr(sizing, "calibrate", lambda decoder: StepCost(0.0, 0.1 / 64))
    most = []
    for nbytes in (16 << 20, 64 << 20, 512 << 20):
        config = EngineConfig(**{**SMALL, "memory": nbytes, "token_budget": None})
        given, left_open = (build_engine(c, base, "tiny") for c in (replace(config, token_budget=64), config))
        for parts in (given, left_open):
            parts.adapters.close()
        assert left_open.memory.max_model_len == given.memory.max_model_len
        assert 16 * left_open.memory.num_pages >= 15 * given.memory.num_pages
        assert left_open.memory.total_bytes <= nbytes
        most.append(left_open.engine._scheduler.limits.token_budget)
    assert most == sorted(most)
    assert most[0] < most[-1] == 2048


def test_memory_as_a_share_of_what_is_free(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda device: 1 << 30)
    config = {**SMALL, "memory": 0.25}
    parts = build_engine(EngineConfig(**config), base, "tiny")
    parts.adapters.close()
    assert (1 << 28) - parts.memory.page_bytes < parts.memory.total_bytes <= 1 << 28


def test_the_process_is_counted_where_asked(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "resident_memory", lambda: 300 << 20)
    parts = build_engine(EngineConfig(**{**SMALL, "memory": 1 << 29}), base, "tiny", count_process=True)
    parts.adapters.close()
    assert parts.memory.process_bytes > 300 << 20
    assert (1 << 29) - parts.memory.page_bytes < parts.memory.total_bytes <= 1 << 29


@pytest.mark.parametrize(
    ("quantize", "activations", "expected"),
    [
        (None, None, BaseFormats("float32")),
        (Quantize.native, None, BaseFormats("float32")),
        (Quantize.int8, None, BaseFormats("float32", "int8", "a8")),
        (Quantize.int4, None, BaseFormats("float32", "int4 + int8", "a8")),
        (Quantize.int4, LinearInputs.exact, BaseFormats("float32", "int4 + int8", "exact")),
        (Quantize.nf4, None, BaseFormats("float32", "nf4", "exact")),
        (Quantize.nf4, LinearInputs.a8, BaseFormats("float32", "nf4", "a8")),
    ],
)
def test_a_base_is_kept_in_the_bits_that_were_chosen(
    base: Path, quantize: Quantize | None, activations: LinearInputs | None, expected: BaseFormats
) -> None:
    chosen = {"quantize": quantize, "activations": activations}
    parts = build_engine(EngineConfig(**SMALL, dtype="float32", **chosen), base, "tiny")
    parts.adapters.close()
    assert parts.formats == expected
    remarks = {name: remark for name, _, remark in parts.memory.parts()}
    assert expected.weights in remarks["weights"]


def test_activations_of_a_dense_base_are_refused(base: Path) -> None:
    with pytest.raises(WeightsError, match=r"--activations a8.*not quantised"):
        build_engine(EngineConfig(**SMALL, activations=LinearInputs.a8), base, "tiny")


def test_float16_on_the_cpu_is_refused_when_asked_for(base: Path) -> None:
    with pytest.raises(BackendUnavailable, match="float16"):
        build_engine(EngineConfig(**SMALL, dtype="float16"), base, "tiny")


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json is missing"):
        build_engine(EngineConfig(**SMALL), tmp_path, "tiny")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "tpu"),
        ("dtype", "int8"),
        ("quantize", "int3"),
        ("activations", "a4"),
        ("max_model_len", 0),
        ("memory", -1),
        ("max_num_seqs", 0),
        ("token_budget", 0),
        ("num_slots", 0),
        ("host_store_bytes", 0),
        ("max_waiting", 0),
        ("max_waiting_tokens", 0),
        ("memory", 0.0),
        ("memory", 1.5),
        ("loader_threads", 0),
    ],
)
def test_a_config_names_the_wrong_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        EngineConfig(**{field: value})
