"""AdaLoRA as PEFT saves it: a LoRA whose A and B have a diagonal between them, pruned to ranks of its own by module.

adapter_model.safetensors                    what it becomes
...<projection>.lora_A [r, in]               LowRank.a, times lora_E
...<projection>.lora_E [r, 1]                the diagonal
...<projection>.lora_B [out, r]              LowRank.b, times lora_alpha / (init_r + 1e-5)

PEFT divides by the rank that the adapter began with, however many of its ranks were kept, and r may be 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import bad_config, read_map, read_number, read_rank, shown
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.lora_config import KEYS as LORA_KEYS
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Shapes, Wanted
from loraplex.adapters.image.tiles import Part

_EPSILON = 1e-5
"""PEFT adds it to the rank that it divides by."""


@dataclass(frozen=True)
class AdaLoraConfig(AdapterConfig):
    """What inference needs of an AdaLoRA adapter's config."""

    rank: int  # that all modules began with
    alpha: float
    kept: tuple[tuple[str, int], ...]  # (path of a module, ranks that are left of it); others have all


class AdaLora(ModuleKind[AdaLoraConfig]):
    """y += lora_alpha / (init_r + 1e-5) * B diag(E) A x."""

    name = "adalora"
    label = "AdaLoRA"
    keys = module_keys(
        *("init_r", "lora_alpha", "rank_pattern", "bias"),
        no_bearing={
            *LORA_KEYS.no_bearing,
            *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
            *(
                "r",
                "alpha_pattern",
                "use_rslora",
                "init_lora_weights",
            ),  # of LoRA's, which AdaLoRA's layers do not look at
        },
        unsupported={
            **LORA_KEYS.unsupported,
            "use_dora": "AdaLoRA has no magnitudes",
            "lora_bias": "AdaLoRA has no bias of its own",
            "kasa_config": "AdaLoRA leaves the base's weights as they are",
            "use_bdlora": "AdaLoRA has no blocks",
            "alora_invocation_tokens": "AdaLoRA acts from the first token on",
            "target_parameters": "AdaLoRA is of modules alone",
        },
    )
    leaves = ("lora_A", "lora_E", "lora_B")

    def read(self, raw: Mapping[str, Any]) -> AdaLoraConfig:
        common = read_common(self, raw)
        rank = read_rank(raw.get("init_r", 12), "init_r")
        alpha = read_number(raw.get("lora_alpha", 8), "lora_alpha")
        return AdaLoraConfig(
            **common,
            rank=rank,
            alpha=alpha if alpha > 0 else float(rank),
            kept=tuple(sorted(_kept(name, kept, rank) for name, kept in read_map(raw, "rank_pattern"))),
        )

    def wanted(self, config: AdaLoraConfig, module: FoundModule, match: Matcher) -> Wanted:
        rank = dict(config.kept).get(module.path, config.rank)
        projection = module.projection
        shapes = {"lora_A": (rank, projection.in_features), "lora_E": (rank, 1)}
        shapes["lora_B"] = (projection.out_features, rank)
        return Wanted(shapes, rank) if rank else Wanted(shapes, kind=None)

    def shared_shapes(self, config: AdaLoraConfig, modules: Sequence[FoundModule]) -> Shapes:
        paths = {module.path for module in modules}
        for path, _ in config.kept:
            if path not in paths:
                raise bad_config(f"rank_pattern names {path!r}, which is not among the targeted modules")
        return {}

    def make(self, making: Making[AdaLoraConfig]) -> Part:
        config = making.config
        a = making.floats("lora_A") * making.floats("lora_E")
        return making.low_rank(a, making.floats("lora_B") * (config.alpha / (config.rank + _EPSILON)))


def _kept(name: str, kept: Any, rank: int) -> tuple[str, int]:
    """Read an entry of rank_pattern: "model.layers.0.self_attn.q_proj.lora_E" and which of its ranks are kept."""
    path, found, leaf = name.partition(".lora_E")
    if not found or (leaf and not leaf.startswith(".")):
        raise bad_config(f"rank_pattern has {shown(name)}; expected names of modules with .lora_E behind them")
    if not isinstance(kept, list) or len(kept) != rank or not all(isinstance(keep, bool) for keep in kept):
        raise bad_config(f"rank_pattern[{shown(name)}] is {shown(kept)}; expected {rank} times true or false")
    return path, sum(kept)
