"""An adapter's tokenizer against the one transformers makes of the adapter's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.adapters.files.tokenizer_files import NOTHING, AddedToken, TokenizerFiles
from loraplex.adapters.format.adapter_files import read_tokenizer
from loraplex.server.text.chat_template import ChatTemplateError
from loraplex.server.text.tokenizer import Tokenizer
from loraplex.server.text.tokenizers import MAX_CHANGED, Difference, Tokenizers, TokenizersDiffer
from tests.support.refusals import refused
from tests.support.tiny import BOS, EOS, IM_END, VOCAB_SIZE, make_tiny_tokenizer

ROWS = VOCAB_SIZE + 8
TEMPLATE = "{{ bos_token }}{% for m in messages %}<turn>{{ m.content }}{{ eos_token }}{% endfor %}"
CONVERSATION = [{"role": "user", "content": "the answer <turn> é"}, {"role": "assistant", "content": " ok"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> Iterator[Tokenizers]:
    made = Tokenizers(Tokenizer.read(folder), ROWS, (1,))
    yield made
    made.close()


Change = Callable[[Any], None]


@pytest.fixture
def save(folder: Path, tmp_path: Path) -> Callable[..., tuple[TokenizerFiles, Any]]:
    """Saves a changed tokenizer by transformers; what its files say, and transformers' reading of them."""
    from transformers import AutoTokenizer

    def make(change: Change, name: str = "adapter") -> tuple[TokenizerFiles, Any]:
        changed = AutoTokenizer.from_pretrained(folder)
        change(changed)
        changed.save_pretrained(tmp_path / name)
        return read_tokenizer(tmp_path / name), AutoTokenizer.from_pretrained(tmp_path / name)

    return make


def _add_tokens(tokenizer: Any) -> None:
    from transformers import AddedToken as HfToken

    tokenizer.add_tokens(
        [HfToken("<turn>", special=True), HfToken("<call>", special=False), HfToken("fox", lstrip=True, special=False)]
    )
    tokenizer.eos_token = "<turn>"
    tokenizer.chat_template = TEMPLATE


@pytest.mark.parametrize(
    "text",
    ["a <turn>b", "<call>{}</call>", "the quick  fox jumps", "<turn><turn>", f"x{IM_END}<call> {EOS}", "", "plain é😀"],
)
def test_added_tokens_are_encoded_and_decoded_as_transformers_does(
    tokenizers: Tokenizers, save: Callable[..., tuple[TokenizerFiles, Any]], text: str
) -> None:
    files, oracle = save(_add_tokens)
    ours = tokenizers.of([files])
    ids = oracle(text)["input_ids"]
    assert ours.encode(text) == ids
    spans = oracle(text, return_offsets_mapping=True)["offset_mapping"]
    expected = list(zip(ids, oracle.convert_ids_to_tokens(ids), spans, strict=True))
    assert [(token, written, (start, stop)) for token, written, start, stop in ours.encode_offsets(text)] == expected
    for skip in (True, False):
        assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_the_template_and_the_end_are_the_adapters(
    tokenizers: Tokenizers, save: Callable[..., tuple[TokenizerFiles, Any]]
) -> None:
    files, oracle = save(_add_tokens)
    ours = tokenizers.of([files])
    assert ours.render_chat(CONVERSATION, False) == oracle.apply_chat_template(CONVERSATION, tokenize=False)
    assert ours.chat(CONVERSATION, False) == oracle.apply_chat_template(CONVERSATION)["input_ids"]
    assert ours.eos_ids == (oracle.eos_token_id,)
    assert ours.is_special(oracle.eos_token_id)
    assert ours.token_id("<call>") == oracle.convert_tokens_to_ids("<call>")
    assert not ours.is_special(oracle.convert_tokens_to_ids("<call>"))
    difference = tokenizers.difference(files)
    assert difference.template
    assert difference.eos == ("<turn>",)
    assert {token.text for token in difference.added} == {"<turn>", "<call>", "fox"}
    assert "chat template of its own" in str(difference)


