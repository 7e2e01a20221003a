"""The tokenizer files beside an adapter, as transformers writes them now and wrote them before, and damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files import tokenizer_files
from loraplex.adapters.files.beneath import opened
from loraplex.adapters.files.tokenizer_files import (
    FILES,
    MAX_CONTAINERS,
    MAX_TEMPLATE,
    MAX_VALUES,
    NOTHING,
    AddedToken,
    TokenizerFiles,
)
from tests.support.tiny import EOS, make_tiny_tokenizer


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    with opened(folder) as place:
        return tokenizer_files.read_tokenizer_files(place)


def stamps(folder: Path) -> tuple[tuple[int, ...], ...]:
    with opened(folder) as place:
        return tokenizer_files.stamps(place)


TEMPLATE = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A tokenizer with a token more, another eos and another template, as transformers saves it."""
    from transformers import AddedToken as HfToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([HfToken("<turn>", special=True), HfToken("plain", lstrip=True, special=False)])
    tokenizer.eos_token = "<turn>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, tokenizer


def test_what_transformers_saves(saved: tuple[Path, Any]) -> None:
    folder, tokenizer = saved
    found = read_tokenizer_files(folder)
    assert found.template == TEMPLATE
    assert dict(found.special)["eos_token"] == tokenizer.eos_token == "<turn>"
    assert dict(found.special)["bos_token"] == tokenizer.bos_token
    expected = {
        AddedToken(i, t.content, t.lstrip, t.rstrip, t.single_word, t.normalized, t.special)
        for i, t in tokenizer.added_tokens_decoder.items()
    }
    assert set(found.added) == expected
    assert [token.id for token in found.added] == sorted(token.id for token in found.added)


def test_the_older_form(saved: tuple[Path, Any]) -> None:
    """As transformers 4 saved it: the tokens in the config and in files of their own, the template in the config."""
    folder, tokenizer = saved
    new = read_tokenizer_files(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "chat_template.jinja").unlink()
    config = {
        "added_tokens_decoder": {str(t.id): {"content": t.text, "lstrip": t.lstrip, "rstrip": t.rstrip,
                                 "single_word": t.single_word, "normalized": t.normalized, "special": t.special}
                                 for t in new.added if t.text != "plain"},
        "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = {"eos_token": {"content": "<turn>", "lstrip": False}, "bos_token": tokenizer.bos_token}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({"plain": tokenizer.convert_tokens_to_ids("plain")}))
    old = read_tokenizer_files(folder)
    assert old.template == TEMPLATE
    assert dict(old.special) == {"eos_token": "<turn>", "bos_token": tokenizer.bos_token}
    assert {(t.id, t.text) for t in old.added} == {(t.id, t.text) for t in new.added}


def test_generation_config_names_eos_ids(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.1}')
    assert read_tokenizer_files(tmp_path) == TokenizerFiles(eos_ids=(2, 7))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert read_tokenizer_files(tmp_path) == TokenizerFiles(eos_ids=(3,))


def test_without_files_there_is_nothing(tmp_path: Path) -> None:
    assert read_tokenizer_files(tmp_path) == NOTHING
    assert NOTHING.mark("abc") == "abc"


def test_the_mark_is_of_the_content(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = saved
    found = read_tokenizer_files(folder)
    copied = shutil.copytree(folder, tmp_path / "copy")
    assert read_tokenizer_files(copied).mark("abc") == found.mark("abc") != "abc"
    assert found.mark("abd") != found.mark("abc")
    (copied / "chat_template.jinja").write_text(TEMPLATE + "!")
    assert read_tokenizer_files(copied).mark("abc") != found.mark("abc")


def test_stamps_tell_of_each_change(tmp_path: Path) -> None:
    seen = {stamps(tmp_path)}
    for name in FILES:
        (tmp_path / name).write_text("{}")
        assert stamps(tmp_path) not in seen
        seen.add(stamps(tmp_path))
    file = tmp_path / FILES[0]
    file.write_text("{ }")
    assert stamps(tmp_path) not in seen
    seen.add(stamps(tmp_path))
    os.utime(file, ns=(1, 1))
    assert stamps(tmp_path) not in seen


VOCABULARY = '"model": {"type": "BPE"}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "\xff"),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": {"content": "a"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"content": ""}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"content": ["a"]}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"eos_token": {"text": "a"}}'),
        ("tokenizer_config.json", '{"a": ' + "[" * 5000 + "]" * 5000 + "}"),
        ("tokenizer_config.json", '{"a": ' + "9" * 5000 + "}"),
        ("added_tokens.json", '{"a": true}'),
        ("added_tokens.json", '{"a": 1e9}'),
        ("generation_config.json", '{"eos_token_id": "2"}'),
        ("generation_config.json", '{"eos_token_id": [true]}'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": [{"id": 1}], ' + VOCABULARY + "}"),
        ("tokenizer.json", '{"added_tokens": [{"id": 99999999999, "content": "a"}], ' + VOCABULARY + "}"),
        ("tokenizer.json", '{"added_tokens": "abc", ' + VOCABULARY + "}"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(AdapterRefused) as caught:
        read_tokenizer_files(tmp_path)
    assert caught.value.code == "bad_file"
    assert name in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"a": "' + "x" * (5 << 20) + '"}'),
        ("tokenizer_config.json", '{"a": [' + "[]," * MAX_CONTAINERS + "1]}"),
        ("added_tokens.json", "{" + ",".join(f'"{i}":{i}' for i in range(MAX_VALUES + 2)) + "}"),
        ("chat_template.jinja", "x" * (MAX_TEMPLATE + 1)),
        ("tokenizer.json", '{"added_tokens": [' + "{}," * MAX_CONTAINERS + "{}], " + VOCABULARY + "}"),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_parsed(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(AdapterRefused) as caught:
        read_tokenizer_files(tmp_path)
    assert caught.value.code in ("too_large", "bad_file")
    assert "at most" in str(caught.value) or "more than" in str(caught.value)


def test_only_the_beginning_of_a_large_vocabulary_is_read(tmp_path: Path) -> None:
    """Behind the added tokens a tokenizer.json may hold anything."""
    entry = '{"id": 5, "content": "<\\"model\\": {>", "special": true}'
    (tmp_path / "tokenizer.json").write_text(
        f'{{"version": "1.0", "added_tokens": [{entry}],\n  {VOCABULARY[:-1]}' + "!" * 9_000_000
    )
    assert read_tokenizer_files(tmp_path).added == (AddedToken(5, '<"model": {>'),)


def test_a_token_of_the_base_may_be_among_them(base: Path) -> None:
    assert EOS in {token.text for token in read_tokenizer_files(base).added}
