"""GraLoRA as PEFT saves it: the weight is cut to k by k blocks, each with a low-rank change of its own.

adapter_model.safetensors                             what it becomes
...<projection>.gralora_A [k, in / k, r]              of inputs' block n and outputs' block j: A is gralora_A[n]'s
...<projection>.gralora_B [k, r, out / k]             j-th of k parts of the ranks, B gralora_B[j]'s n-th
...<projection>.gralora_A_general.weight [h, in]      A and B of the whole module, where hybrid_r = h is not 0
               .gralora_B_general.weight [out, h]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import bad_config, check_ranks, read_count, read_number, read_rank
from loraplex.adapters.format.kind import AdapterConfig
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.format.windows import Window
from loraplex.adapters.image.tiles import Part

A, B = "gralora_A", "gralora_B"
WHOLE_A, WHOLE_B = "gralora_A_general.weight", "gralora_B_general.weight"


@dataclass(frozen=True)
class GraloraConfig(AdapterConfig):
    """What inference needs of a GraLoRA adapter's config."""

    rank: int  # of the blocks of one block of inputs together
    whole: int  # hybrid_r, the rank beside them
    alpha: float
    blocks: int  # gralora_k


class Gralora(ModuleKind[GraloraConfig]):
    """y[j] += alpha / (r + hybrid_r) * sum over n of B[j, n] (A[n, j] x[n]), and a LoRA of rank hybrid_r."""

    name = "gralora"
    label = "GraLoRA"
    keys = module_keys(
        "r", "hybrid_r", "alpha", "gralora_k", "bias", no_bearing=("gralora_dropout", "fan_in_fan_out", "init_weights")
    )
    leaves = (A, B, WHOLE_A, WHOLE_B)

    def read(self, raw: Mapping[str, Any]) -> GraloraConfig:
        common = read_common(self, raw)
        rank, blocks = read_rank(raw.get("r", 32), "r"), read_count(raw.get("gralora_k", 2), "gralora_k")
        if rank % blocks:
            raise bad_config(f"gralora_k is {blocks}, which does not divide r, {rank}")
        whole = raw.get("hybrid_r", 0)
        return GraloraConfig(
            **common,
            rank=rank,
            whole=0 if whole == 0 else read_rank(whole, "hybrid_r"),
            alpha=read_number(raw.get("alpha", 64), "alpha"),
            blocks=blocks,
        )

    def wanted(self, config: GraloraConfig, module: FoundModule, match: Matcher) -> Wanted:
        width, out, k, rank = module.projection.in_features, module.projection.out_features, config.blocks, config.rank
        for what, number in (("inputs", width), ("outputs", out)):
            if number % k:
                raise bad_config(f"gralora_k is {k}, which does not divide {module.path}'s {number} {what}")
        shapes: dict[str, tuple[int, ...]] = {A: (k, width // k, rank), B: (k, rank, out // k)}
        windows = [
            Window(rank // k, (n * width // k, (n + 1) * width // k), (j * out // k, (j + 1) * out // k))
            for j in range(k)
            for n in range(k)
        ]
        if config.whole:
            shapes |= {WHOLE_A: (config.whole, width), WHOLE_B: (out, config.whole)}
            windows.append(Window(config.whole, (0, width), (0, out)))
        ranks = check_ranks(rank + config.whole, rank)
        return Wanted(shapes, ranks, scaling=config.alpha / ranks, windows=tuple(windows))

    def making_bytes(self, config: GraloraConfig, modules: Sequence[Any]) -> int:
        return 2 * super().making_bytes(config, modules)  # all windows of a module at once

    def make(self, making: Making[GraloraConfig]) -> Sequence[Part]:
        module, k = making.module, making.config.blocks
        scaled = making.floats(B) * module.scaling
        a = making.floats(A).unflatten(2, (k, -1)).permute(2, 0, 3, 1)  # [j, n, ranks, inputs]
        b = scaled.unflatten(1, (k, -1)).transpose(2, 3)  # [j, n, outputs, ranks]
        pairs = [(a[j, n].contiguous(), b[j, n].contiguous()) for j in range(k) for n in range(k)]
        if making.config.whole:
            pairs.append((making.floats(WHOLE_A), making.floats(WHOLE_B) * module.scaling))
        return [
            window.part(module.layer, module.projection, *pair)
            for window, pair in zip(module.windows, pairs, strict=True)
        ]
