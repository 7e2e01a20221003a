"""LoRA, (IA)^3 and prefix tuning of `adapters`, converted, below the API; the library's own logits were recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.server.command.convert import convert_folder
from loraplex.server.config_engine import EngineConfig
from loraplex.server.engine.request import GenerationRequest, SamplingParams, TokenEvent
from tests.adapters.format.record_adapters import CASES, VECTORS
from tests.adapters.format.record_bottlenecks import IDS
from tests.support.converted import as_saved, recorded, recorded_base
from tests.support.refusals import refused
from tests.support.tiny import make_tiny_model
from tests.support.whole_engine import whole_engine

CONFIG = EngineConfig(
    device="cpu", dtype="float32", max_model_len=128, max_num_seqs=16, token_budget=64, memory=1 << 28
)

CLOSE = 1e-4
"""Of log-probabilities in fp32."""


def save_as_the_library(case: str, folder: Path) -> Path:
    config, tensors = recorded(VECTORS, case)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(as_saved(tensors), folder / "pytorch_adapter.bin")
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: make_tiny_model(family, folder / family) for family, *_ in CASES.values()}


@pytest.mark.parametrize("family", sorted({family for family, *_ in CASES.values()}))
async def test_answers_are_the_librarys(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Log-probabilities of the prompt's tokens, and greedy tokens behind it."""
    cases = [case for case, (of, *_) in CASES.items() if of == family]
    for case in cases:
        convert_folder(save_as_the_library(case, tmp_path / f"saved {case}"), tmp_path / case, base=bases[family])
    folders = {f"case-{number}": tmp_path / case for number, case in enumerate(cases)}
    async with whole_engine(bases[family], CONFIG, folders) as parts:
        for name, case in zip(folders, cases, strict=True):
            wanted = recorded(VECTORS, case)[1]
            greedy = wanted["greedy"].tolist()
            params = SamplingParams(len(greedy), temperature=0.0, prompt_logprobs=0)
            lease = parts.adapters.registry.lease(name)
            request = GenerationRequest(case, tuple(IDS), params, ((lease, 1.0),))
            events: list[TokenEvent] = [event async for event in parts.engine.submit(request)]
            lease.release()
            assert [event.token_id for event in events if event.token_id is not None] == greedy, case
            found = next(event.prompt_logprobs for event in events if event.prompt_logprobs is not None)
            scores = wanted["logits"].log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
            assert found.logprobs.tolist() == pytest.approx(scores.tolist(), abs=CLOSE), case


def test_each_moves_what_is_answered() -> None:
    for case, (family, *_) in CASES.items():
        base = recorded(VECTORS, case)[1]["logits"] - recorded_base(VECTORS, family)
        assert float(base.abs().max()) > 0.3, case


@pytest.mark.parametrize(
    ("case", "change", "code", "pattern"),
    [
        ("LoRA", {"use_dora": True}, "unsupported_option", "use_dora"),
        ("LoRA", {"use_gating": True}, "unsupported_option", "use_gating"),
        ("LoRA", {"vera_d": 0.1}, "unsupported_option", "vera_d"),
        ("LoRA", {"r": 0}, "unsupported_option", "expected numbers"),
        ("LoRA", {"r": 2000}, "too_large", "2000"),
        ("LoRA", {"composition_mode": "scale"}, "unmatched_tensor", "lora_A"),
        ("prefix", {"use_gating": True}, "unsupported_option", "use_gating"),
        ("prefix", {"leave_out": [0]}, "unsupported_option", "leave_out"),
        ("prefix", {"prefix_length": None}, "unsupported_option", "prefix_length"),
        ("prefix", {"flat": True}, "missing_tensor", "control_trans"),
        ("prefix, flat", {"flat": False}, "missing_tensor", "wte.weight"),
    ],
)
def test_what_is_not_converted(
    bases: dict[str, Path], tmp_path: Path, case: str, change: dict[str, Any], code: str, pattern: str
) -> None:
    folder = save_as_the_library(case, tmp_path / "saved")
    config, _ = recorded(VECTORS, case)
    config["config"].update(change)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with refused(code, pattern):
        convert_folder(folder, tmp_path / "served", base=bases["llama_biased"])
    assert not (tmp_path / "served").exists()


def test_a_prefix_needs_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = save_as_the_library("prefix", tmp_path / "saved")
    with refused("needs_setting", "--base"):
        convert_folder(folder, tmp_path / "served")
    with refused("unsupported_option", "sliding window"):
        convert_folder(folder, tmp_path / "served", base=bases["mistral"])
    with refused("shape_mismatch", "values for each token"):
        convert_folder(folder, tmp_path / "served", base=bases["qwen2"])


def test_a_layers_copy_of_a_prefix_that_is_another(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = save_as_the_library("prefix, flat", tmp_path / "saved")
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    tensors[min(tensors)] += 1
    torch.save(tensors, folder / "pytorch_adapter.bin")
    with refused("unmatched_tensor", "copies"):
        convert_folder(folder, tmp_path / "served", base=bases["llama_biased"])
