"""Our decoder against transformers' own, fp32, eager attention, on a random tiny model of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.harness import Harness
from tests.support.tiny import FAMILIES, VOCAB_SIZE, load_oracle, make_tiny_model

LENGTH = 41
"""Past every sliding window, longrope's switch and two pages of the tiny models, and no multiple of anything."""

TOLERANCE = 2e-4
"""Logits have a spread of about two; fp32 in another order of summing stays under 2e-5."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: make_tiny_model(family, root / family) for family in FAMILIES}


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(path: Path, ids: list[int]) -> Tensor:
    """transformers' logits [len(ids), vocab], computed in one go by a model that has seen nothing before."""
    with torch.no_grad():
        return load_oracle(path)(torch.tensor([ids])).logits[0].float()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert wanted.std() > 0.5, "the oracle's logits are too flat to tell anything"
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def run_chunks(harness: Harness, ids: list[int], sizes: list[int]) -> Tensor:
    """Logits of a prompt computed in chunks of the given sizes, the last one repeated until the end."""
    sequence = harness.sequence(ids)
    found = []
    while sequence.computed < len(ids):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        found += harness.step([(sequence, min(size, len(ids) - sequence.computed))])
    harness.reset(sequence)
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_prefill(paths: dict[str, Path], family: str) -> None:
    ids = tokens(LENGTH)
    assert_close(run_chunks(Harness(paths[family]), ids, [LENGTH]), expected(paths[family], ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill(paths: dict[str, Path], family: str) -> None:
    ids = tokens(LENGTH)
    harness = Harness(paths[family])
    wanted = expected(paths[family], ids)
    assert_close(run_chunks(harness, ids, [1, 7, 13, 3]), wanted)
    assert_close(run_chunks(harness, ids, [17]), wanted)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phi4mini"])
def test_decode_token_by_token(paths: dict[str, Path], family: str) -> None:
    """Also what is drawn greedily is the same: an engine's loop by hand."""
    harness = Harness(paths[family])
    sequence = harness.sequence(tokens(6))
    logits = [harness.step([(sequence, 6)])[0]]
    while sequence.computed < LENGTH:
        sequence.ids.append(int(logits[-1][-1].argmax()))
        logits += harness.step([(sequence, 1)])
    found, wanted = torch.cat(logits), expected(paths[family], sequence.ids)
    assert_close(found, wanted)
    assert found.argmax(-1).tolist() == wanted.argmax(-1).tolist()


def test_decode_across_the_longrope_switch(paths: dict[str, Path]) -> None:
    """Known tokens decide for all positions; past the switch the sequence is computed anew, as transformers does."""
    harness = Harness(paths["phi4mini"])
    switch = harness.config.rope_switch
    assert switch == 24
    ids = tokens(LENGTH)
    sequence = harness.sequence(ids[:18])
    (logits,) = harness.step([(sequence, 18)])
    assert_close(logits, expected(paths["phi4mini"], ids[:18]))
    for known in range(19, LENGTH + 1):
        sequence.ids.append(ids[known - 1])
        if known == switch + 1:
            harness.reset(sequence)
        (logits,) = harness.step([(sequence, known - sequence.computed)])
        assert_close(logits, expected(paths["phi4mini"], ids[:known])[-len(logits) :])


def test_longrope_on_both_sides_in_one_batch(paths: dict[str, Path]) -> None:
    harness = Harness(paths["phi4mini"])
    lengths = (24, LENGTH, 5, 25)
    prompts = [tokens(length, seed) for seed, length in enumerate(lengths)]
    found = harness.step([(harness.sequence(ids), len(ids)) for ids in prompts])
    for logits, ids in zip(found, prompts, strict=True):
        assert_close(logits, expected(paths["phi4mini"], ids))


@pytest.mark.parametrize("group_size", [None, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch(paths: dict[str, Path], family: str, group_size: int | None) -> None:
    """Sequences of different lengths, prefilling in uneven chunks while others decode; one group of pages or several,
    and pages past a sliding window taken back and handed on."""
    harness = Harness(paths[family], group_size=group_size, free_past_window=group_size is not None, num_pages=80)
    prompts = {length: tokens(length, seed=length) for length in (1, 9, 16, 23, 37)}
    wanted = {length: expected(paths[family], ids) for length, ids in prompts.items()}
    sequences = {length: harness.sequence(ids) for length, ids in prompts.items()}
    found: dict[int, list[Tensor]] = {length: [] for length in prompts}
    chunk = {1: 1, 9: 4, 16: 16, 23: 1, 37: 11}
    while pending := [length for length, s in sequences.items() if s.computed < length]:
        work = [(sequences[n], min(chunk[n], n - sequences[n].computed)) for n in pending]
        for length, logits in zip(pending, harness.step(work), strict=True):
            found[length].append(logits)
    for length in prompts:
        assert_close(torch.cat(found[length]), wanted[length])


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "phi3"])
def test_pages_past_the_window_are_never_read(paths: dict[str, Path], family: str) -> None:
    """With layers of one window in a group, a long sequence holds few pages there: the rest were freed and poisoned."""
    path = paths[family]
    harness = Harness(path, group_size=4, free_past_window=True)
    ids = tokens(100)
    assert_close(run_chunks(harness, ids, [5]), expected(path, ids))
    sequence = harness.sequence(ids)
    for _ in range(20):
        harness.step([(sequence, 5)])
    held = [sum(page >= 0 for page in table) for table in sequence.tables]
    windows = [harness.config.windows[layers[0]] for layers in harness.groups]
    # Of 7 blocks, those are gone whose last token lies before the next query's window, 101 - window .. 100.
    assert held == [7 if window is None else 7 - (101 - window) // 16 for window in windows]
    assert min(held) < 3


def test_only_wanted_rows_reach_the_head(paths: dict[str, Path]) -> None:
    harness = Harness(paths["llama"])
    a, b = harness.sequence(tokens(9, 1)), harness.sequence(tokens(12, 2))
    hidden = harness.decoder.forward(harness.build([(a, 9), (b, 12)], logit_rows=[20, 8]))
    assert hidden.shape == (2, harness.config.hidden_size)
    logits = harness.decoder.logits(hidden)
    assert_close(logits[0], expected(paths["llama"], b.ids)[-1])
    assert_close(logits[1], expected(paths["llama"], a.ids)[-1])


ODD_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "9 heads on 3": ("llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "7 heads on 1": ("llama", {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}),
    "4 heads on 4": ("llama", {"num_key_value_heads": 4}),
    "4 heads on 2": ("llama", {"num_key_value_heads": 2}),
    "4 heads on 1": ("llama", {"num_key_value_heads": 1}),
    "1 head on 1": ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "head_dim 2": ("qwen3", {"head_dim": 2}),
    "head_dim 80": ("qwen3", {"head_dim": 80, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 60}),
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "untied qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "untied gemma2": ("gemma2", {"tie_word_embeddings": False}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "gemma3 with biases": ("gemma3", {"attention_bias": True}),
    "gemma3 with a final cap": ("gemma3", {"final_logit_softcapping": 3.0}),
    "gemma3 ignores the attention cap": ("gemma3", {"attn_logit_softcapping": 3.0}),
    "gemma2 without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3 with windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "window of one": ("mistral", {"sliding_window": 1}),
    "one layer": ("llama", {"num_hidden_layers": 1}),
    "gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "prime vocabulary": ("llama", {"vocab_size": 331}),
    "large eps in llama": ("llama", {"rms_norm_eps": 0.3}),
    "large eps in qwen3": ("qwen3", {"rms_norm_eps": 0.3}),
    "large eps in gemma3": ("gemma3", {"rms_norm_eps": 0.3}),
}


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_odd_shapes(tmp_path: Path, name: str) -> None:
    family, overrides = ODD_SHAPES[name]
    path = make_tiny_model(family, tmp_path, seed=3, **overrides)
    ids = tokens(29)
    assert_close(run_chunks(Harness(path), ids, [11, 1]), expected(path, ids))


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "yarn": (
        "qwen2",
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0**i for i in range(8)],
        },
    ),
}