def test_a_reserved_token_under_another_name(tokenizers: Tokenizers, folder: Path, tmp_path: Path) -> None:
    """As axolotl and unsloth give the base's reserved tokens names: the id stays, the text is another."""
    from transformers import AutoTokenizer

    target = shutil.copytree(folder, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (target / name).read_text().replace(IM_END, "<|done|>")
        (target / name).write_text(text)
    files, oracle = read_tokenizer(target), AutoTokenizer.from_pretrained(target)
    tokenizers.check(files)
    ours = tokenizers.of([files])
    text = f"rest <|done|> and {IM_END} the end"
    assert ours.encode(text) == oracle(text)["input_ids"]
    done = oracle.convert_tokens_to_ids("<|done|>")
    assert done < VOCAB_SIZE
    assert ours.token_id("<|done|>") == done
    assert ours.token_text(done) == "<|done|>"
    ids = oracle(text)["input_ids"]
    assert ours.decode(ids, False) == oracle.decode(ids)
    assert ours.decode(ids, True) == oracle.decode(ids, skip_special_tokens=True)
    assert ours.lone_text(done) is None
    assert ours.chat(CONVERSATION) == oracle.apply_chat_template(CONVERSATION, add_generation_prompt=True)["input_ids"]


def test_files_like_the_bases_change_nothing(
    tokenizers: Tokenizers, save: Callable[..., tuple[TokenizerFiles, Any]]
) -> None:
    files, _ = save(lambda tokenizer: None)
    assert files != NOTHING
    assert tokenizers.difference(files) == Difference()
    assert tokenizers.of([files]) is tokenizers.of([]) is tokenizers.of([NOTHING]) is tokenizers.base


def test_a_token_for_padding_needs_no_row(
    tokenizers: Tokenizers, save: Callable[..., tuple[TokenizerFiles, Any]]
) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.add_tokens([f"<extra{i}>" for i in range(8)])
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    files, _ = save(change)
    assert max(token.id for token in files.added) == ROWS
    tokenizers.check(files)
    assert "[PAD]" not in {token.text for token in tokenizers.difference(files).added}


def test_tokens_without_rows_are_refused(
    tokenizers: Tokenizers, save: Callable[..., tuple[TokenizerFiles, Any]]
) -> None:
    files, _ = save(lambda tokenizer: tokenizer.add_tokens([f"<extra{i}>" for i in range(9)]))
    with refused("unsupported_option", r"<extra8>.*rows for the ids 0 to"):
        tokenizers.check(files)


@pytest.mark.parametrize(
    ("files", "code", "told"),
    [
        (TokenizerFiles(special=(("eos_token", "<nobody>"),)), "unsupported_option", "eos_token"),
        (TokenizerFiles(eos_ids=(ROWS,)), "unsupported_option", "eos_token_id"),
        (TokenizerFiles(added=tuple(AddedToken(5, f"<{i}>") for i in range(MAX_CHANGED + 1))), "too_large", "added"),
    ],
)
def test_what_else_cannot_be(tokenizers: Tokenizers, files: TokenizerFiles, code: str, told: str) -> None:
    with refused(code, told):
        tokenizers.check(files)


def test_a_mix_of_one_template_has_it(tokenizers: Tokenizers) -> None:
    one = TokenizerFiles(template=TEMPLATE, added=(AddedToken(VOCAB_SIZE, "<turn>"),))
    other = replace(one, added=(AddedToken(VOCAB_SIZE + 1, "<else>"),), eos_ids=(5,))
    both = tokenizers.of([one, other])
    assert both.render_chat(CONVERSATION, False) == tokenizers.of([one]).render_chat(CONVERSATION, False)
    assert both.encode("<turn><else>", False) == [VOCAB_SIZE, VOCAB_SIZE + 1]
    assert both.eos_ids == (5,)


def test_a_mix_of_several_templates_has_none(tokenizers: Tokenizers) -> None:
    one = TokenizerFiles(template=TEMPLATE)
    for other in (NOTHING, TokenizerFiles(template="{{ messages }}")):
        mixed = tokenizers.of([one, other])
        assert mixed.encode("the end") == tokenizers.base.encode("the end")
        with pytest.raises(ChatTemplateError, match="different chat templates"):
            mixed.render_chat(CONVERSATION)


def test_a_mix_with_one_text_as_two_tokens_is_refused(tokenizers: Tokenizers) -> None:
    one, other = (TokenizerFiles(added=(AddedToken(VOCAB_SIZE + i, "<turn>"),)) for i in range(2))
    with pytest.raises(TokenizersDiffer, match="<turn>"):
        tokenizers.of([one, other])


def test_an_adapter_brings_a_template_where_the_base_has_none(folder: Path) -> None:
    base = Tokenizer.read(folder)
    bare = Tokenizer(base.fast, base.special_tokens, ChatTemplateError("none"))
    tokenizers = Tokenizers(bare, ROWS, (1,))
    try:
        assert not tokenizers.of([NOTHING]).has_chat_template
        with_one = tokenizers.of([TokenizerFiles(template="{{ bos_token }}{{ messages[0].content }}")])
        assert with_one.render_chat(CONVERSATION) == BOS + CONVERSATION[0]["content"]
    finally:
        tokenizers.close()


@given(
    texts=st.lists(st.sampled_from(["<turn>", "<|done|>", "the", " ", "é", EOS, IM_END, "fox", "<"]), max_size=12),
    ids=st.permutations([VOCAB_SIZE, VOCAB_SIZE + 3, 7, 3]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_ids_are_those_the_files_name(tokenizers: Tokenizers, texts: list[str], ids: list[int]) -> None:
    """Whatever ids the tokens have: a text without them has the base's ids, and each of them has its own."""
    names = ("<turn>", "<|done|>", "<a>", "<b>")
    added = tuple(AddedToken(i, text) for i, text in zip(ids, names, strict=True))
    ours, base = tokenizers.of([TokenizerFiles(added=added)]), tokenizers.base
    wanted = dict(zip(names, ids, strict=True))
    expected: list[int] = []
    run = ""
    for text in [*texts, None]:
        if text is None or text in wanted:
            expected += base.encode(run, False)
            run = ""
            expected += [wanted[text]] if text is not None else []
        else:
            run += text
    hidden = any(base.token_text(i) in texts for i in ids if i < VOCAB_SIZE)  # a token that lost its name
    if not hidden:
        assert ours.encode("".join(texts), False) == expected
        assert ours.decode(expected, False) == "".join(texts)
