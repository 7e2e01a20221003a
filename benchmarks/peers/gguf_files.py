"""The demo base and PEFT LoRA adapters as GGUF files, for llama.cpp: the base in bf16 or Q8_0, adapters in f16.

The base's values are those of our own conversion: dequantised in fp32 and rounded once.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from safetensors import safe_open

from loraplex.server.models.config import ModelConfig

PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


FILE_TYPES = {
    gguf.GGMLQuantizationType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    gguf.GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}


def write_base(source: Path, out: Path, kind: gguf.GGMLQuantizationType) -> None:
    """The Llama in the GGUF file `source`, its matrices in `kind`, one of FILE_TYPES, and its vectors in fp32."""
    reader = gguf.GGUFReader(source)
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        stored = field.types[0]
        inner = field.types[-1] if stored == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), stored, sub_type=inner)
    writer.add_file_type(FILE_TYPES[kind])
    for tensor in reader.tensors:
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    _finish(writer)
    partial.rename(out)


def write_adapter(adapter: Path, config: ModelConfig, out: Path) -> None:
    """A PEFT LoRA folder without patterns, rsLoRA or biases, as benchmarks.random_adapters makes them."""
    options = json.loads((adapter / "adapter_config.json").read_text())
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(options["lora_alpha"]))
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  not a mapping
            _, _, path = name.partition(".layers.")
            layer, _, rest = path.partition(".")
            projection, _, part = rest.removesuffix(".weight").rpartition(".")
            values = file.get_tensor(name).float().numpy()
            count = heads.get(projection.rpartition(".")[2])
            if part == "lora_B" and count is not None:
                values = _pairs_adjacent(values, count)
            target = f"blk.{layer}.{PROJECTIONS[projection]}.weight.{part.lower()}"
            writer.add_tensor(target, np.ascontiguousarray(values, dtype=np.float16))
    _finish(writer)
    partial.rename(out)


def _pairs_adjacent(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows [heads * head_dim, r] in llama.cpp's order for Llama: the two that a rotation turns side by side."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
