"""The composition root: what it refuses, and what it makes of a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loraplex.kernels.backend import BackendUnavailable
from loraplex.server.engine.arena import NotEnoughMemory
from loraplex.server.engine.build import EngineConfig, build_engine
from loraplex.server.engine.request import FinishReason, GenerationRequest, SamplingParams
from loraplex.server.models.config import UnsupportedModel
from support.tiny import make_tiny_model

SMALL = {"device": "cpu", "memory_bytes": 64 << 20, "max_num_seqs": 4, "token_budget": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(
        "llama", tmp_path_factory.mktemp("base"), generation={"do_sample": True, "temperature": 0.25}
    )


async def test_a_folder_becomes_an_engine(base: Path) -> None:
    parts = build_engine(EngineConfig(**SMALL), base, "tiny")
    assert parts.max_model_len == parts.engine.max_model_len == parts.model_config.max_position == 512
    assert parts.defaults.temperature == 0.25
    assert parts.memory.total_bytes <= 64 << 20
    assert not parts.engine.alive
    parts.engine.start()
    request = GenerationRequest("r", (5, 6, 7), SamplingParams(4, temperature=0.0))
    events = [event async for event in parts.engine.submit(request)]
    assert len(events) == 4
    assert events[-1].finish is FinishReason.LENGTH
    parts.engine.stop()
    parts.adapters.close()


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
    assert parts.dtype == expected
    parts.adapters.close()


def test_too_little_memory_is_refused_before_the_weights_are_read(base: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):  # no weights here
        (tmp_path / name).write_bytes((base / name).read_bytes())
    with pytest.raises(NotEnoughMemory, match=r"976\.6 KiB of memory are too little"):
        build_engine(EngineConfig(**{**SMALL, "memory_bytes": 1_000_000, "max_model_len": 512}), tmp_path, "tiny")


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
        ("max_model_len", 0),
        ("memory_bytes", -1),
        ("max_num_seqs", 0),
        ("token_budget", 0),
        ("num_slots", 0),
        ("host_store_bytes", 0),
        ("max_waiting", 0),
        ("loader_threads", 0),
    ],
)
def test_a_config_names_the_wrong_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        EngineConfig(**{field: value})


def test_policy_and_border_import_no_torch() -> None:
    modules = ("engine", "adapter_manager", "scheduler", "sequence", "kv_cache", "request")
    code = "".join(f"import loraplex.server.engine.{name}\n" for name in modules) + "import sys\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
