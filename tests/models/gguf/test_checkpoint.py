"""Tensors of GGUF files by their checkpoint's names and in its order, and files that are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from loraplex.kernels.quantized import QuantizedWeight, dequantize
from loraplex.server.models.checkpoint import WeightsError
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.gguf.checkpoint import GgufCheckpoint
from loraplex.server.models.gguf.folder import folder_for
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.weight_sizes import check_tensors
from tests.support.gguf_files import WrittenGguf, finish, write_gguf
from tests.support.tiny import make_tiny_tokenizer, tiny_hf_model

FAMILIES = {
    "llama": ({"intermediate_size": 128}, Kind.Q5_1),
    "llama_biased": ({"intermediate_size": 128}, Kind.F16),
    "qwen3": ({"intermediate_size": 128}, Kind.Q8_0),
    "gemma3": ({"head_dim": 32, "intermediate_size": 128}, Kind.Q4_0),
    "phi3": ({"intermediate_size": 128}, Kind.BF16),
}


def write(folder: Path, family: str = "llama", **options: Any) -> WrittenGguf:
    fields, kind = FAMILIES[family]
    tokenizer = make_tiny_tokenizer(folder / "tokenizer")
    return write_gguf(tiny_hf_model(family, **fields), folder / "tiny.gguf", kind, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_the_models(family: str, tmp_path: Path) -> None:
    written = write(tmp_path, family)
    checkpoint = GgufCheckpoint(written.path)
    expected = dict(written.model.state_dict())
    if written.model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert set(checkpoint.tensors) == set(expected)
    for name, wanted in expected.items():
        found, stored = checkpoint.read(name), checkpoint.tensors[name]
        assert stored.shape == tuple(wanted.shape), name
        if isinstance(found, QuantizedWeight):
            assert found.format == stored.format
            assert torch.equal(dequantize(found), wanted), name
        else:
            assert stored.format is None
            assert found.dtype.itemsize == stored.element_bytes
            atol = 2e-7 if "norm" in name and family == "gemma3" else 0  # 1 + w is rounded in the file
            torch.testing.assert_close(found.float(), wanted, atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_transformers_reads(family: str, tmp_path: Path) -> None:
    """From the same file, with its own undoing of the rotation's order and of Gemma's norms."""
    from transformers import AutoModelForCausalLM

    written = write(tmp_path, family)
    config = written.model.config  # what transformers reads of a GGUF's metadata leaves head_dim and biases out
    source, name = str(tmp_path), written.path.name
    oracle = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32, config=config)
    checkpoint = GgufCheckpoint(written.path)
    for name, wanted in oracle.state_dict().items():
        if name in checkpoint.tensors:
            found = checkpoint.read(name)
            values = dequantize(found) if isinstance(found, QuantizedWeight) else found.float()
            assert torch.equal(values, wanted), name
    assert set(checkpoint.tensors) <= set(oracle.state_dict())


def test_checkpoint_is_chosen_by_what_is_there(tmp_path: Path) -> None:
    written = write(tmp_path)
    folder = folder_for(written.path, tmp_path / "cache")
    for path in (written.path, folder):
        checkpoint = open_checkpoint(path)
        assert isinstance(checkpoint, GgufCheckpoint)
        check_tensors(checkpoint, ModelConfig.from_hf(folder))


def test_reading_takes_nothing_of_the_file_along(tmp_path: Path) -> None:
    """What was read stays as it is, whatever becomes of the file."""
    written = write(tmp_path)
    checkpoint = GgufCheckpoint(written.path)
    found = checkpoint.read("model.layers.0.mlp.up_proj.weight")
    before = dequantize(found) if isinstance(found, QuantizedWeight) else found.clone()
    written.path.write_bytes(bytes(written.path.stat().st_size))
    after = dequantize(found) if isinstance(found, QuantizedWeight) else found
    assert torch.equal(before, after)


# ---- files that are refused -----------------------------------------------------------------------------------------

WIDTH = 64

Tensors = dict[str, tuple[np.ndarray, Kind]]


def sound() -> Tensors:
    """The tensors of a Llama of one layer, two heads of 32, fp32 and Q8_0."""
    matrix, vector = np.zeros((WIDTH, WIDTH // 32 * 34), np.uint8), np.zeros(WIDTH, np.float32)
    layer = {f"blk.0.{name}.weight": (matrix, Kind.Q8_0) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    layer |= {f"blk.0.ffn_{name}.weight": (matrix, Kind.Q8_0) for name in ("gate", "up", "down")}
    layer |= {f"blk.0.{name}.weight": (vector, Kind.F32) for name in ("attn_norm", "ffn_norm")}
    ends = {"token_embd.weight": (matrix, Kind.Q8_0), "output_norm.weight": (vector, Kind.F32)}
    return {**ends, **layer}


def write_tensors(path: Path, tensors: Tensors, heads: int = 2) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return path


def bad_scale(data: np.ndarray) -> np.ndarray:
    data = data.copy()
    data[3, 34:36] = np.array([np.inf], np.float16).view(np.uint8)
    return data


def replaced(name: str, *value: Any) -> Callable[[], Tensors]:
    return lambda: {**sound(), name: value}  # type: ignore[dict-item]


ROWS = np.zeros((WIDTH, 2 * 34), np.uint8)
REFUSED: dict[str, tuple[Callable[[], Tensors], tuple[str, ...]]] = {
    "Q2_K": (replaced("blk.0.ffn_up.weight", np.zeros((64, 84), np.uint8), Kind.Q2_K), ("ffn_up", "Q2_K", "Q4_K")),
    "IQ4_NL": (replaced("blk.0.ffn_up.weight", np.zeros((64, 36), np.uint8), Kind.IQ4_NL), ("ffn_up", "IQ4_NL")),
    "MXFP4": (replaced("blk.0.ffn_up.weight", np.zeros((64, 34), np.uint8), Kind.MXFP4), ("ffn_up", "MXFP4")),
    "TQ1_0": (replaced("blk.0.ffn_up.weight", np.zeros((64, 54), np.uint8), Kind.TQ1_0), ("ffn_up", "TQ1_0")),
    "integers": (replaced("blk.0.ffn_up.weight", np.zeros((64, 64), np.int8), Kind.I8), ("ffn_up", "I8")),
    "an unknown tensor": (replaced("blk.0.ffn_gate_exps.weight", ROWS, Kind.Q8_0), ("ffn_gate_exps",)),
    "a name that is none": (replaced("blk.00.attn_q.weight", ROWS, Kind.Q8_0), ("blk.00.attn_q",)),
    "missing": (lambda: {k: v for k, v in sound().items() if "ffn_up" not in k}, ("mlp.up_proj.weight", "lacks")),
    "too many layers": (replaced("blk.1.attn_q.weight", ROWS, Kind.Q8_0), ("layers.1.self_attn.q_proj", "no place")),
    "another shape": (replaced("blk.0.ffn_up.weight", ROWS[:32], Kind.Q8_0), ("up_proj", "[32, 64]", "[64, 64]")),
    "a norm that is quantised": (replaced("output_norm.weight", ROWS[0], Kind.Q8_0), ("output_norm", "blocks")),
    "rows that are no heads": (replaced("blk.0.attn_q.weight", ROWS[:63], Kind.Q8_0), ("attn_q", "63 rows")),
}


def load(path: Path) -> GgufCheckpoint:
    """What a start does before it plans memory, and then the reading of everything."""
    checkpoint = GgufCheckpoint(path)
    check_tensors(checkpoint, ModelConfig.from_hf(folder_without_tokenizer(path)))
    for name in checkpoint.tensors:
        checkpoint.read(name)
    return checkpoint


def folder_without_tokenizer(path: Path) -> Path:
    make_tiny_tokenizer(path.parent)  # beside the file
    return folder_for(path, path.parent / "cache")


def test_the_sound_file_loads(tmp_path: Path) -> None:
    assert len(load(write_tensors(tmp_path / "sound.gguf", sound())).tensors) == 11


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tensors_are_named(case: str, tmp_path: Path) -> None:
    make, words = REFUSED[case]
    with pytest.raises(WeightsError) as told:
        load(write_tensors(tmp_path / "bad.gguf", make()))
    assert all(word in str(told.value) for word in (*words, "bad.gguf" if case != "missing" else "")), told.value
    assert "\n" not in str(told.value)


def test_scales_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "bad.gguf", {**sound(), "blk.0.ffn_up.weight": (bad_scale(ROWS), Kind.Q8_0)})
    with pytest.raises(WeightsError, match=r"blk\.0\.ffn_up\.weight.*not finite"):
        load(path)


def test_files_cut_short_are_named(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "whole.gguf", sound())
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(WeightsError, match="cut short"):
        GgufCheckpoint(cut)
    cut.unlink()
    shutil.copy(path, cut)
    checkpoint = GgufCheckpoint(cut)
    cut.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(WeightsError, match="cannot be read any more"):
        checkpoint.read("model.layers.0.mlp.down_proj.weight")


def test_heads_that_cannot_be(tmp_path: Path) -> None:
    for heads in (0, 5):
        with pytest.raises(WeightsError, match="heads"):
            GgufCheckpoint(write_tensors(tmp_path / f"{heads}.gguf", sound(), heads))
