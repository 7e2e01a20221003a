"""The config that a GGUF's metadata stands for, against the one that it was made of, and metadata that is refused."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind

from loraplex.server.models.config import ModelConfig, UnsupportedModel
from loraplex.server.models.gguf.config import config_json, generation_json, rope_factors
from loraplex.server.models.gguf.folder import folder_for
from loraplex.server.models.gguf.header import GgufError, GgufHeader, StoredBlocks, read_header
from loraplex.server.models.gguf.tokenizer import write_tokenizer
from tests.support.gguf_files import rope_tensors, write_gguf
from tests.support.tiny import make_tiny_tokenizer, tiny_hf_model

LLAMA31 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"factor": 32.0, "original_max_position_embeddings": 8192}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3": {},
    "tinyllama": {"hidden_size": 512, "max_position_embeddings": 131072, "rope_parameters": LLAMA31},
    "llama_biased": {},
    "smollm2": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3": {"query_pre_attn_scalar": 24},
    "phi3": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_config_is_the_one_the_file_was_made_of(family: str, tmp_path: Path) -> None:
    model = tiny_hf_model(family, **FAMILIES[family])
    tokenizer, extra = make_tiny_tokenizer(tmp_path / "tokenizer"), rope_tensors(model)
    written = write_gguf(model, tmp_path / "tiny.gguf", Kind.F32, tokenizer=tokenizer, extra=extra)
    model.save_pretrained(tmp_path / "original")
    found = ModelConfig.from_hf(folder_for(written.path, tmp_path / "cache"))
    assert found == ModelConfig.from_hf(tmp_path / "original")


def header_of(arch: str, layers: int = 4, tensors: tuple[StoredBlocks, ...] = (), **changes: Any) -> GgufHeader:
    """A header whose keys are `changes`, where "__" stands for a dot, over sound ones."""
    fields: dict[str, Any] = {
        "block_count": layers,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": 8,
    }
    metadata = {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in fields.items()}}
    for key, value in changes.items():
        name = key.replace("__", ".")
        metadata[name if name.startswith(("general.", "tokenizer.", "split.")) else f"{arch}.{name}"] = value
    embedding = StoredBlocks("token_embd.weight", (320, 64), 0, 0)
    rest = tuple(StoredBlocks(f"blk.{i}.ffn_norm.weight", (64,), 0, 0) for i in range(layers - 1))
    sound = {key: value for key, value in metadata.items() if value is not None}
    return GgufHeader(Path("x.gguf"), 0, 0, sound, (embedding, *rest, *tensors))


@pytest.mark.parametrize(("arch", "layers", "scale"), [("gemma2", 46, 16), ("gemma3", 62, 16), ("gemma2", 42, 32)])
def test_gemmas_of_27b_scale_by_the_share_of_a_head(arch: str, layers: int, scale: int) -> None:
    found = config_json(header_of(arch, layers, attention__key_length=32, attention__value_length=32))
    assert found["query_pre_attn_scalar"] == scale


@pytest.mark.parametrize(("arch", "full"), [("gemma2", (1, 3, 5, 7, 9, 11)), ("gemma3", (5, 11))])
def test_windows_have_the_pattern_of_the_family(arch: str, full: tuple[int, ...]) -> None:
    from transformers import Gemma2Config, Gemma3TextConfig

    oracle = {"gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}[arch](num_hidden_layers=12)
    found = config_json(header_of(arch, 12))["layer_types"]
    assert found == oracle.layer_types
    assert tuple(i for i, kind in enumerate(found) if kind == "full_attention") == full
    every = config_json(header_of(arch, 4, attention__sliding_window_pattern=[False, True, True, False]))
    assert [kind == "sliding_attention" for kind in every["layer_types"]] == [False, True, True, False]


def test_what_is_computed_in_is_what_the_linears_are() -> None:
    for number, dtype in ((0, "float32"), (1, "float16"), (30, "bfloat16"), (8, "bfloat16"), (12, "bfloat16")):
        linear = StoredBlocks("blk.0.attn_output.weight", (64, 64), number, 0)
        assert config_json(header_of("llama", tensors=(linear,)))["torch_dtype"] == dtype


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"arch": "mamba"}, "architecture 'mamba'; supported: llama, qwen2"),
    "a mixture of experts": ({"expert_count": 8}, r"llama\.expert_count 8"),
    "Granite's scale": ({"attention__scale": 0.015}, r"llama\.attention\.scale"),
    "a part of a model": ({"split__count": 3}, "one of 3 files"),
    "an adapter": ({"general__type": "adapter"}, "kind 'adapter'"),
    "no layers said": ({"block_count": None}, r"nothing under llama\.block_count"),
    "layers that are not there": ({"block_count": 1 << 39}, "549755813888 under llama.block_count, and 4 tensors"),
    "layers in words": ({"block_count": "many"}, r"'many' under llama\.block_count"),
    "a number too large": ({"context_length": 1 << 62}, r"llama\.context_length"),
    "heads that differ": (
        {"attention__head_count_kv": [4, 2, 4, 4]},
        r"4 values under .*\.head_count_kv",
    ),
    "no heads": ({"attention__head_count": 0}, "no attention heads"),
    "values of another length": ({"attention__key_length": 16, "attention__value_length": 8}, "another length"),
    "an epsilon that is none": ({"attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon"),
    "a part of a head": ({"rope__dimension_count": 8}, "rotates 8 of 16"),
    "an unknown scaling": ({"rope__scaling__type": "ntk", "rope__scaling__factor": 2.0}, "rope scaling 'ntk'"),
    "yarn of another scale": (
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0, "rope__scaling__attn_factor": 0.5},
        "rope scaling 'yarn'",
    ),
    "a scaling without a factor": ({"rope__scaling__type": "linear"}, r"nothing under llama\.rope\.scaling\.factor"),
    "no window": ({"arch": "gemma2", "attention__sliding_window": None}, "sliding_window"),
    "a window of nothing": ({"arch": "gemma3", "attention__sliding_window": 0}, "0 under gemma3.attention.sliding"),
    "a pattern of other layers": (
        {"arch": "gemma3", "attention__sliding_window_pattern": [True]},
        "sliding_window_pattern",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_metadata_that_cannot_be_served(case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(GgufError, match=words) as told:
        config_json(header_of(**{"arch": "llama", **changes}))
    assert "x.gguf" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_file_without_an_embedding_is_refused() -> None:
    with pytest.raises(GgufError, match="token_embd"):
        config_json(replace(header_of("llama"), tensors=()))


def test_what_the_metadata_contradicts_itself_in_is_told_by_the_parser(tmp_path: Path) -> None:
    written = write_gguf(
        tiny_hf_model("llama"),
        tmp_path / "tiny.gguf",
        Kind.F32,
        tokenizer=make_tiny_tokenizer(tmp_path / "tokenizer"),
        change=lambda writer: writer.kv_data[0].pop("llama.attention.head_count_kv") and writer.add_head_count_kv(3),
    )
    with pytest.raises(UnsupportedModel, match="do not divide"):
        ModelConfig.from_hf(folder_for(written.path, tmp_path / "cache"))


def test_rope_factors_that_are_damaged(tmp_path: Path) -> None:
    model = tiny_hf_model("llama")
    tokenizer = make_tiny_tokenizer(tmp_path / "tokenizer")
    for name, values in {"zero": [0.0] * 8, "nan": [float("nan")] * 8, "inf": [float("inf")] * 8}.items():
        extra = {"rope_freqs.weight": values}
        written = write_gguf(model, tmp_path / f"{name}.gguf", Kind.F32, tokenizer=tokenizer, extra=extra)
        with pytest.raises(GgufError, match=r"rope_freqs\.weight.*damaged"):
            config_json(read_header(written.path))
    for name, values in {"ones": [1.0] * 8, "any": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 8.0]}.items():
        extra = {"rope_freqs.weight": values}
        written = write_gguf(model, tmp_path / f"{name}.gguf", Kind.F32, tokenizer=tokenizer, extra=extra)
        with pytest.raises(GgufError, match="not Llama 3"):
            config_json(read_header(written.path))
    end = tmp_path / "end"
    end.write_bytes(struct.pack("<2f", 1, 2))
    stored = (StoredBlocks("rope_freqs.weight", (4,), 0, 0),)
    with pytest.raises(GgufError, match="damaged"):
        rope_factors(replace(header_of("llama", tensors=stored), file=end), "rope_freqs.weight")
    with pytest.raises(GgufError, match="F32 vector"):
        rope_factors(header_of("llama", tensors=(replace(stored[0], shape=(2, 2)),)), "rope_freqs.weight")


def test_answers_end_with_every_token_that_ends_turns() -> None:
    tokens = {"tokenizer__ggml__tokens": ["a", "<|im_end|>", "<|eot_id|>", "</s>", "<|end|>"]}
    types = {"tokenizer__ggml__token_type": [1, 3, 3, 3, 1]}
    found = generation_json(header_of("llama", tokenizer__ggml__eos_token_id=3, **tokens, **types))
    assert found["eos_token_id"] == [3, 1, 2]
    eot = generation_json(header_of("llama", tokenizer__ggml__eos_token_id=3, tokenizer__ggml__eot_token_id=0))
    assert eot["eos_token_id"] == [3, 0]
    assert "eos_token_id" not in generation_json(header_of("llama"))


def test_sampling_that_the_file_asks_for() -> None:
    asked = {"general__sampling__temp": 0.6, "general__sampling__top_k": 20, "general__sampling__top_p": 0.95}
    found = generation_json(header_of("llama", **asked))
    assert found == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}


WRONG: tuple[Any, ...] = (
    "text",
    "",
    -1,
    0,
    1 << 39,
    1 << 63,
    0.5,
    float("nan"),
    float("inf"),
    True,
    [],
    [1, 2],
    ["a"],
    [0.5] * 320,
)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi4mini"])
def test_any_value_of_any_key_is_read_or_told(family: str, tmp_path: Path) -> None:
    """By one error with one line, whatever kind of value stands where, and in bounded memory."""
    model = tiny_hf_model(family)
    extra = rope_tensors(model)
    tokenizer = make_tiny_tokenizer(tmp_path / "tokenizer")
    header = read_header(write_gguf(model, tmp_path / "x.gguf", Kind.F32, tokenizer=tokenizer, extra=extra).path)
    told, read = [], 0
    for key in header.metadata:
        for value in (*WRONG, None):
            metadata = {name: old for name, old in {**header.metadata, key: value}.items() if old is not None}
            try:
                config_json(changed := replace(header, metadata=metadata))
                generation_json(changed)
                write_tokenizer(changed, tmp_path)
                read += 1
            except GgufError as error:
                told.append(str(error))
    assert read > 30
    assert len(told) > 100
    assert not [line for line in told if "\n" in line or len(line) > 500]
