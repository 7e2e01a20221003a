"""VeRA and PVeRA as PEFT saves them: one random A and B for all modules, and two trained vectors for each.

adapter_model.safetensors                             what it becomes
base_model.vera_A [r, widest input]                   LowRank.a: its first columns, a row times lambda_d
base_model.vera_B [widest output, r]                  LowRank.b: its first rows, a row times lambda_b
...<projection>.vera_lambda_d [r]
...<projection>.vera_lambda_b [out]

Where the file is without A and B (save_projection false) they are drawn again from projection_prng_key, as PEFT does.
PVeRA's A and lambda_d have 2 r rows: those of the mean, which is what inference takes, and those of the variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import Keys, read_flag, read_rank, read_seed
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule, ServedBase
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Shapes, Wanted
from loraplex.adapters.image.tiles import Part


@dataclass(frozen=True)
class VeraConfig(AdapterConfig):
    """What inference needs of a VeRA or PVeRA adapter's config."""

    rank: int
    seed: int | None  # of A and B; None: they are in the file


def _keys(dropout: str, *no_bearing: str, **unsupported: str) -> Keys:
    return module_keys(
        *("r", "projection_prng_key", "save_projection", "bias"),
        no_bearing=(dropout, "d_initial", "fan_in_fan_out", "init_weights", *no_bearing),
        unsupported=unsupported,
    )


class Vera(ModuleKind[VeraConfig]):
    """y += lambda_b * (B (lambda_d * (A x))), A and B cut to the module's input and output."""

    name = "vera"
    label = "VeRA"
    leaves = ("vera_lambda_b", "vera_lambda_d")
    keys = _keys("vera_dropout")
    prefix = "vera"
    rows = 1
    """Of A and lambda_d for each rank."""

    def read(self, raw: Mapping[str, Any]) -> VeraConfig:
        common = read_common(self, raw)
        seed = read_seed(raw.get("projection_prng_key", 0), "projection_prng_key")
        saved = raw.get("save_projection") is None or read_flag(raw, "save_projection")
        return VeraConfig(**common, rank=read_rank(raw.get("r", 256), "r"), seed=None if saved else seed)

    def wanted(self, config: VeraConfig, module: FoundModule, match: Matcher) -> Wanted:
        lambda_b, lambda_d = self.leaves
        return Wanted({lambda_b: (module.projection.out_features,), lambda_d: (self.rows * config.rank,)}, config.rank)

    def shared_role(self, name: str) -> str | None:
        return name if name in (f"{self.prefix}_A", f"{self.prefix}_B") else None

    def shared_shapes(self, config: VeraConfig, modules: Sequence[FoundModule]) -> Shapes:
        return {} if config.seed is not None else self._shapes(config, modules)

    def share(
        self, config: VeraConfig, modules: Sequence[AdapterModule], found: Mapping[str, Tensor], base: ServedBase
    ) -> Mapping[str, Tensor]:
        if config.seed is None:
            return found
        generator = torch.Generator().manual_seed(config.seed)
        return {role: _kaiming(shape, generator) for role, shape in self._shapes(config, modules).items()}

    def making_bytes(self, config: VeraConfig, modules: Sequence[AdapterModule]) -> int:
        drawn = 0 if config.seed is None else sum(map(math.prod, self._shapes(config, modules).values()))
        return super().making_bytes(config, modules) + 4 * drawn

    def make(self, making: Making[VeraConfig]) -> Part:
        rank, projection = making.config.rank, making.module.projection
        lambda_b, lambda_d = (making.floats(leaf) for leaf in self.leaves)
        a = making.shared[f"{self.prefix}_A"][:rank, : projection.in_features].float()
        b = making.shared[f"{self.prefix}_B"][: projection.out_features].float()
        return making.low_rank(a * lambda_d[:rank, None], b * lambda_b[:, None])

    def _shapes(self, config: VeraConfig, modules: Sequence[FoundModule] | Sequence[AdapterModule]) -> Shapes:
        """Of A and B: as wide as the widest of the modules."""
        widest = max(module.projection.in_features for module in modules)
        longest = max(module.projection.out_features for module in modules)
        a, b = (self.rows * config.rank, widest), (longest, config.rank)
        return {f"{self.prefix}_A": a, f"{self.prefix}_B": b}


class Pvera(Vera):
    """VeRA whose A x is the mean of a distribution; served is the mean, as PEFT does unless it is told to sample."""

    name = "pvera"
    label = "PVeRA"
    leaves = ("pvera_lambda_b", "pvera_lambda_d")
    keys = _keys(
        "pvera_dropout",
        "generator_seed",
        sample_at_inference="answers would be drawn at random; train or save it with false",
    )
    prefix = "pvera"
    rows = 2


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw [rows, columns] fp32 evenly from +- sqrt(6 / columns): torch's kaiming_uniform_, which PEFT takes."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
