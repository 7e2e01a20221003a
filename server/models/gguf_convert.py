"""Convert a GGUF file of the Llama architecture to a checkpoint: bf16 safetensors, tokenizer, config, chat template.

Only what the embedded demo base needs. transformers can read a GGUF too, but takes four times as long, refuses to save
what it has read, and loses the tokenizer's rule that every digit is a token of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from torch import Tensor

CONVERTER_VERSION = 1
"""Raised whenever the files below would come out differently: older conversions are then made again."""

WEIGHTS = "model.safetensors"
CONVERTED_FILES = (
    WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
)

Report = Callable[[str, int, int], None]
"""Called with what is being done, how many units of it are done, and of how many."""

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class UnknownGGUF(ValueError):
    """Say that a file is no GGUF, or one that this converter does not understand, and what was found."""


def convert_gguf(source: Path, folder: Path, report: Report) -> None:
    """Write CONVERTED_FILES into `folder` (which exists) from the GGUF file `source`.

    Tensors are dequantised in fp32 and rounded once, to bf16.
    Raises UnknownGGUF, or OSError when the folder cannot be written.
    """
    import gguf
    from safetensors.torch import save_file

    report("reading", 0, 1)
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError) as error:
        raise UnknownGGUF(f"{source.name} cannot be read as GGUF ({error})") from error
    config = _config(reader)  # refuses other architectures before any work is done

    tensors = _tensors(reader, config["num_attention_heads"], config["num_key_value_heads"], report)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    report("writing", 0, 1)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # save_file leaves it to its owner alone
    _write_tokenizer(reader, folder)
    _write_json(folder / "config.json", config)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(folder / "generation_config.json", {key: config[key] for key in ids})
    report("writing", 1, 1)


def _field(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """Return the value of a metadata key; without a default, a missing key raises UnknownGGUF."""
    field = reader.fields.get(key)
    if field is not None:
        return field.contents()
    if default is None:
        raise UnknownGGUF(f"the GGUF has no {key}")
    return default


def _decimal(value: float) -> float:
    """Find the short decimal that a number stored as fp32 was meant to be: 9.99999974e-06 -> 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))


def _config(reader: GGUFReader) -> dict[str, Any]:
    """Build config.json, all but tie_word_embeddings."""
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise UnknownGGUF(f"the GGUF holds the architecture {architecture!r}; this converter knows 'llama'")
    hidden, heads = _field(reader, "llama.embedding_length"), _field(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv", heads),
        "head_dim": _field(reader, "llama.attention.key_length", hidden // heads),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": _decimal(_field(reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(_field(reader, "llama.rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _checkpoint_name(name: str) -> str:
    """Translate llama.cpp's name: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    if name in _MODEL_TENSORS:
        return _MODEL_TENSORS[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_TENSORS and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.weight"
    raise UnknownGGUF(f"the GGUF holds a tensor {name!r}, which this converter does not know")


def _tensors(reader: GGUFReader, num_heads: int, num_kv_heads: int, report: Report) -> dict[str, Tensor]:
    """Read every tensor of the file under its checkpoint name, [out, in] or [hidden], bf16."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    tensors = {}
    for done, tensor in enumerate(reader.tensors):
        report("converting", done, len(reader.tensors))
        name = _checkpoint_name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type)  # fp32; a read-only view where the file has fp32
        if name.endswith("q_proj.weight"):
            values = _half_rotation(values, num_heads)
        elif name.endswith("k_proj.weight"):
            values = _half_rotation(values, num_kv_heads)
        tensors[name] = torch.from_numpy(np.require(values, requirements=["C", "W"])).to(torch.bfloat16)
    report("converting", len(reader.tensors), len(reader.tensors))
    return tensors


def _half_rotation(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder the rows of a q or k projection [heads * head_dim, in] from llama.cpp's order to the checkpoint's.

    llama.cpp rotates neighbours (0, 1), (2, 3), ...; the checkpoint rotates element i with i + head_dim / 2.
    """
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Write the tokenizer (byte-level BPE after every digit is split off), its config and chat_template.jinja."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (_field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm") or _field(reader, "tokenizer.ggml.add_bos_token", False):
        raise UnknownGGUF(f"the GGUF holds the tokenizer {kind}; this converter knows ('gpt2', 'smollm') without BOS")
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    types = _field(reader, "tokenizer.ggml.token_type")

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # llama.cpp's "smollm" cuts at \p{N} before GPT-2's pattern: "in 24" is "in", " ", "2", "4", never " 24" or " 2".
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    named = {
        f"{role}_token": tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            # The one class name that transformers 4 and 5 both take for "whatever tokenizer.json says".
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "model_max_length": _field(reader, "llama.context_length"),
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(_field(reader, "tokenizer.chat_template"), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
