"""What the config of a PEFT LoRA adapter says: ranks and scalings of the modules it targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format import targets
from loraplex.adapters.format.common import module_keys
from loraplex.adapters.format.config import (
    bad_config,
    check_ranks,
    read_alphas,
    read_base_model,
    read_biases,
    read_flag,
    read_names,
    read_number,
    read_rank,
    read_ranks,
    shown,
    unsupported,
)
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.lora_blocks import BlockDiagonal, Blocks, read_blocks
from loraplex.adapters.format.lora_start import KASA, REMARK, STARTS

KEYS = module_keys(
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_bias", "use_dora"),
    *("init_lora_weights", "kasa_config", "use_bdlora", "target_parameters", "alora_invocation_tokens"),
    no_bearing=(
        *("lora_dropout", "merge_weights", "megatron_core", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
        # details of an option that is itself used or refused
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
        "fan_in_fan_out",  # how the base stores its weight; A and B are [r, in] and [out, r] either way
    ),
    unsupported={
        "layer_replication": "the adapter is for a base with repeated layers",
        "use_qalora": "QA-LoRA pools the input before A",
        "arrow_config": "Arrow routes between several adapters",
        "velora_config": "VeLoRA adapters are not supported; convert to plain LoRA with PEFT",
        "monteclora_config": "MonteCLoRA adapters are not supported; convert to plain LoRA with PEFT",
        "megatron_config": "adapters of Megatron's parallel layers are not supported",
        "enable_lora": "merged linears of early PEFT are not supported",
    },
)

INVOKED = "it acts from the last occurrence of its invocation tokens {} in a prompt on; one without them is the base's"

MAX_INVOCATION = 1024
"""Tokens; those in use are a handful, the head of a turn."""

_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # they took their part out of the base's weights


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """What inference needs of a LoRA adapter's config."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]  # (pattern, rank), the first match counts
    alpha_pattern: tuple[tuple[str, float], ...]
    lora_bias: bool
    dora: bool
    start: str = ""  # what was taken out of the base's weights before training: one of STARTS, or KASA
    blocks: BlockDiagonal | None = None  # of modules' A or B; None: they have none
    invoked_by: tuple[int, ...] = ()  # aLoRA: tokens from whose last occurrence in a prompt on it acts

    @property
    def rank_factor(self) -> int:
        """Ranks in an image for each of the file's: a start that is taken out again has as many."""
        return 2 if self.start else 1

    @property
    def factors_alone(self) -> bool:
        """Whether the file's A and B, scaled, are all that such an adapter adds."""
        return not (self.start or self.dora or self.blocks or self.invoked_by)

    @property
    def remark(self) -> str:
        """Say how close a start is taken out again, and from where on an activated LoRA acts."""
        if self.invoked_by:
            return INVOKED.format(list(self.invoked_by))
        return REMARK.format(self.start) if self.start else ""

    @property
    def invocation(self) -> tuple[int, ...]:
        """Return aLoRA's invocation tokens."""
        return self.invoked_by

    def same_shapes(self) -> LoraConfig:
        """Without the scaling, unless there are patterns of it, which have to be looked at."""
        return self if self.alpha_pattern else replace(self, alpha=1.0, rslora=False)


@dataclass(frozen=True)
class ModulePlan:
    """What the config says about one targeted module."""

    rank: int
    scaling: float  # alpha / r, or alpha / sqrt(r) with rsLoRA
    blocks: Blocks | None = None  # of A or B


def read_lora_config(raw: Mapping[str, Any]) -> LoraConfig:
    """Read the config's object. Raises AdapterRefused: "bad_config", "unsupported_option", "too_large" (rank)."""
    KEYS.check(raw)
    start = _read_start(raw.get("init_lora_weights", True))
    if raw.get("kasa_config"):
        if start:
            raise unsupported(f"kasa_config is set beside init_lora_weights {start!r}; expected one of them")
        start = KASA
    bias = read_biases(raw)
    dora, lora_bias = read_flag(raw, "use_dora"), read_flag(raw, "lora_bias")
    if dora and lora_bias:
        raise unsupported("use_dora and lora_bias are both true, which PEFT does not train; expected one of them")
    if dora and start:
        raise unsupported(
            f"use_dora beside a start out of the base's weights ({start}) is not served; train one of them"
        )
    blocks, parameters = _read_variants(raw, bias, start)
    invoked_by = _read_invocation(raw)
    for key, found in (
        ("use_dora", dora),
        ("kasa_config" if start == KASA else "init_lora_weights", start),
        ("bias", bias != "none" and bias),
        ("use_bdlora", blocks),
        ("target_parameters", parameters),
    ):
        if invoked_by and found:
            raise unsupported(
                f"{key} is {shown(raw.get(key, found))} beside alora_invocation_tokens; an activated LoRA (aLoRA) "
                "leaves the base as it is before its invocation, and so it is served with A and B alone"
            )
    return LoraConfig(
        kind="lora",
        targets=targets.read_targets(raw, by_layer=True, parameters=parameters),
        base_model=read_base_model(raw),
        rank=read_rank(raw.get("r", 8), "r"),
        alpha=read_number(raw.get("lora_alpha", 8), "lora_alpha"),
        rslora=read_flag(raw, "use_rslora"),
        rank_pattern=read_ranks(raw),
        alpha_pattern=read_alphas(raw),
        bias=bias,
        lora_bias=lora_bias,
        dora=dora,
        start=start,
        blocks=blocks,
        invoked_by=invoked_by,
    )


