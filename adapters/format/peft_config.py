"""adapter_config.json of a PEFT LoRA adapter: which keys mean what to inference, and which modules it targets.

Every key is used, known to have no bearing on inference, or refused: a key nobody here knows might change the answer.
The matching rules are PEFT's own (peft/tuners/tuners_utils.py: check_target_module_exists; peft/utils/other.py:
get_pattern_key). Patterns come from strangers, so they are matched within bounds (patterns.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files.bounded_json import parse_json
from loraplex.adapters.files.patterns import Matcher

MAX_RANK = 1024
"""Ranks above are no low-rank adapters any more, and one module of them would fill an arena."""

PATTERN_SECONDS = 1.0
"""Of a core, for all patterns of one adapter over all modules of the base; sane ones take a few milliseconds."""

MAX_BYTES = 1 << 20
"""Of the file; hundreds of full module names in target_modules are some 50 KB."""

MAX_VALUES = 1 << 16
"""Of the file: see bounded_json.parse_json()."""

_USED = frozenset(
    {
        *("peft_type", "base_model_name_or_path", "init_lora_weights"),
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    }
)

_NO_BEARING = frozenset(
    {
        # about the training run or the base's name
        *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config", "lora_dropout"),
        *("merge_weights", "megatron_core", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
        # details of an option that is itself used or refused
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
        "fan_in_fan_out",  # how the base stores its weight; A and B are [r, in] and [out, r] either way
        "ensure_weight_tying",  # concerns embed_tokens and lm_head only, which are refused as targets
    }
)

_UNSUPPORTED: Mapping[str, str] = {
    "use_dora": "DoRA scales the base's weight as well; merge it into LoRA with PEFT, or train without it",
    "alora_invocation_tokens": "an activated LoRA (aLoRA) acts from its invocation tokens on only",
    "modules_to_save": "whole modules trained beside the adapter are not served; train without modules_to_save",
    "trainable_token_indices": "trained rows of the embedding table are not served",
    "target_parameters": "LoRA on bare parameters (mixture-of-experts weights) is not served",
    "layer_replication": "the adapter is for a base with repeated layers",
    "use_qalora": "QA-LoRA pools the input before A",
    "use_bdlora": "BD-LoRA stores A or B block by block",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA changes the base's weights",
    "velora_config": "VeLoRA adapters are not supported; convert to plain LoRA with PEFT",
    "monteclora_config": "MonteCLoRA adapters are not supported; convert to plain LoRA with PEFT",
    "megatron_config": "adapters of Megatron's parallel layers are not supported",
    "enable_lora": "merged linears of early PEFT are not supported",
}

_FP32_MAX = 3.4e38

_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # they took their part out of the base's weights


@dataclass(frozen=True)
class LoraConfig:
    """What inference needs of adapter_config.json, types and ranges checked."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]  # (pattern, rank), the first match counts
    alpha_pattern: tuple[tuple[str, float], ...]
    target_modules: str | tuple[str, ...]  # a pattern over whole paths, "all-linear", or names (ends of paths)
    exclude_modules: str | tuple[str, ...]
    layers: frozenset[int] | None  # layers_to_transform
    layers_pattern: tuple[str, ...]
    bias: str  # "none", "lora_only" or "all"
    lora_bias: bool
    base_model: str | None


@dataclass(frozen=True)
class ModulePlan:
    """What the config says about one targeted module."""

    rank: int
    scaling: float  # alpha / r, or alpha / sqrt(r) with rsLoRA


