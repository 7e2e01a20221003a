"""Read adapter_config.json within bounds, and refuse by name what is not understood in it.

Every key is used, known to have no bearing on inference, or refused: a key that nobody here knows might change the
answer. Which key is which is for each kind of adapter to say (Keys).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files.bounded_json import parse_json

MAX_BYTES = 1 << 20
"""Of the file; hundreds of full module names in target_modules are some 50 KB."""

MAX_VALUES = 1 << 16
"""Of the file: see bounded_json.parse_json()."""

OWN_KEYS = frozenset({"modules_to_save", "trainable_token_indices", "ensure_weight_tying"})
"""Keys of all kinds about modules outside the linears, which outside.py reads and not the kind."""

COMMON_NO_BEARING = OWN_KEYS | {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config")
}
"""Keys of all kinds that are about the training run or the base's name, and OWN_KEYS."""

TASK = "task_id"
"""The key that says which of an adapter's tasks is asked for."""

MAX_COUNT = 1 << 40
"""Of anything, as of a tensor's sizes (header.MAX_DIMENSION); what is computed that often has a bound of its own."""

MAX_RANK = 1024
"""Ranks above are no low-rank adapters any more, and one module of them would fill an arena."""

_FP32_MAX = 3.4e38


@dataclass(frozen=True)
class Keys:
    """What the keys of one kind's config mean to inference."""

    used: frozenset[str]
    no_bearing: frozenset[str]
    unsupported: Mapping[str, str] = field(default_factory=dict)  # key -> why it is refused once it is set

    def check(self, raw: Mapping[str, Any]) -> None:
        """Refuse options that are not served. Raises AdapterRefused("unsupported_option"), which names the option."""
        for key, why in self.unsupported.items():
            if raw.get(key):
                raise unsupported(f"{key} is {shown(raw[key])}, which is not supported: {why}")
        for key, value in raw.items():
            if value and key not in self.used and key not in self.no_bearing:
                raise unsupported(
                    f"{key} is {shown(value)}; this option is not known here and might change the answers; remove it "
                    "from the file if it does not"
                )