@pytest.mark.parametrize("length", [7, 16, 17, 40])
@pytest.mark.parametrize("kind", ROPES)
def test_rope_kinds(tmp_path: Path, kind: str, length: int) -> None:
    """Whole prompts up to and past the length where a kind changes (16)."""
    family, rope = ROPES[kind]
    overrides: dict[str, Any] = {"rope_parameters": dict(rope), "max_position_embeddings": 16}
    if kind != "dynamic":
        overrides["max_position_embeddings"] = 64
    if kind == "longrope":
        overrides["original_max_position_embeddings"] = 16
    path = make_tiny_model(family, tmp_path, **overrides)
    ids = tokens(length)
    assert_close(run_chunks(Harness(path), ids, [length]), expected(path, ids))


def test_dynamic_rope_decode_and_batch(tmp_path: Path) -> None:
    """Past max_position each step rotates its own tokens with the base of its length and leaves cached keys alone."""
    path = make_tiny_model("llama", tmp_path, rope_parameters=dict(ROPES["dynamic"][1]), max_position_embeddings=16)
    prompts = [tokens(12, 1), tokens(30, 2)]
    harness = Harness(path)
    sequences = [harness.sequence(ids) for ids in prompts]
    found = [[logits] for logits in harness.step([(s, len(s.ids)) for s in sequences])]
    for step in range(10):
        for sequence in sequences:
            sequence.ids.append(tokens(10, 3)[step])
        for each, logits in zip(found, harness.step([(s, 1) for s in sequences]), strict=True):
            each.append(logits)
    for logits, sequence, prompt in zip(found, sequences, prompts, strict=True):
        assert_close(torch.cat(logits), _cached_decode(path, sequence.ids, len(prompt)))


def _cached_decode(path: Path, ids: list[int], prompt_len: int) -> Tensor:
    """transformers' logits with its own cache: the prompt in one go, then token by token."""
    model = load_oracle(path)
    with torch.no_grad():
        out = model(torch.tensor([ids[:prompt_len]]), use_cache=True)
        logits = [out.logits[0]]
        for token in ids[prompt_len:]:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0])
    return torch.cat(logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi4mini"])
def test_bfloat16_is_as_good_as_transformers(paths: dict[str, Path], family: str) -> None:
    """Rounding differs between the two, the truth does not: our distance from fp32 is not the larger one."""
    ids = tokens(LENGTH)
    truth = expected(paths[family], ids)
    with torch.no_grad():
        theirs = load_oracle(paths[family], torch.bfloat16)(torch.tensor([ids])).logits[0].float()
    ours = run_chunks(Harness(paths[family], dtype=torch.bfloat16), ids, [13])
    error, allowed = (ours - truth).square().mean().sqrt(), (theirs - truth).square().mean().sqrt()
    assert 0 < error < 1.25 * allowed
