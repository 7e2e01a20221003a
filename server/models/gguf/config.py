"""Write the config.json and generation_config.json that a GGUF's metadata stands for. Free of torch.

What comes out is read as any other base's files are, by models/config.py: only what the two have different names for is
done here. What llama.cpp does without being told (Gemma's scale of attention, its windows' pattern) is written out.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.server.models.gguf.header import GgufError, GgufHeader, shortest
from loraplex.server.models.gguf.names import ROPE_FACTORS

CONFIG_FILES = ("config.json", "generation_config.json")

END_TEXTS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>")
"""Control tokens that end an answer wherever a vocabulary has them, as llama.cpp has it: files name one of them."""

CONTROL = 3
"""GGUF's type of a token that is no text."""

_GENERATION = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True)
class Family:
    """What an architecture of llama.cpp's is called by transformers."""

    architecture: str
    model_type: str
    activation: str = "silu"


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama"),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3"),
    "gemma2": Family("Gemma2ForCausalLM", "gemma2", "gelu_pytorch_tanh"),
    "gemma3": Family("Gemma3ForCausalLM", "gemma3_text", "gelu_pytorch_tanh"),
    "phi3": Family("Phi3ForCausalLM", "phi3"),
}

_WHOLE_HEAD_SCALE = {("gemma2", 46), ("gemma3", 62)}
"""Architecture and layers of the models (27B) whose attention is scaled by hidden_size / heads, not by head_dim: no key
says so, llama.cpp goes by the layers too."""

_FOREIGN = ("expert_count", "attention.scale", "embedding_scale", "residual_scale", "logit_scale")
"""Keys of models that have an architecture's name and are computed otherwise (Mixtral's, Granite's), unless neutral."""

_DTYPES = {0: "float32", 1: "float16"}
"""ggml's number of a type of linears: what is computed in by default; elsewhere it is bfloat16."""


