"""Translate llama.cpp's names and orders of a base's tensors to those of its Hugging Face checkpoint. Free of torch.

llama.cpp rotates neighbouring elements (0, 1), (2, 3), ... of a head where the architecture is "llama", the checkpoint
rotates element i with i + head_dim / 2: there the rows of q and k lie in another order. Where the architecture is
Gemma, llama.cpp stores 1 + w for the norms' w.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_OF_ARCHITECTURE = {"gemma2": _GEMMA, "gemma3": _GEMMA, "phi3": {"ffn_up": "mlp.gate_up_proj"}}

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Numbers of the configuration that lie among the tensors, see config.py."""

_NAME = re.compile(r"(?:blk\.(?P<layer>0|[1-9]\d{0,4})\.)?(?P<part>[a-z_]+)\.(?P<end>weight|bias)")


def checkpoint_name(name: str, architecture: str) -> str | None:
    """Translate blk.3.attn_q.weight to model.layers.3.self_attn.q_proj.weight; None: there is no such tensor."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    if found["layer"] is None:
        module = _MODEL.get(found["part"])
        return None if module is None else f"{module}.{found['end']}"
    module = {**_LAYER, **_OF_ARCHITECTURE.get(architecture, {})}.get(found["part"])
    return None if module is None else f"model.layers.{found['layer']}.{module}.{found['end']}"


def head_count_of(name: str, architecture: str, heads: int, kv_heads: int) -> int | None:
    """Count the heads whose rows the tensor `name` has in llama.cpp's order; None: they are in the checkpoint's."""
    if architecture != "llama":
        return None
    part = name.split(".")[-2]
    return heads if part == "attn_q" else kv_heads if part == "attn_k" else None


def row_order(rows: int, heads: int) -> NDArray[np.int64]:
    """List the row of the file for each row of the checkpoint, where `heads` lie one behind the other."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def norm_offset(name: str, architecture: str) -> float:
    """Return what llama.cpp has added to the numbers of the tensor `name`."""
    return 1.0 if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight") else 0.0
