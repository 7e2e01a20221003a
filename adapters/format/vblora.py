"""VB-LoRA as PEFT saves it: pieces of A and B are mixed from one bank of vectors, each from a few of them.

adapter_model.safetensors                                      what it becomes
base_model.vblora_vector_bank [num_vectors, length]            the vectors
...<projection>.vblora_logits_A [r, in / length, num_vectors]  LowRank.a: of each piece the topk largest, by softmax
...<projection>.vblora_logits_B [out / length, r, num_vectors] LowRank.b
or, save_only_topk_weights, of each of the two
...<projection>.vblora_logits_A_topk_indices [.., .., topk]    the vectors of a piece
...<projection>.vblora_logits_A_topk_weights [.., .., topk-1]  their weights but the last, which is what is left of 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import bad_config, read_count, read_flag, read_rank
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.values import check_indices
from loraplex.adapters.format.wanted import Shapes, Wanted
from loraplex.adapters.image.tiles import Part

BANK = "vblora_vector_bank"
LOGITS = {"A": "vblora_logits_A", "B": "vblora_logits_B"}


@dataclass(frozen=True)
class VbloraConfig(AdapterConfig):
    """What inference needs of a VB-LoRA adapter's config."""

    rank: int
    vectors: int
    length: int  # of a vector
    topk: int
    compact: bool  # the file has indices and weights instead of logits


class Vblora(ModuleKind[VbloraConfig]):
    """y += B (A x), whose pieces are sums of softmax(topk of the logits) times vectors of the bank."""

    name = "vblora"
    label = "VB-LoRA"
    keys = module_keys(
        *("r", "num_vectors", "vector_length", "topk", "save_only_topk_weights", "bias"),
        no_bearing=("vblora_dropout", "fan_in_fan_out", "init_vector_bank_bound", "init_logits_std"),
    )
    integers = True
    leaves = tuple(logits + end for logits in LOGITS.values() for end in ("", "_topk_indices", "_topk_weights"))
    integer_leaves = frozenset(f"{logits}_topk_indices" for logits in LOGITS.values())

    def read(self, raw: Mapping[str, Any]) -> VbloraConfig:
        common = read_common(self, raw)
        vectors = read_count(raw.get("num_vectors", 256), "num_vectors")
        topk = read_count(raw.get("topk", 2), "topk")
        if topk > vectors:
            raise bad_config(f"topk is {topk}, and num_vectors {vectors}; expected no more than these")
        return VbloraConfig(
            **common,
            rank=read_rank(raw.get("r", 4), "r"),
            vectors=vectors,
            length=read_count(raw.get("vector_length", 256), "vector_length"),
            topk=topk,
            compact=read_flag(raw, "save_only_topk_weights"),
        )

    def wanted(self, config: VbloraConfig, module: FoundModule, match: Matcher) -> Wanted:
        width, out = module.projection.in_features, module.projection.out_features
        for what, features in (("inputs", width), ("outputs", out)):
            if features % config.length:
                raise bad_config(
                    f"vector_length is {config.length}, which does not divide {module.path}'s {features} {what}"
                )
        pieces = {"A": (config.rank, width // config.length), "B": (out // config.length, config.rank)}
        shapes: dict[str, tuple[int, ...]] = {}
        for side, of in pieces.items():
            if config.compact:
                shapes[f"{LOGITS[side]}_topk_indices"] = (*of, config.topk)
                shapes[f"{LOGITS[side]}_topk_weights"] = (*of, config.topk - 1)
            else:
                shapes[LOGITS[side]] = (*of, config.vectors)
        return Wanted(shapes, config.rank)

    def shared_role(self, name: str) -> str | None:
        return name if name == BANK else None

    def shared_shapes(self, config: VbloraConfig, modules: Sequence[FoundModule]) -> Shapes:
        return {BANK: (config.vectors, config.length)}

    def making_bytes(self, config: VbloraConfig, modules: Sequence[AdapterModule]) -> int:
        each = 2 * config.topk + (0 if config.compact else -(-2 * config.vectors // config.length))
        return each * super().making_bytes(config, modules)

    def make(self, making: Making[VbloraConfig]) -> Part:
        a, b = (_mix(making, logits) for logits in LOGITS.values())  # [r, in / length, length], [out / length, r, ..]
        return making.low_rank(a.flatten(1), b.transpose(1, 2).flatten(0, 1))


def _mix(making: Making[VbloraConfig], logits: str) -> Tensor:
    """Mix the pieces of A or B: [.., .., length] fp32."""
    config = making.config
    if config.compact:
        leaf = f"{logits}_topk_indices"
        indices = making.tensors[leaf].long()
        check_indices(indices, config.vectors, making.module.tensors[leaf])
        given = making.floats(f"{logits}_topk_weights")
        weights = torch.cat((given, 1 - given.sum(-1, keepdim=True)), -1)
    else:
        largest, indices = making.floats(logits).topk(config.topk, dim=-1)
        weights = largest.softmax(-1)
    return (weights[..., None] * making.shared[BANK].float()[indices]).sum(-2)
