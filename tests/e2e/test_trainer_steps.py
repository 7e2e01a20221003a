"""An adapter of one name that a trainer replaces each step, as prime-rl does, under whoever is reading."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.live_server import LiveServer
from tests.support.peft_adapters import ALL, make_peft_adapter
from tests.support.served import greedy


@pytest.fixture(scope="module")
def steps(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What three steps of a training wrote."""
    folder = tmp_path_factory.mktemp("broadcasts")
    return [make_peft_adapter(oracle, folder / f"step_{step}", seed=step, r=4, target_modules=ALL) for step in range(3)]


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/load_lora_adapter"])
@pytest.mark.parametrize("same_folder", [False, True])
def test_the_name_has_the_last_step(
    live: LiveServer, steps: list[Any], tmp_path: Path, path: str, same_folder: bool
) -> None:
    """A stream that began with a step ends with it."""
    name, prompt, streams = f"step-{path.count('/')}-{same_folder}", live.tokenizer.encode("the"), []
    expected = [live.tokenizer.decode(greedy(step.model, prompt, 20)[0]) for step in steps]
    assert len(set(expected)) == len(steps)
    fields: dict[str, Any] = {"prompt": "the", "max_tokens": 20, "temperature": 0, "extra_body": {"ignore_eos": True}}
    for step, text in zip(steps, expected, strict=True):
        folder = shutil.copytree(step.folder, tmp_path / "now", dirs_exist_ok=True) if same_folder else step.folder
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        answer = live.ask("POST", path, json=body)
        assert answer.status_code == 200, answer.text
        assert live.text(name) == text
        stream = iter(live.openai().completions.create(model=name, stream=True, **fields))
        streams.append((next(stream).choices[0].text, stream))
    for text, (begun, stream) in zip(expected, streams, strict=True):
        assert begun + "".join(chunk.choices[0].text for chunk in stream) == text
    body = {"lora_name": name, "lora_path": str(steps[0].folder)}
    assert live.ask("POST", path, json=body).status_code == 400
