"""GGUF files as llama.cpp's converter lays them out, of the tiny models, and the models that they then hold.

    written = write_gguf(tiny_hf_model("llama"), folder / "tiny.gguf")        # Q8_0 linears, F32 norms
    written.model                                                             # transformers' model with those values

The metadata is what convert_hf_to_gguf.py writes for each family; names are the gguf package's own map. Values are made
by gguf.quants where it can quantise, else of random blocks; `written.model` has gguf.quants.dequantize of them, so that
no line of our reader has a part in the oracle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from tests.support.tiny import CHAT_TEMPLATE

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
"""By the model_type of a transformers config."""

K_KINDS = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
"""Types that the gguf package reads and does not write."""

SCALES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
"""Where a block of these has its fp16 numbers."""


@dataclass(frozen=True)
class WrittenGguf:
    path: Path
    model: Any  # transformers', with the values of the file


def random_blocks(kind: Kind, rows: int, columns: int, seed: int) -> NDArray[np.uint8]:
    """Rows [rows, bytes] of a K type: any codes, with values of about columns ** -0.5."""
    block, width = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, columns // block, width), dtype=np.uint8)
    largest = {Kind.Q4_K: 15 * 63, Kind.Q5_K: 31 * 63, Kind.Q6_K: 32 * 127}[kind]
    for place, at in enumerate(SCALES[kind]):
        scale = rng.uniform(1, 3, (rows, columns // block, 1)) * columns**-0.5 / largest
        if place == 1:  # minima have the codes of scales, and are as large as half of the largest value
            scale *= (largest / 63) / 2
        data[:, :, at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def llama_rows(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """The rows of q or k in llama.cpp's order (LlamaModel.permute of its converter)."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def write_gguf(
    model: Any,
    path: Path,
    kind: Kind | Callable[[str], Kind] = Kind.Q8_0,
    *,
    tokenizer: Path | None = None,
    extra: Mapping[str, Any] | None = None,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> WrittenGguf:
    """Write `model`, whose weights become those of the file. kind: of matrices, or of each by its checkpoint name.

    tokenizer: a folder of make_tiny_tokenizer's. change: adds to the metadata, after everything else.
    """
    config = model.config
    arch = ARCHITECTURES["llama" if config.model_type == "mistral" else config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _add_metadata(writer, config)
    if tokenizer is not None:
        add_tiny_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state = model.state_dict()
    for seed, (name, tensor) in enumerate(state.items()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, end = name.rpartition(".")
        values = tensor.float().numpy()
        chosen = Kind.F32 if values.ndim == 1 else kind(name) if callable(kind) else kind
        if chosen in K_KINDS:
            data = random_blocks(chosen, *values.shape, seed)
        else:
            data = values if chosen == Kind.F32 else quantize(values, chosen)
        tensor.copy_(torch.from_numpy(np.array(dequantize(data, chosen))))
        if arch in (gguf.MODEL_ARCH.GEMMA2, gguf.MODEL_ARCH.GEMMA3) and name.endswith("norm.weight"):
            data = data + 1
        if arch == gguf.MODEL_ARCH.LLAMA and (count := heads.get(module.rpartition(".")[2])):
            data = llama_rows(data, count)
        writer.add_tensor(f"{names.get_name(module)}.{end}", data, raw_dtype=chosen)
    for name, numbers in (extra or {}).items():
        writer.add_tensor(name, np.asarray(numbers, np.float32))
    change(writer)
    model.load_state_dict(state)
    finish(writer)
    return WrittenGguf(path, model)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    """What llama.cpp's converter writes of a config; fields that it leaves out are left out."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type in ("qwen3", "gemma2", "gemma3_text", "mistral"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        rope = rope["full_attention"]
    if config.model_type in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_rope_freq_base(rope["rope_theta"])
    partial = rope.get("partial_rotary_factor", 1.0)
    if config.model_type in ("llama", "mistral", "phi3"):
        writer.add_rope_dimension_count(int(head_dim * partial))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    writer.add_vocab_size(config.vocab_size)


def rope_tensors(model: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes among the tensors: what each frequency is divided by, by transformers' own."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = model.config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{which}.weight": rope[f"{which}_factor"] for which in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    return {"rope_freqs.weight": 1 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)) / scaled}


def add_tiny_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    """Add the tokenizer that make_tiny_tokenizer has written into `folder`."""
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab: dict[str, int] = {**written["model"]["vocab"], **{t["content"]: t["id"] for t in written["added_tokens"]}}
    special = {token["content"] for token in written["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in written["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)
