"""Write the tokenizer files that a GGUF's metadata stands for: tokenizer.json, its config and the chat template.

A GGUF has the vocabulary, merges or scores, and the name of a rule ("tokenizer.ggml.pre") by which a text is cut before
they apply. The rule itself is in no file: what is not listed here is refused, since a wrong one reads well and gives
other ids (numbers first). Built with the tokenizers library, as a server reads it; transformers is not asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from loraplex.server.models.gguf.header import GgufError, GgufHeader

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

BESIDE = "lay the base's tokenizer.json beside the file"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""GGUF's types of tokens."""

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _LETTERS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _LETTERS + r"|\p{N}" + _REST

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_ENDING, _SLASHES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = "|".join(_WORDS) + r"|\p{N}" + _SLASHES
_GPT4O = "|".join(word + _ENDING for word in _WORDS) + r"|\p{N}{1,3}" + _SLASHES

_SPLITS = {  # tokenizer.ggml.pre: the pattern whose matches are cut out; None: GPT-2's, which tokenizers has built in
    **dict.fromkeys(("gpt-2", "smollm"), None),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
    "gpt-4o": _GPT4O,
}

_DIGITS_FIRST = ("smollm",)
"""Rules that cut at every digit before anything else: "in 24" is "in", " ", "2", "4", never " 24" or " 2"."""

_WHOLE_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Rules under which what is a token as a whole is not merged, and BOS goes in front where no key says otherwise."""


def write_tokenizer(header: GgufHeader, folder: Path) -> None:
    """Write TOKENIZER_FILES into `folder`, the template only where there is one. Raises GgufError, OSError."""
    tokens, types = _vocabulary(header)
    kind = header.text("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(header, tokens)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(header, tokens, types), True
    else:
        raise GgufError(f"{header.file} has the tokenizer {kind!r:.40}; expected 'gpt2' or 'llama'; {BESIDE}")
    special = _special_tokens(header, tokens)
    _add_tokens(tokenizer, tokens, types, special)
    before = special.get("bos") if header.flag("tokenizer.ggml.add_bos_token", adds_bos) else None
    behind = special.get("eos") if header.flag("tokenizer.ggml.add_eos_token", False) else None
    _add_ends(tokenizer, before, behind)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        # The one class name that transformers 4 and 5 both take for "whatever tokenizer.json says".
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": text for role, (_, text) in special.items()},
        "model_max_length": header.whole(f"{header.architecture}.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    if "tokenizer.chat_template" in header.metadata:
        _write(folder / "chat_template.jinja", header.text("tokenizer.chat_template"))


def check_vocabulary(header: GgufHeader, file: Path) -> None:
    """Raise GgufError where the tokenizer.json `file` is not of the vocabulary in the GGUF, where that has one.

    A hundredth of the tokens may be written otherwise: added ones, and those that fill the embedding up.
    """
    tokens = header.entries("tokenizer.ggml.tokens", str)
    if tokens is None:
        return
    try:
        vocab = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise GgufError(f"{file} cannot be read: {error}") from error
    found = {token: text for text, token in vocab.items()}
    others = [i for i, text in enumerate(tokens) if found.get(i, text) != text]
    if 100 * len(others) > len(tokens) or 2 * len(found) < len(tokens):
        example = f": token {others[0]} is {found[others[0]]!r:.40} and {tokens[others[0]]!r:.40}" if others else ""
        raise GgufError(f"{file} is not the tokenizer of {header.file.name} beside it{example}; remove one of them")


def _vocabulary(header: GgufHeader) -> tuple[list[str], list[int]]:
    """Read every token's text and type. Raises GgufError."""
    tokens = header.entries("tokenizer.ggml.tokens", str)
    if not tokens:
        raise GgufError(f"{header.file} has no tokenizer; {BESIDE}")
    if len(set(tokens)) != len(tokens):
        raise GgufError(f"{header.file} has a token twice in its vocabulary; {BESIDE}")
    types = header.entries("tokenizer.ggml.token_type", int) or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise GgufError(f"{header.file} has {len(tokens)} tokens and types for another number of them")
    return tokens, types