def read_config(data: bytes) -> dict[str, Any]:
    """Parse the file's bytes. Raises AdapterRefused("bad_config")."""
    try:
        raw = parse_json(data, MAX_BYTES, MAX_VALUES)
    except ValueError as error:
        raise bad_config(f"not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise bad_config(f"holds a {type(raw).__name__}, expected an object")
    return raw


def read_names(raw: Mapping[str, Any], key: str) -> str | tuple[str, ...]:
    """Read a pattern or a list of names; () where the key is not set. Raises AdapterRefused("bad_config")."""
    value = raw.get(key)
    if value is None:
        return ()
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise bad_config(f"{key} is {shown(value)}; expected a string or a list of strings")
    return tuple(value)


def read_map(raw: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    """Read an object's entries, in order. Raises AdapterRefused("bad_config")."""
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise bad_config(f"{key} is {shown(value)}; expected an object of patterns and numbers")
    return list(value.items())


def read_flag(raw: Mapping[str, Any], key: str) -> bool:
    """Read a boolean; null and an absent key are false. Raises AdapterRefused("bad_config")."""
    value = raw.get(key)
    if not isinstance(value, bool | None):
        raise bad_config(f"{key} is {shown(value)}; expected true or false")
    return bool(value)


def read_word(raw: Mapping[str, Any], key: str, known: Iterable[str]) -> str:
    """Read one of the words `known`. Raises AdapterRefused("bad_config")."""
    value = raw.get(key)
    if not isinstance(value, str) or value not in known:
        raise bad_config(f"{key} is {shown(value)}; expected one of {', '.join(known)}")
    return value


def read_number(value: Any, key: str) -> float:
    """Read a number within fp32's range. Raises AdapterRefused("bad_config")."""
    # PEFT itself divides by r in doubles; what is beyond fp32 is a mistake
    if type(value) not in (int, float) or not -_FP32_MAX <= value <= _FP32_MAX:
        raise bad_config(f"{key} is {shown(value)}; expected a number")
    return float(value)


def read_count(value: Any, key: str, most: int = MAX_COUNT) -> int:
    """Read a whole number from 1 to `most`. Raises AdapterRefused("bad_config")."""
    if type(value) is not int or not 1 <= value <= most:
        raise bad_config(f"{key} is {shown(value)}; expected a whole number from 1 to {most}")
    return value


def read_seed(value: Any, key: str) -> int:
    """Read the seed of a generator, a whole number from 0. Raises AdapterRefused("bad_config")."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise bad_config(f"{key} is {shown(value)}; expected a whole number from 0")
    return value


def read_rank(value: Any, key: str) -> int:
    """Read a whole number from 1 to MAX_RANK. Raises AdapterRefused: "bad_config", "too_large"."""
    rank = read_count(value, key)
    if rank > MAX_RANK:
        raise AdapterRefused("too_large", f"adapter_config.json: {key} is {rank}; ranks up to {MAX_RANK} are served")
    return rank


def read_ranks(raw: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """Read rank_pattern: (pattern, rank), the first match counts. Raises AdapterRefused: "bad_config", "too_large"."""
    return tuple((key, read_rank(rank, f"rank_pattern[{key!r}]")) for key, rank in read_map(raw, "rank_pattern"))


def read_counts(raw: Mapping[str, Any], key: str) -> tuple[tuple[str, int], ...]:
    """Read an object of (pattern, whole number from 1), the first match counts. Raises AdapterRefused("bad_config")."""
    return tuple((pattern, read_count(count, f"{key}[{pattern!r}]")) for pattern, count in read_map(raw, key))


def read_alphas(raw: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """Read alpha_pattern: (pattern, alpha), the first match counts. Raises AdapterRefused("bad_config")."""
    return tuple((key, read_number(alpha, f"alpha_pattern[{key!r}]")) for key, alpha in read_map(raw, "alpha_pattern"))


def read_task(raw: Mapping[str, Any], key: str, tasks: int) -> int:
    """Read which of `tasks`, the value of `key`, is asked for, which PEFT is told at each call and writes nowhere.

    Raises AdapterRefused: "bad_config", "needs_setting".
    """
    value = raw.get(TASK)
    if value is None and tasks > 1:
        raise AdapterRefused(
            "needs_setting",
            f"adapter_config.json: {key} is {tasks}, and the files do not say which task is asked for; set "
            f'"{TASK}" in adapter_config.json, a number below {tasks}',
        )
    task = 0 if value is None else value
    if type(task) is not int or not 0 <= task < tasks:
        raise bad_config(f"{TASK} is {shown(task)}; expected a whole number below {key}, {tasks}")
    return task


def check_ranks(ranks: int, rank: int) -> int:
    """Return `ranks`, what an adapter of the config's `rank` comes to. Raises AdapterRefused("too_large")."""
    if ranks > MAX_RANK:
        raise AdapterRefused(
            "too_large",
            f"adapter_config.json: rank {rank} comes to {ranks} ranks of a LoRA when it is served exactly, and up to "
            f"{MAX_RANK} are; convert it to LoRA with PEFT and look at the error, or train it with a lower rank",
        )
    return ranks


def read_biases(raw: Mapping[str, Any]) -> str:
    """Read which biases of the base were trained: "none", "all", or "only" those of the targeted modules.

    Raises AdapterRefused("bad_config").
    """
    bias = raw.get("bias") or "none"
    if isinstance(bias, str) and bias.endswith("_only"):
        return "only"  # "hra_only": each kind has its own word for it
    if bias not in ("none", "all"):
        raise bad_config(f"bias is {shown(bias)}; expected 'none', 'all', or a kind's name and '_only'")
    return str(bias)


def read_base_model(raw: Mapping[str, Any]) -> str | None:
    """Read the name of the base that the adapter was trained on, where the config has one."""
    name = raw.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def bad_config(message: str) -> AdapterRefused:
    """Make the refusal of a value that cannot be."""
    return AdapterRefused("bad_config", f"adapter_config.json: {message}")


def unsupported(message: str) -> AdapterRefused:
    """Make the refusal of an option that is not served."""
    return AdapterRefused("unsupported_option", f"adapter_config.json: {message}")


def shown(value: Any) -> str:
    """Write a value out for a message: 80 characters at most."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
