"""Asking transformers in a process of its own is asking transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex.server.models.config import SUPPORTED, ModelConfig
from loraplex.server.models.normalise import normalise
from tests.support.tiny import make_tiny_model


@pytest.mark.parametrize("family", ["llama3", "gemma3", "phi4mini"])
def test_the_answer_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    raw = json.loads((make_tiny_model(family, tmp_path) / "config.json").read_text())
    model_type = SUPPORTED[raw["architectures"][0]]
    here = normalise(raw, model_type)
    monkeypatch.delitem(sys.modules, "transformers")
    assert normalise(raw, model_type) == json.loads(json.dumps(here))


def test_and_so_is_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"rope_parameters": {"rope_type": "no such rope"}, "hidden_size": "wide"}
    with pytest.raises(Exception, match="hidden_size") as here:
        normalise(raw, "llama")
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(ValueError, match="hidden_size") as there:
        normalise(raw, "llama")
    assert str(there.value) == " ".join(str(here.value).split())


def test_a_process_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="could not be asked"):
        normalise({}, "llama")


def test_a_server_does_not_load_it(tmp_path: Path) -> None:
    """It would be a third of the process's memory."""
    path = make_tiny_model("llama", tmp_path)
    script = f"""
import sys
from loraplex.server.models.config import ModelConfig
config = ModelConfig.from_hf({str(path)!r})
assert "transformers" not in sys.modules
print(config.hidden_size)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == ModelConfig.from_hf(path).hidden_size