def _byte_level(header: GgufHeader, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """Build byte-level BPE; tell whether BOS goes in front unless a key says otherwise."""
    rule = header.text("tokenizer.ggml.pre")
    if rule not in _SPLITS:
        raise GgufError(
            f"{header.file} cuts texts by the rule {rule!r:.40} (tokenizer.ggml.pre), which is not known here; {BESIDE}"
        )
    pattern = _SPLITS[rule]
    merges = _merges(header)
    whole_first = rule in _WHOLE_FIRST
    model = _model(header, models.BPE, vocab=_ids(tokens), merges=merges, ignore_merges=whole_first)
    tokenizer = Tokenizer(model)
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule in _DIGITS_FIRST else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pattern is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, whole_first


def _merges(header: GgufHeader) -> list[tuple[str, str]]:
    merges = header.entries("tokenizer.ggml.merges", str)
    if merges is None:
        raise GgufError(f"{header.file} has no merges for its tokenizer; {BESIDE}")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if not all(len(pair) == 2 for pair in pairs):
        raise GgufError(f"{header.file} has a merge that is not of two tokens")
    return pairs


def _sentencepiece(header: GgufHeader, tokens: list[str], types: list[int]) -> Tokenizer:
    """Build sentencepiece's BPE with byte fallback. What it merges first is the token of the highest score."""
    scores = header.entries("tokenizer.ggml.scores", (int, float))
    if scores is None or len(scores) != len(tokens):
        raise GgufError(f"{header.file} has {len(tokens)} tokens and scores for another number of them")
    gemma = header.architecture.startswith("gemma")
    if gemma:  # it writes tokens of spaces as they are, and orders its merges by id
        tokens[:] = ["\u2581" * len(text) if text and not text.strip(" ") else text for text in tokens]
        scores = [-i for i in range(len(tokens))]
    unknown = next((text for text, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    vocab = _ids(tokens)
    merges = _implied_merges(vocab, scores)
    model = _model(header, models.BPE, vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = header.flag("tokenizer.ggml.add_space_prefix", not gemma)
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    if gemma:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _implied_merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """List every way to make a token of two others, best score first; of one token the longer left part first."""
    found = []
    for text, place in vocab.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[place], -cut, left, right))
    found.sort(key=lambda each: each[:2])
    return [(left, right) for _, _, left, right in found]


def _model(header: GgufHeader, make: Any, **arguments: Any) -> Any:
    try:
        return make(**arguments)
    except Exception as error:  # the library raises bare Exception
        raise GgufError(f"{header.file} has a tokenizer that contradicts itself: {error}") from error


def _special_tokens(header: GgufHeader, tokens: list[str]) -> dict[str, tuple[int, str]]:
    """Map bos, eos, pad and unk, where the file names them, to id and text. Raises GgufError."""
    found = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        key = f"tokenizer.ggml.{name}_token_id"
        if key in header.metadata:
            token = header.whole(key)
            if token >= len(tokens):
                raise GgufError(f"{header.file} has {token} under {key}, and {len(tokens)} tokens")
            found[role] = (token, tokens[token])
    return found


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], special: dict[str, tuple[int, str]]) -> None:
    """Have tokens that are no text found before the vocabulary's rules are asked."""
    named = {text for _, text in special.values()}
    control = [text for text, kind in zip(tokens, types, strict=True) if kind == CONTROL or text in named]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    plain = [text for text, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED and text not in named]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])


def _add_ends(tokenizer: Tokenizer, before: tuple[int, str] | None, behind: tuple[int, str] | None) -> None:
    """Put a token before and one behind every text, where there are such."""
    if before is None and behind is None:
        return
    known = [token for token in (before, behind) if token is not None]
    single, second = (
        [*([f"{before[1]}:{n}"] if before else []), f"{letter}:{n}", *([f"{behind[1]}:{n}"] if behind else [])]
        for n, letter in enumerate(("$A", "$B"))
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, *second], special_tokens=[(text, token) for token, text in dict.fromkeys(known)]
    )


def _ids(tokens: list[str]) -> dict[str, int]:
    return {text: i for i, text in enumerate(tokens)}


def _write(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