def config_json(header: GgufHeader) -> dict[str, Any]:
    """Write the config.json of the model in a GGUF. Raises GgufError for one that cannot be served, by name."""
    arch = header.architecture
    family = FAMILIES.get(arch)
    if family is None:
        raise GgufError(f"{header.file} holds the architecture {arch[:80]!r}; supported: {', '.join(FAMILIES)}")
    _check_whole(header)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    types = {tensor.name: tensor.type for tensor in header.tensors}
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise GgufError(f"{header.file} lacks the tensor token_embd.weight")
    hidden, heads = header.whole(f"{arch}.embedding_length"), header.whole(f"{arch}.attention.head_count")
    if not heads:
        raise GgufError(f"{header.file} has no attention heads")
    layers = header.whole(f"{arch}.block_count")
    if not 0 < layers <= len(shapes):
        raise GgufError(f"{header.file} has {layers} under {arch}.block_count, and {len(shapes)} tensors")
    head_dim = header.whole(f"{arch}.attention.key_length", hidden // heads)
    if header.whole(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise GgufError(f"{header.file} has values of another length than keys, which is not supported")
    context = header.whole(f"{arch}.context_length")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": header.whole(f"{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": header.whole(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": header.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "hidden_act": family.activation,
        "hidden_activation": family.activation,
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "torch_dtype": _DTYPES.get(types.get("blk.0.attn_output.weight", -1), "bfloat16"),
    }
    config |= _special_ids(header)
    if arch in ("gemma2", "gemma3"):
        config |= _gemma_fields(header, arch, layers, hidden // heads, head_dim)
    elif arch == "phi3":
        config["sliding_window"] = header.whole("phi3.attention.sliding_window", 0) or None
    rotated = header.whole(f"{arch}.rope.dimension_count", head_dim)
    return config | _rope_fields(header, arch, head_dim, rotated)


def generation_json(header: GgufHeader) -> dict[str, Any]:
    """Write the generation_config.json of the model in a GGUF: all tokens that end an answer, and its sampling."""
    tokens, types = header.entries("tokenizer.ggml.tokens", str), header.entries("tokenizer.ggml.token_type", int)
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ends = [header.whole(key) for key in keys if key in header.metadata]
    if tokens and types:
        ends += [
            i
            for i, (text, kind) in enumerate(zip(tokens, types, strict=False))
            if kind == CONTROL and text in END_TEXTS
        ]
    found: dict[str, Any] = _special_ids(header)
    if ends:
        found["eos_token_id"] = list(dict.fromkeys(ends))
    for key, name in _GENERATION.items():
        if key in header.metadata:
            found[name] = header.whole(key) if name == "top_k" else header.number(key)
    return found


def write_config(header: GgufHeader, folder: Path) -> None:
    """Write CONFIG_FILES into `folder`. Raises GgufError, OSError."""
    for name, content in zip(CONFIG_FILES, (config_json(header), generation_json(header)), strict=True):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_whole(header: GgufHeader) -> None:
    """Raise GgufError for a part of a model, and for a model that an architecture's name does not describe."""
    count = header.whole("split.count", 0)
    if count > 1:
        raise GgufError(f"{header.file} is one of {count} files of a model; join them with llama-gguf-split --merge")
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise GgufError(f"{header.file} holds a GGUF of the kind {kind!r:.40}, expected a model")
    for key in _FOREIGN:
        value = header.metadata.get(f"{header.architecture}.{key}", 0)
        if value not in ((0, 1) if key.endswith("scale") else (0,)):
            raise GgufError(f"{header.file} has {header.architecture}.{key} {value!r:.40}, which is not supported")


def _special_ids(header: GgufHeader) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "padding": "pad"}
    keys = {f"tokenizer.ggml.{theirs}_token_id": f"{ours}_token_id" for theirs, ours in names.items()}
    return {name: header.whole(key) for key, name in keys.items() if key in header.metadata}


def _gemma_fields(header: GgufHeader, arch: str, layers: int, share: int, head_dim: int) -> dict[str, Any]:
    """Write what Gemma's attention has; share: hidden_size / heads."""
    period = header.metadata.get(f"{arch}.attention.sliding_window_pattern", 2 if arch == "gemma2" else 6)
    if isinstance(period, list) and len(period) == layers:
        slides = [bool(each) for each in period]
    elif type(period) is int and period > 0:
        slides = [layer % period < period - 1 for layer in range(layers)]
    else:
        raise GgufError(f"{header.file} has {arch}.attention.sliding_window_pattern of another length than its layers")
    caps = {"attn": "attn_logit_softcapping", "final": "final_logit_softcapping"}
    default = {"attn": 50.0, "final": 30.0} if arch == "gemma2" else {}
    found: dict[str, Any] = {
        "query_pre_attn_scalar": share if (arch, layers) in _WHOLE_HEAD_SCALE else head_dim,
        "sliding_window": _window(header, arch),
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
    }
    for name, field in caps.items():
        key = f"{arch}.{name}_logit_softcapping"
        found[field] = header.number(key) if key in header.metadata else default.get(name)
    return found


def _window(header: GgufHeader, arch: str) -> int:
    """Read how many tokens Gemma's sliding layers see; one without such layers is none that its config describes."""
    window = header.whole(f"{arch}.attention.sliding_window")
    if not window:
        raise GgufError(f"{header.file} has 0 under {arch}.attention.sliding_window; expected the window of its layers")
    return window


def _rope_fields(header: GgufHeader, arch: str, head_dim: int, rotated: int) -> dict[str, Any]:
    """Write rope_parameters, for Gemma 3 those of both kinds of layers, and what stands beside them."""
    theta = header.number(f"{arch}.rope.freq_base", 10000.0)
    parameters = _rope_parameters(header, arch, theta)
    if rotated != head_dim:
        if arch != "phi3" or rotated > head_dim:
            raise GgufError(f"{header.file} rotates {rotated} of {head_dim} elements of a head, which is not supported")
        parameters["partial_rotary_factor"] = rotated / head_dim
    if arch == "gemma3":
        local = {"rope_type": "default", "rope_theta": header.number(f"{arch}.rope.freq_base_swa", 10000.0)}
        return {"rope_parameters": {"full_attention": parameters, "sliding_attention": local}}
    fields: dict[str, Any] = {"rope_parameters": parameters}
    if arch == "phi3" and parameters["rope_type"] == "longrope":
        fields["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    return fields


def _rope_parameters(header: GgufHeader, arch: str, theta: float) -> dict[str, Any]:
    freqs, long, short = (rope_factors(header, name) for name in ROPE_FACTORS)
    kind = header.metadata.get(f"{arch}.rope.scaling.type", "none")
    prefix = f"{arch}.rope.scaling."
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if long is not None and short is not None and arch == "phi3" and kind in ("none", "longrope"):
        original = header.whole(prefix + "original_context_length")
        scaling = header.number(prefix + "attn_factor", 1.0)
        longrope = {"rope_type": "longrope", "attention_factor": scaling, "original_max_position_embeddings": original}
        return found | longrope | {"short_factor": list(short), "long_factor": list(long)}
    if long is not None or short is not None:
        raise GgufError(
            f"{header.file} has rope factors for two lengths, which {arch} with rope scaling {kind!r} has not"
        )
    if freqs is not None:
        if kind != "none":
            raise GgufError(f"{header.file} has rope factors and rope scaling {kind!r:.40}, which is not supported")
        return found | _llama3_parameters(header, freqs, theta)
    if kind == "none":
        return found
    factor = header.number(prefix + "factor")
    if kind == "linear":
        return found | {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and header.number(prefix + "attn_factor", 1.0) == 1.0:
        original = header.whole(prefix + "original_context_length")
        betas = {
            name: header.number(f"{prefix}yarn_{name}", value) for name, value in (("beta_fast", 32), ("beta_slow", 1))
        }
        return found | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | betas
    raise GgufError(f"{header.file} has rope scaling {kind!r:.40}, which is not supported for {arch}")


def _llama3_parameters(header: GgufHeader, factors: tuple[float, ...], theta: float) -> dict[str, Any]:
    """Find Llama 3.1's parameters of scaling from what they divide each frequency by, which is all that a GGUF has.

    Semantics: a frequency that turns `share` times in the original context is divided by 1 where share > high, by
    `factor` where share < low, and by 1 / ((1 - s) / factor + s) between, with s = (share - low) / (high - low); low
    and high are 1 and 4 in all of these models. Raises GgufError for factors that are no such ones.
    """
    factor, low, high = shortest(max(factors)), 1.0, 4.0
    waves = [2 * math.pi * theta ** (i / len(factors)) for i in range(len(factors))]
    between = [(f, wave) for f, wave in zip(factors, waves, strict=True) if 1.001 < f < 0.999 * factor]
    if between:
        divided, wave = between[0]
        blend = (1 / divided - 1 / factor) / (1 - 1 / factor)
        original = round(wave * (low + blend * (high - low)))
        blends = [min(1.0, max(0.0, (original / wave - low) / (high - low))) for wave in waves]
        expected = [1 / ((1 - blend) / factor + blend) for blend in blends]
        if all(math.isclose(f, e, rel_tol=1e-4) for f, e in zip(factors, expected, strict=True)):
            bounds = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
            return {"rope_type": "llama3", "factor": factor, **bounds}
    raise GgufError(f"{header.file} has factors in rope_freqs.weight that are not Llama 3.1's, which is not supported")


def rope_factors(header: GgufHeader, name: str) -> tuple[float, ...] | None:
    """Read the fp32 vector `name`, one of ROPE_FACTORS; None where the file has none. Raises GgufError."""
    stored = next((tensor for tensor in header.tensors if tensor.name == name), None)
    if stored is None:
        return None
    if stored.type != 0 or len(stored.shape) != 1 or stored.shape[0] > 4096:
        raise GgufError(f"tensor {name} of {header.file} has shape {list(stored.shape)}; expected a short F32 vector")
    count = stored.shape[0]
    with header.file.open("rb") as file:
        file.seek(stored.start)
        data = file.read(4 * count)
    values = struct.unpack(f"<{len(data) // 4}f", data[: len(data) // 4 * 4])
    if len(values) != count or not all(math.isfinite(value) and value > 0 for value in values):
        raise GgufError(f"tensor {name} of {header.file} is damaged or cut short; download it again")
    return tuple(shortest(value) for value in values)