def plan_modules(
    config: LoraConfig,
    paths: Iterable[str],
    others: Iterable[str],
    throttle: Callable[[], None] = lambda: None,
    tied: bool = False,
) -> dict[str, ModulePlan]:
    """Plan rank and scaling of the modules of `paths` that the config targets; arguments and errors of find_targets().

    `throttle` is called between pieces of work. tied: who has one of the base's tables has both.
    """
    paths, match = tuple(paths), Matcher(targets.PATTERN_SECONDS, throttle)
    found = targets.find_targets(config.targets, paths, others, match)
    if tied and any(path.endswith(targets.TABLES) for path in found):
        found += [path for path in paths if path.endswith(targets.TABLES) and path not in found]
    return {path: _plan(config, path, match) for path in found}


def _plan(config: LoraConfig, path: str, match: Matcher) -> ModulePlan:
    key = f"{path}.weight" if config.targets.has_parameter(path) else path  # what PEFT's patterns see
    rank = match.first("rank_pattern", config.rank_pattern, key, config.rank)
    alpha = match.first("alpha_pattern", config.alpha_pattern, key, config.alpha)
    check_ranks(rank * config.rank_factor, rank)
    side = config.blocks.side(path) if config.blocks else ""
    blocks = Blocks(side, config.blocks.count) if config.blocks and side else None
    return ModulePlan(rank, alpha / math.sqrt(rank) if config.rslora else alpha / rank, blocks)


def _read_variants(raw: Mapping[str, Any], bias: str, start: str) -> tuple[BlockDiagonal | None, tuple[str, ...]]:
    """Read use_bdlora and target_parameters, and refuse what PEFT does not train beside them."""
    blocks, parameters = read_blocks(raw), read_names(raw, "target_parameters")
    variants = ("use_dora", "lora_bias", "alora_invocation_tokens")
    beside = [key for key in variants if raw.get(key)] + ([start] if start else [])
    if blocks and (parameters or beside):
        raise unsupported(
            f"use_bdlora beside {', '.join(beside or ['target_parameters'])} is not served; train one alone"
        )
    if parameters and (beside or bias != "none"):
        beside += [f"bias {bias!r}"] if bias != "none" else []
        raise unsupported(f"target_parameters beside {', '.join(beside)} is not served; train one alone")
    return blocks, (parameters,) if isinstance(parameters, str) else parameters


def _read_invocation(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Read alora_invocation_tokens; () where they are not set."""
    value = raw.get("alora_invocation_tokens")
    if value is None:
        return ()
    if not isinstance(value, list) or not 0 < len(value) <= MAX_INVOCATION:
        raise bad_config(
            f"alora_invocation_tokens is {shown(value)}; expected a list of 1 to {MAX_INVOCATION} ids of tokens"
        )
    if any(type(token) is not int or not 0 <= token < 1 << 31 for token in value):
        raise bad_config(f"alora_invocation_tokens is {shown(value)}; expected ids of tokens, whole numbers from 0")
    return tuple(value)


def _read_start(init: Any) -> str:
    """Read init_lora_weights: what the adapter began with that has to be taken out again, "" for nothing."""
    if isinstance(init, str) and init.lower() in STARTS:
        return init.lower()
    if isinstance(init, str) and init.lower().startswith(_RESIDUAL_INITS):
        raise unsupported(
            f"init_lora_weights is {init!r}, which took the adapter's start out of the base's weights with random "
            "numbers or data, so that it cannot be computed again; save it again with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), which makes it a plain LoRA"
        )
    if not isinstance(init, bool | None) and (not isinstance(init, str) or init.lower() not in _PLAIN_INITS):
        raise unsupported(f"init_lora_weights is {shown(init)}, which is not known here")
    return ""
