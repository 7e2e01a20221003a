"""The folder that stands for a GGUF file: made once, whole, of the file's content and of what lies beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind

from loraplex.server.models.gguf import folder
from loraplex.server.models.gguf.folder import BESIDE, folder_for
from loraplex.server.models.gguf.header import GgufError
from loraplex.server.text.tokenizer import Tokenizer
from tests.support.gguf_files import write_gguf
from tests.support.tiny import make_tiny_tokenizer, tiny_hf_model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return write(tmp_path / "models" / "tiny.Q8_0.gguf")


def write(path: Path, **options: Any) -> Path:
    tokenizer = make_tiny_tokenizer(path.parent.parent / "tokenizer")
    model = tiny_hf_model("llama", intermediate_size=128)
    return write_gguf(model, path, Kind.Q8_0, tokenizer=tokenizer, **options).path


def test_folder_is_made_once_and_whole(file: Path, tmp_path: Path) -> None:
    made = folder_for(file, tmp_path / "cache")
    assert made.parent == tmp_path / "cache" / "gguf"
    assert made.name.startswith("tiny.Q8_0-")
    names = {"config.json", "generation_config.json", "model.gguf"}
    assert {path.name for path in made.iterdir()} == names | {BESIDE[0], BESIDE[1], "chat_template.jinja"}
    assert (made / "model.gguf").readlink() == file
    before = {path.name: path.lstat().st_mtime_ns for path in made.iterdir()}
    assert folder_for(file, tmp_path / "cache") == made
    assert {path.name: path.lstat().st_mtime_ns for path in made.iterdir()} == before
    assert list(made.parent.iterdir()) == [made]


def test_a_relative_path_is_the_same_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert folder_for(Path(file.name), tmp_path / "cache") == folder_for(file, tmp_path / "cache")


def test_other_content_has_another_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    folders = [folder_for(file, cache)]
    write(file, change=lambda writer: writer.add_eot_token_id(3))
    folders.append(folder_for(file, cache))
    (file.parent / "chat_template.jinja").write_text("{{ messages }}")
    folders.append(folder_for(file, cache))
    folders.append(folder_for(Path(file.rename(file.with_name("other.gguf"))), cache))
    monkeypatch.setattr(folder, "LAYOUT", folder.LAYOUT + 1)
    folders.append(folder_for(file.with_name("other.gguf"), cache))
    assert len(set(folders)) == 5
    assert json.loads((folders[1] / "generation_config.json").read_text())["eos_token_id"] == [1, 3]
    assert (folders[2] / "chat_template.jinja").read_text() == "{{ messages }}"


def test_tokenizer_beside_the_file_goes_before_its_own(file: Path, tmp_path: Path) -> None:
    original = Tokenizer.read(folder_for(file, tmp_path / "cache"))
    beside = make_tiny_tokenizer(file.parent)
    settings = json.loads((beside / "tokenizer_config.json").read_text())
    (beside / "chat_template.jinja").unlink(missing_ok=True)
    settings["chat_template"] = "{{ 'of the folder' }}"
    (beside / "tokenizer_config.json").write_text(json.dumps(settings))
    (beside / "generation_config.json").write_text('{"eos_token_id": 2}')
    made = folder_for(file, tmp_path / "cache")
    found = Tokenizer.read(made)
    assert found.template_source == "{{ 'of the folder' }}"
    assert found.encode("the fox") == original.encode("the fox")
    assert json.loads((made / "generation_config.json").read_text()) == {"eos_token_id": 2}
    assert json.loads((made / "config.json").read_text())["eos_token_id"] == 1


def test_a_tokenizer_of_another_vocabulary_is_told(file: Path, tmp_path: Path) -> None:
    """Whoever keeps many files in one folder may have any model's tokenizer.json there."""
    content = json.loads((make_tiny_tokenizer(tmp_path / "other") / "tokenizer.json").read_text())
    content["model"]["vocab"] = {text: (i + 7) % 320 for text, i in content["model"]["vocab"].items()}
    (file.parent / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(GgufError, match=r"tokenizer\.json is not the tokenizer of tiny\.Q8_0\.gguf"):
        folder_for(file, tmp_path / "cache")
    (file.parent / "tokenizer.json").write_text("{}")
    with pytest.raises(GgufError, match=r"tokenizer\.json cannot be read"):
        folder_for(file, tmp_path / "cache")


def test_a_config_beside_the_file_brings_nothing_without_a_tokenizer(file: Path, tmp_path: Path) -> None:
    made = folder_for(file, tmp_path / "cache")
    (file.parent / "tokenizer_config.json").write_text("{}")
    (file.parent / "generation_config.json").write_text("{}")
    assert folder_for(file, tmp_path / "cache") == made


def test_what_cannot_be_served_leaves_nothing(file: Path, tmp_path: Path) -> None:
    bad = write(file.with_name("bad.gguf"), change=lambda writer: writer.add_expert_count(4))
    with pytest.raises(GgufError, match="expert_count"):
        folder_for(bad, tmp_path / "cache")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_a_cache_that_cannot_be_written(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(GgufError, match="LORAPLEX_CACHE"):
        folder_for(file, tmp_path / "cache")


def test_another_process_may_be_first(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    original = os.rename

    def beaten(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        folder_for(file, cache)  # the other one's
        original(self, target)
        return target

    monkeypatch.setattr(Path, "rename", beaten)
    made = folder_for(file, cache)
    assert (made / "config.json").is_file()
    assert list(made.parent.iterdir()) == [made]