def parse_config(data: bytes) -> LoraConfig:
    """The checked content of adapter_config.json.

    Raises AdapterRefused: "bad_config", "unsupported_kind" (not LoRA), "unsupported_option", "too_large" (rank).
    """
    raw = _read_json(data)
    kind = raw.get("peft_type")
    if not isinstance(kind, str):  # nothing in it is shown before it says that it is PEFT's
        found = "not there" if kind is None else f"a {type(kind).__name__}"
        raise _bad(f"peft_type is {found}, expected 'LORA'; is this the adapter_config.json of a PEFT adapter?")
    if kind.upper() != "LORA":
        raise AdapterRefused(
            "unsupported_kind", f"adapter_config.json: peft_type is {kind[:40]!r}; supported is 'LORA'"
        )
    _refuse_unsupported(raw)
    layers = _layers(raw)
    target_modules = _names(raw, "target_modules")
    if not target_modules:
        raise _bad("target_modules names no module; expected a list of names, a pattern, or 'all-linear'")
    if isinstance(target_modules, str) and layers is not None:
        raise _bad("layers_to_transform is set while target_modules is a pattern; PEFT wants a list of names there")
    bias = raw.get("bias") or "none"
    if bias not in ("none", "lora_only", "all"):
        raise _bad(f"bias is {_show(bias)}; expected 'none', 'lora_only' or 'all'")
    layers_pattern = _names(raw, "layers_pattern")
    base_model = raw.get("base_model_name_or_path")
    return LoraConfig(
        rank=_rank(raw.get("r", 8), "r"),
        alpha=_number(raw.get("lora_alpha", 8), "lora_alpha"),
        rslora=_flag(raw, "use_rslora"),
        rank_pattern=tuple((key, _rank(rank, f"rank_pattern[{key!r}]")) for key, rank in _map(raw, "rank_pattern")),
        alpha_pattern=tuple((key, _number(a, f"alpha_pattern[{key!r}]")) for key, a in _map(raw, "alpha_pattern")),
        target_modules=target_modules,
        exclude_modules=_names(raw, "exclude_modules"),
        layers=layers,
        layers_pattern=(layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern,
        bias=bias,
        lora_bias=_flag(raw, "lora_bias"),
        base_model=base_model if isinstance(base_model, str) and base_model else None,
    )


def plan_modules(
    config: LoraConfig, paths: Iterable[str], others: Iterable[str], throttle: Callable[[], None] = lambda: None
) -> dict[str, ModulePlan]:
    """Of the modules `paths` (as PEFT sees them: "model.layers.0.self_attn.q_proj"), those the adapter targets.

    `others` are modules the base has outside its layers, which cannot be targeted yet. `breathe` is called between
    pieces of work. Raises AdapterRefused: "unsupported_option" for a target among `others`; "bad_config" for a pattern
    that is not valid or takes too long, for a name in target_modules that the base does not have, and when nothing is
    targeted.
    """
    paths, others = tuple(paths), tuple(others)
    match = Matcher(PATTERN_SECONDS, throttle)
    targets = _Targets(config, match)
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    for path in others:  # PEFT's "all-linear" leaves the head out, and a table is not linear
        if not all_linear and targets.have(path):
            raise AdapterRefused(
                "unsupported_option",
                f"adapter_config.json: target_modules takes in {path}, which is not supported; train without it",
            )
    if not isinstance(config.target_modules, str):
        known = {tail for path in paths + others for tail in _tails(path)}
        for name in config.target_modules:
            if name not in known:
                raise _bad(f"target_modules names {name!r}, which the base does not have; it has {_ends(paths)}")
    plans = {path: _plan(config, path, match) for path in paths if targets.have(path)}
    if not plans:
        raise _bad(f"target_modules and its kin leave no module of the base, which has {_ends(paths)}")
    return plans


class _Targets:
    """Which modules target_modules, exclude_modules and layers_to_transform leave."""

    def __init__(self, config: LoraConfig, match: Matcher) -> None:
        self._config = config
        self._match = match
        self._named = frozenset(() if isinstance(config.target_modules, str) else config.target_modules)
        self._unnamed = frozenset(() if isinstance(config.exclude_modules, str) else config.exclude_modules)

    def have(self, path: str) -> bool:
        targets, excluded = self._config.target_modules, self._config.exclude_modules
        if isinstance(excluded, str):
            if self._match.full("exclude_modules", excluded, path):
                return False
        elif not self._unnamed.isdisjoint(_tails(path)):
            return False
        if isinstance(targets, str):
            return targets.lower() == "all-linear" or self._match.full("target_modules", targets, path)
        if path in self._named:
            return True  # a whole path is meant as it stands: PEFT does not look at layers_to_transform then
        if self._named.isdisjoint(_tails(path)):
            return False
        return self._config.layers is None or self._layer(path) in self._config.layers

    def _layer(self, path: str) -> int | None:
        if not self._config.layers_pattern:
            return self._match.index("layers_pattern", r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
        for pattern in self._config.layers_pattern:
            layer = self._match.index("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path)
            if layer is not None:
                return layer
        return None


def _tails(path: str) -> Iterator[str]:
    """All that a module may be named by: "model.layers.0.mlp", "layers.0.mlp", "0.mlp", "mlp"."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def _plan(config: LoraConfig, path: str, match: Matcher) -> ModulePlan:
    rank = next((r for key, r in config.rank_pattern if match.end("rank_pattern", key, path)), config.rank)
    alpha = next((a for key, a in config.alpha_pattern if match.end("alpha_pattern", key, path)), config.alpha)
    return ModulePlan(rank, alpha / math.sqrt(rank) if config.rslora else alpha / rank)


def _read_json(data: bytes) -> dict[str, Any]:
    try:
        raw = parse_json(data, MAX_BYTES, MAX_VALUES)
    except ValueError as error:
        raise _bad(f"not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise _bad(f"holds a {type(raw).__name__}, expected an object")
    return raw


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    for key, why in _UNSUPPORTED.items():
        if raw.get(key):
            raise AdapterRefused(
                "unsupported_option", f"adapter_config.json: {key} is {_show(raw[key])}, which is not supported: {why}"
            )
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_RESIDUAL_INITS):
        raise AdapterRefused(
            "unsupported_option",
            f"adapter_config.json: init_lora_weights is {init!r}, which took the adapter's start out of the base's "
            "weights, so the adapter is wrong on the base as it is; save it again with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), which makes it a plain LoRA",
        )
    if not isinstance(init, bool | None) and (not isinstance(init, str) or init.lower() not in _PLAIN_INITS):
        raise AdapterRefused(
            "unsupported_option", f"adapter_config.json: init_lora_weights is {_show(init)}, which is not known here"
        )
    for key, value in raw.items():
        if value and key not in _USED and key not in _NO_BEARING:
            raise AdapterRefused(
                "unsupported_option",
                f"adapter_config.json: {key} is {_show(value)}; this option is not known here and might change the "
                "answers; remove it from the file if it does not",
            )


def _layers(raw: dict[str, Any]) -> frozenset[int] | None:
    value = raw.get("layers_to_transform")
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise _bad(f"layers_to_transform is {_show(value)}; expected a layer's number or a list of them")
    return frozenset(layers)


def _names(raw: dict[str, Any], key: str) -> str | tuple[str, ...]:
    value = raw.get(key)
    if value is None:
        return ()
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise _bad(f"{key} is {_show(value)}; expected a string or a list of strings")
    return tuple(value)


def _map(raw: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise _bad(f"{key} is {_show(value)}; expected an object of patterns and numbers")
    return list(value.items())


def _rank(value: Any, key: str) -> int:
    if type(value) is not int or value < 1:
        raise _bad(f"{key} is {_show(value)}; expected a whole number from 1")
    if value > MAX_RANK:
        raise AdapterRefused("too_large", f"adapter_config.json: {key} is {value}; ranks up to {MAX_RANK} are served")
    return value


def _number(value: Any, key: str) -> float:
    # PEFT itself divides by r in doubles; what is beyond fp32 is a mistake
    if type(value) not in (int, float) or not -_FP32_MAX <= value <= _FP32_MAX:
        raise _bad(f"{key} is {_show(value)}; expected a number")
    return float(value)


def _flag(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key)
    if not isinstance(value, bool | None):
        raise _bad(f"{key} is {_show(value)}; expected true or false")
    return bool(value)


def _bad(message: str) -> AdapterRefused:
    return AdapterRefused("bad_config", f"adapter_config.json: {message}")


def _show(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def _ends(paths: Iterable[str]) -> str:
    """The last parts of module paths, each once, in order: what a config may name."""
    return ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
