"""RandLoRA as PEFT saves it: a change of full rank, a weighted sum of random products of rank r.

adapter_model.safetensors                        what it becomes
...<projection>.randlora_lambda [r, n]           DenseDelta: alpha / r times the sum over k < n of B[:, k] A_k, A_k
...<projection>.randlora_gamma [n, least]        being A with its rows scaled by lambda[:, k] and its columns by
base_model.randlora_A [r, 1, narrowest]          gamma[k]; or that transposed, for A is of the module's smaller side,
base_model.randlora_B [widest, most n, r]        `least` wide, and B of the larger; n = ceil(least / r)
...<projection>.randlora_A, randlora_B           the same two once more for each module: not looked at
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import read_flag, read_number, read_rank, unsupported
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule, ModuleMap, ServedBase, Throttle
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Shapes, Wanted
from loraplex.adapters.image.tiles import Part
from loraplex.kernels.constants import TileKind
from loraplex.kernels.records import Projection

LAMBDA, GAMMA = "randlora_lambda", "randlora_gamma"
A, B = "randlora_A", "randlora_B"


@dataclass(frozen=True)
class RandLoraConfig(AdapterConfig):
    """What inference needs of a RandLoRA adapter's config."""

    rank: int  # of each product
    scaling: float


class Randlora(ModuleKind[RandLoraConfig]):
    """y += alpha / r * (sum over k of B_k diag(lambda_k) A diag(gamma_k)) x, or its transpose."""

    name = "randlora"
    label = "RandLoRA"
    keys = module_keys(
        *("r", "randlora_alpha", "save_projection", "bias"),
        no_bearing=(
            "projection_prng_key",
            "sparse",
            "very_sparse",
            "randlora_dropout",
            "fan_in_fan_out",
            "init_weights",
        ),
    )
    leaves = (LAMBDA, GAMMA)

    def read(self, raw: Mapping[str, Any]) -> RandLoraConfig:
        common = read_common(self, raw)
        if raw.get("save_projection") is not None and not read_flag(raw, "save_projection"):
            raise unsupported("save_projection is false, so the random products are not in the file; save it with true")
        rank = read_rank(raw.get("r", 32), "r")
        return RandLoraConfig(
            **common, rank=rank, scaling=read_number(raw.get("randlora_alpha", 640), "randlora_alpha") / rank
        )

    def plan(
        self, config: RandLoraConfig, header: Mapping[str, TensorInfo], base: ServedBase, throttle: Throttle
    ) -> ModuleMap:
        own = [name.rpartition(".") for name in header]
        copies = {f"{path}.{leaf}" for path, _, last in own if last in self.leaves for leaf in (A, B)}
        return super().plan(config, {n: info for n, info in header.items() if n not in copies}, base, throttle)

    def wanted(self, config: RandLoraConfig, module: FoundModule, match: Matcher) -> Wanted:
        least, _ = _sides(module.projection)
        count = -(-least // config.rank)
        return Wanted({LAMBDA: (config.rank, count), GAMMA: (count, least)}, kind=TileKind.DENSE)

    def shared_role(self, name: str) -> str | None:
        return name if name in (A, B) else None

    def shared_shapes(self, config: RandLoraConfig, modules: Sequence[FoundModule]) -> Shapes:
        out = max(module.projection.out_features for module in modules)
        width = max(module.projection.in_features for module in modules)
        least = min(out, width)
        return {A: (config.rank, 1, least), B: (max(out, width), -(-least // config.rank), config.rank)}

    def making_bytes(self, config: RandLoraConfig, modules: Sequence[AdapterModule]) -> int:
        """A and B of all products of a module, fp32, beside the change."""
        factors = max(sum(_sides(m.projection)) * (min(_sides(m.projection)) + config.rank) for m in modules)
        return super().making_bytes(config, modules) + 12 * factors

    def make(self, making: Making[RandLoraConfig]) -> Part:
        projection = making.module.projection
        least, most = _sides(projection)
        weights, columns = making.floats(LAMBDA), making.floats(GAMMA)  # [r, n], [n, least]
        small = weights[:, :, None] * making.shared[A][:, :, :least].float() * columns[None]
        # In the library's own order, whatever it pairs: of A ranks come first, of B products.
        small = small.flatten(0, 1)  # [r * n, least]
        large = making.shared[B][:most, : len(columns)].float().flatten(1)  # [most, n * r]
        product = large @ small * making.config.scaling
        return making.dense(product if least == projection.in_features else product.T.contiguous())


def _sides(projection: Projection) -> tuple[int, int]:
    """Sort a linear's inputs and outputs by their number."""
    least, most = sorted((projection.in_features, projection.out_features))
    return least, most
