"""generation_config.json as authors write it, and where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.text.generation_defaults import GenerationConfigError, GenerationDefaults
from tests.support.tiny import make_tiny_model


def write(folder: Path, fields: dict[str, Any], name: str = "config.json") -> None:
    (folder / name).write_text(json.dumps(fields))


def test_generation_defaults(tmp_path: Path) -> None:
    write(tmp_path, {"eos_token_id": 2})
    assert GenerationDefaults.from_hf(tmp_path) == GenerationDefaults((2,))
    said = {"eos_token_id": [5, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0}
    write(tmp_path, {**said, "repetition_penalty": 1.1, "max_length": 4096}, "generation_config.json")
    assert GenerationDefaults.from_hf(tmp_path) == GenerationDefaults((5, 7), 0.6, 0.9, 20, 0.0, 1.1)
    write(tmp_path, {"temperature": 1, "top_p": None}, "generation_config.json")
    assert GenerationDefaults.from_hf(tmp_path) == GenerationDefaults((2,), 1.0)
    write(tmp_path, {"eos_token_id": [3, 4]})
    assert GenerationDefaults.from_hf(tmp_path).eos_token_ids == (3, 4)
    write(tmp_path, {})
    assert GenerationDefaults.from_hf(tmp_path).eos_token_ids == ()


def test_generation_defaults_as_transformers_writes_them(tmp_path: Path) -> None:
    path = make_tiny_model("llama3", tmp_path, generation={"do_sample": True, "temperature": 0.7, "top_k": 5})
    assert GenerationDefaults.from_hf(path) == GenerationDefaults((1, 3), temperature=0.7, top_k=5)


@pytest.mark.parametrize("fields", [{"temperature": "hot"}, {"eos_token_id": "</s>"}, {"top_k": True}])
def test_damaged_generation_defaults(tmp_path: Path, fields: dict[str, Any]) -> None:
    write(tmp_path, {})
    write(tmp_path, fields, "generation_config.json")
    with pytest.raises(GenerationConfigError, match=next(iter(fields))):
        GenerationDefaults.from_hf(tmp_path)
