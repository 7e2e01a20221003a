"""Compute rotary position embeddings: cosines and sines of a step's tokens, once per step and kind, not per layer.

Two kinds depend on how long a sequence is known to be, not only on a token's position:
    dynamic     the base grows with the length past max_position; keys already cached keep the rotation they got
    longrope    one set of frequencies up to original_max_position tokens, another past it; the switch turns every
                position's rotation, so whoever owns the cache recomputes the sequence when it is crossed (rope_switch)
The formulas are those of transformers' modeling_rope_utils, which tests/models/test_rotary.py compares with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

TABLE_BYTES = 4 << 20
"""Most of the cosines and sines of a kind that are kept, the first positions': 8192 of 64 elements, 4096 of 128.
Looking them up takes 55 us less of a decode step than computing them, where a step has swept the caches."""

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Describe one way to rotate. Fields that a kind does not use keep their default."""

    kind: str  # one of ROPE_KINDS
    theta: float  # the base
    rotary_dim: int  # elements of a head that are rotated: head_dim, or less (Phi-4-mini)
    max_position: int  # the model's; "dynamic" grows past it
    attention_scaling: float = 1.0  # times cos and sin (yarn, longrope)
    factor: float = 1.0
    original_max_position: int = 0  # tokens the model was first trained for (llama3, yarn, longrope)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # [rotary_dim / 2]
    long_factor: tuple[float, ...] = ()  # [rotary_dim / 2]

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], head_dim: int, max_position: int) -> RopeConfig:
        """Read transformers' normalised `rope_parameters`.

        Raises KeyError for a parameter that the kind needs and does not have, ValueError for one that makes no sense.
        """
        kind = parameters["rope_type"]
        rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        if kind not in ROPE_KINDS:
            raise ValueError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
        if rotary_dim <= 0 or rotary_dim > head_dim or rotary_dim % 2:
            raise ValueError(f"{rotary_dim} of {head_dim} elements of a head are rotated; expected an even number")
        optional: dict[str, Any] = {}
        if kind in ("linear", "dynamic", "llama3"):
            optional["factor"] = float(parameters["factor"])
        if kind in ("llama3", "yarn", "longrope"):
            optional["original_max_position"] = int(parameters["original_max_position_embeddings"])
        if kind == "llama3":
            optional["low_freq_factor"] = float(parameters["low_freq_factor"])
            optional["high_freq_factor"] = float(parameters["high_freq_factor"])
        if kind == "yarn":
            optional |= _yarn_fields(parameters, max_position)
        if kind == "longrope":
            optional |= _longrope_fields(parameters, max_position, rotary_dim)
        return cls(kind, float(parameters["rope_theta"]), rotary_dim, max_position, **optional)

    @property
    def switch(self) -> int | None:
        """Return the known tokens past which every position rotates differently; None when no length does that."""
        return self.original_max_position if self.kind == "longrope" else None


def _yarn_fields(parameters: Mapping[str, Any], max_position: int) -> dict[str, Any]:
    factor = parameters["factor"] or max_position / parameters["original_max_position_embeddings"]
    scaling = parameters.get("attention_factor")
    if scaling is None:
        mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and mscale_all:
            scaling = _yarn_scaling(factor, mscale) / _yarn_scaling(factor, mscale_all)
        else:
            scaling = _yarn_scaling(factor, 1.0)
    return {
        "factor": float(factor),
        "attention_scaling": float(scaling),
        "beta_fast": float(parameters.get("beta_fast") or 32.0),
        "beta_slow": float(parameters.get("beta_slow") or 1.0),
        "truncate": bool(parameters.get("truncate", True)),
    }


def _yarn_scaling(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope_fields(parameters: Mapping[str, Any], max_position: int, rotary_dim: int) -> dict[str, Any]:
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_position / original
    scaling = parameters.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original))
    fields: dict[str, Any] = {"factor": float(factor), "attention_scaling": float(scaling)}
    for name in ("short_factor", "long_factor"):
        fields[name] = tuple(float(value) for value in parameters[name])
        if len(fields[name]) != rotary_dim // 2:
            raise ValueError(f"longrope's {name} has {len(fields[name])} numbers, expected {rotary_dim // 2}")
    return fields


