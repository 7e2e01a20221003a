"""Tiny models whose linears are in a format of other people's, beside what transformers makes of their values.

    folder, oracle = make_quantized_model("awq", "llama", tmp_path)

Codes and scales are drawn; the oracle has scale * (code - zero), computed here, in place of its weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny import load_oracle, make_tiny_model

Tensors = dict[str, torch.Tensor]
"""By their names behind the linear's, as "weight_scale"."""

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word of AWQ that each of eight outputs has."""


@dataclass(frozen=True)
class Kind:
    """A format: what its config says, and a random linear of it."""

    settings: dict[str, Any]
    draw: Callable[[int, int, torch.Generator], tuple[Tensors, torch.Tensor]]  # (out, in) -> tensors, values fp32


def make_quantized_model(
    name: str, family: str, path: Path, *, tables: bool = False, **overrides: Any
) -> tuple[Path, Any]:
    """Write a model of KINDS[name] into `path`; return it, and transformers' model of its values in fp32.

    tables: embedding and head are quantised too.
    """
    kind = KINDS[name]
    folder = make_tiny_model(family, path, **overrides)
    oracle = load_oracle(folder)
    kept = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(11)
    quantised = ("_proj.weight", *(("embed_tokens.weight", "lm_head.weight") if tables else ()))
    for key in [key for key in kept if key.endswith(quantised)]:
        out, columns = kept.pop(key).shape
        made, values = kind.draw(out, columns, generator)
        prefix = key.removesuffix("weight")
        kept |= {f"{prefix}{part}": tensor.contiguous() for part, tensor in made.items()}
        oracle.get_parameter(key).data = values
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": kind.settings}))
    return folder, oracle


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [rows, n] into int32 [rows, n * bits / 32], the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits)
    return (codes.long().view(codes.shape[0], -1, 32 // bits) << shifts).sum(-1).int()


def _drawn(
    out: int, columns: int, bits: int, group: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw codes [out, in], scales [out, groups], exact in bfloat16, and zeros [out, groups]."""
    codes = torch.randint(0, 1 << bits, (out, columns), generator=generator)
    step = 4 * columns**-0.5 / (1 << bits)
    scale = (step * (0.5 + torch.rand(out, columns // group, generator=generator))).bfloat16().float()
    zeros = torch.randint((3 << bits) // 8, (5 << bits) // 8, scale.shape, generator=generator)
    return codes, scale, zeros


def _values(codes: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | int, groups: torch.Tensor) -> torch.Tensor:
    """groups: of each input."""
    return scale[:, groups] * (codes - (zeros if isinstance(zeros, int) else zeros[:, groups]))


def _gptq(bits: int, group: int, symmetric: bool, ordered: bool) -> Kind:
    def draw(out: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes, scale, zeros = _drawn(out, columns, bits, group, generator)
        if symmetric:
            zeros = torch.full_like(zeros, 1 << (bits - 1))
        groups = torch.arange(columns) // group
        if ordered:
            groups = groups[torch.randperm(columns, generator=generator)]
        made = {
            "qweight": words(codes, bits).T,
            "qzeros": words((zeros - 1).T.contiguous(), bits),
            "scales": scale.T.half(),
            "g_idx": groups.int(),
        }
        return made, _values(codes, scale.half().float(), zeros, groups)

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": ordered}
    return Kind(settings, draw)


def _awq(out: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes, scale, zeros = _drawn(out, columns, 4, 32, generator)

    def packed(rows: torch.Tensor) -> torch.Tensor:
        placed = torch.empty_like(rows).view(rows.shape[0], -1, 8)
        placed[..., AWQ_PLACES] = rows.reshape(rows.shape[0], -1, 8)
        return words(placed.view(rows.shape), 4)

    made = {"qweight": packed(codes.T.contiguous()), "qzeros": packed(zeros.T.contiguous()), "scales": scale.T.half()}
    return made, _values(codes, scale.half().float(), zeros, torch.arange(columns) // 32)


def _compressed(form: str, weights: dict[str, Any], **group: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear", "Embedding"], "weights": weights, **group}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def _packed(bits: int, group: int) -> Kind:
    """Asymmetric."""

    def draw(out: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes, scale, zeros = _drawn(out, columns, bits, group, generator)
        made = {
            "weight_packed": words(codes, bits),
            "weight_scale": scale.bfloat16(),
            "weight_zero_point": words(zeros.T.contiguous(), bits).T,
            "weight_shape": torch.tensor([out, columns]),
        }
        return made, _values(codes, scale, zeros, torch.arange(columns) // group)

    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group, "symmetric": False}
    return Kind(_compressed("pack-quantized", weights), draw)


def _int8(out: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes, scale, _ = _drawn(out, columns, 8, columns, generator)
    made = {"weight": (codes - 128).to(torch.int8), "weight_scale": scale.bfloat16()}
    return made, _values(codes, scale, 128, torch.zeros(columns, dtype=torch.long))


def _fp8(out: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes = (torch.randn(out, columns, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    blocks = -(-out // 48), -(-columns // 40)
    scale = (0.5 + torch.rand(blocks, generator=generator)) * columns**-0.5 / 100
    spread = scale.repeat_interleave(48, 0)[:out].repeat_interleave(40, 1)[:, :columns]
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread


KINDS = {
    "gptq, 4 bits, ordered": _gptq(4, 32, True, True),
    "gptq, 8 bits": _gptq(8, 32, False, False),
    "awq": Kind({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, _awq),
    "w4a16": _packed(4, 32),
    "w8a16": _packed(8, 32),
    "w8a8": Kind(
        _compressed(
            "int-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            input_activations={"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        ),
        _int8,
    ),
    "fp8 in ragged blocks": Kind({"quant_method": "fp8", "weight_block_size": [48, 40]}, _fp8),
}