def inv_freq(config: RopeConfig, known: int) -> Tensor:
    """Compute the angle per position of each rotated pair, [rotary_dim / 2] fp32, for a sequence of `known` tokens."""
    dim = config.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if config.kind == "dynamic":
        growth = config.factor * max(known, config.max_position) / config.max_position - (config.factor - 1.0)
        return 1.0 / (config.theta * growth ** (dim / (dim - 2))) ** exponents
    if config.kind == "longrope":
        factors = config.long_factor if known > config.original_max_position else config.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * config.theta**exponents)
    plain = 1.0 / config.theta**exponents
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "yarn":
        return _yarn(config, plain)
    if config.kind == "llama3":
        return _llama3(config, plain)
    return plain


def _yarn(config: RopeConfig, plain: Tensor) -> Tensor:
    """Keep fast pairs (many turns in the original context), stretch slow pairs, blend linearly between them."""
    dim, theta = config.rotary_dim, config.theta
    stretched = 1.0 / (config.factor * theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))

    def pair_turning(turns: float) -> float:
        return dim * math.log(config.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(config.beta_fast), pair_turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return stretched * (1 - keep) + plain * keep


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Stretch wavelengths beyond the original context, keep short wavelengths, blend smoothly between them."""
    low, high = config.low_freq_factor, config.high_freq_factor
    wavelength = 2 * math.pi / plain
    blend = ((config.original_max_position / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / config.factor + blend * plain


def table_positions(config: RopeConfig) -> int:
    """Count the positions whose cosines and sines are kept: those whose angles depend on nothing else."""
    if config.kind == "longrope":
        return 0
    return min(config.max_position, TABLE_BYTES // (8 * config.rotary_dim))


class RotaryTable:
    """Look up cosines and sines of one RopeConfig, kept for the first positions, computed for steps that go further."""

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        lengths = (0,) if config.switch is None else (0, config.switch + 1)
        self._variants = self._both_halves(lengths)  # [1 or 2, rotary_dim]
        kept = torch.arange(table_positions(config), device=device)
        self._table = torch.stack(self._turn(kept, self._variants[:1]))  # [2, positions kept, rotary_dim]

    def gather(
        self, positions: Tensor, query_bounds: tuple[int, ...], rope_lens: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, rotary_dim] fp32 of positions [T] int64.

        query_bounds [B + 1] and rope_lens [B]: which tokens belong to which sequence, and its known length.
        """
        if max(rope_lens, default=0) <= self._table.shape[1]:
            cos, sin = self._table.index_select(1, positions)
            return cos, sin
        return self._turn(positions, self._frequencies(query_bounds, rope_lens))

    def _turn(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cos and sin [T, rotary_dim] fp32 of positions [T] int64 and frequencies [1 or T, rotary_dim]."""
        angles = positions.unsqueeze(1) * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._config.attention_scaling != 1.0:
            cos *= self._config.attention_scaling
            sin *= self._config.attention_scaling
        return cos, sin

    def _both_halves(self, lengths: Sequence[int]) -> Tensor:
        """Compute frequencies [len(lengths), rotary_dim]; elements i and i + rotary_dim / 2 turn together."""
        variants = torch.stack([inv_freq(self._config, n) for n in lengths])
        return torch.cat((variants, variants), -1).to(self._device)

    def _frequencies(self, query_bounds: tuple[int, ...], rope_lens: tuple[int, ...]) -> Tensor:
        """Pick frequencies [T, rotary_dim], or [1, rotary_dim] where all tokens share them."""
        config, variants = self._config, self._variants
        if config.kind == "longrope":
            rows = [int(known > config.original_max_position) for known in rope_lens]
        elif config.kind == "dynamic" and max(rope_lens, default=0) > config.max_position:
            lengths = sorted({max(known, config.max_position) for known in rope_lens})
            rows = [lengths.index(max(known, config.max_position)) for known in rope_lens]
            variants = self._both_halves(lengths)
        else:
            return variants
        if len(set(rows)) == 1:
            return variants[rows[0] : rows[0] + 1]
        counts = [stop - start for start, stop in pairwise(query_bounds)]
        row_of_token = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        return variants[torch.tensor(row_of_token, device=self._device)]
