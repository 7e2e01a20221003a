"""LoKr as PEFT saves it: the Kronecker product of a small matrix and a low-rank one.

adapter_model.safetensors                             what it becomes
...<projection>.lokr_w1 [l, m], or                    w1, one number for each block of outputs and block of inputs
               .lokr_w1_a [l, r], .lokr_w1_b [r, m]
...<projection>.lokr_w2 [k, n], or                    w2 = L R; out = l k, in = m n
               .lokr_w2_a [k, r], .lokr_w2_b [r, n]

With w1 = P Q, kron(w1, w2) = kron(P, L) kron(Q, R). Of the ways to have P and Q the one that stores least is taken:

    a window for each block j of inputs     P = w1[:, j], Q = 1: A is R, on that window of x
    a window for each block i of outputs    P = 1, Q = w1[i]: B is L, on that window of y
    one for the whole module                P and Q as the file has them: where w1 is decomposed to a low rank

Where that is more than the change itself, or more ranks than are served, it is a DenseDelta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import (
    MAX_RANK,
    bad_config,
    read_alphas,
    read_flag,
    read_number,
    read_rank,
    read_ranks,
    shown,
)
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.format.windows import Window, blocks_together
from loraplex.adapters.image.tiles import Part
from loraplex.kernels.constants import TileKind


@dataclass(frozen=True)
class LokrConfig(AdapterConfig):
    """What inference needs of a LoKr adapter's config."""

    rank: int
    alpha: float
    both: bool  # decompose_both
    factor: int  # decompose_factor; -1: about the square root
    rank_pattern: tuple[tuple[str, int], ...]  # (pattern, rank), the first match counts
    alpha_pattern: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class _Blocks:
    """How a module's weight is cut to blocks, and what is decomposed of the two matrices."""

    out_blocks: int
    out_block: int  # outputs of each
    in_blocks: int
    in_block: int  # inputs of each
    rank1: int  # of w1 as the file has it; 0: as it is
    rank2: int  # of w2

    def windows(self) -> tuple[Window, ...]:
        """Pick the windows that store the least."""
        out, width = self.out_blocks * self.out_block, self.in_blocks * self.in_block
        rank = min(self.out_block, self.in_block, self.rank2 or self.in_block)
        together = blocks_together(self.in_blocks, self.in_block, rank)
        step = together * self.in_block
        by_inputs = tuple(Window(together * rank, (at, at + step), (0, out)) for at in range(0, width, step))
        together = blocks_together(self.out_blocks, self.out_block, rank)
        step = together * self.out_block
        by_outputs = tuple(Window(together * rank, (0, width), (at, at + step)) for at in range(0, out, step))
        ways = [by_inputs, by_outputs]
        if 0 < self.rank1 < min(self.out_blocks, self.in_blocks):
            ways.append((Window(self.rank1 * rank, (0, width), (0, out)),))
        return min(ways, key=lambda way: sum(window.elements for window in way))


class Lokr(ModuleKind[LokrConfig]):
    """y += alpha / r * kron(w1, w2) x."""

    name = "lokr"
    label = "LoKr"
    keys = module_keys(
        *("r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor"),
        no_bearing=(
            *("rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights"),
            "use_effective_conv2d",  # about convolutions
        ),
    )
    leaves = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")

    def read(self, raw: Mapping[str, Any]) -> LokrConfig:
        common = read_common(self, raw)
        factor = raw.get("decompose_factor", -1)
        if type(factor) is not int or (factor < 1 and factor != -1):
            raise bad_config(f"decompose_factor is {shown(factor)}; expected -1 or a whole number from 1")
        return LokrConfig(
            **common,
            rank=read_rank(raw.get("r", 8), "r"),
            alpha=read_number(raw.get("alpha", 8), "alpha"),
            both=read_flag(raw, "decompose_both"),
            factor=factor,
            rank_pattern=read_ranks(raw),
            alpha_pattern=read_alphas(raw),
        )

    def wanted(self, config: LokrConfig, module: FoundModule, match: Matcher) -> Wanted:
        rank = match.first("rank_pattern", config.rank_pattern, module.path, config.rank)
        alpha = match.first("alpha_pattern", config.alpha_pattern, module.path, config.alpha)
        out_blocks, out_block = _cut(module.projection.out_features, config.factor)
        in_blocks, in_block = _cut(module.projection.in_features, config.factor)
        rank1 = rank if config.both and rank < max(out_blocks, in_blocks) / 2 else 0
        rank2 = rank if rank < max(out_block, in_block) / 2 else 0
        windows = _Blocks(out_blocks, out_block, in_blocks, in_block, rank1, rank2).windows()
        shapes = _shapes("lokr_w1", out_blocks, in_blocks, rank1) | _shapes("lokr_w2", out_block, in_block, rank2)
        whole = module.projection.in_features * module.projection.out_features
        ranks = sum(window.rank for window in windows)
        if whole < sum(window.elements for window in windows) or ranks > MAX_RANK:
            return Wanted(shapes, scaling=alpha / rank, kind=TileKind.DENSE)
        return Wanted(shapes, ranks, alpha / rank, windows=windows)

    def making_bytes(self, config: LokrConfig, modules: Sequence[AdapterModule]) -> int:
        return 2 * super().making_bytes(config, modules)  # all windows of a module at once

    def make(self, making: Making[LokrConfig]) -> Part | Sequence[Part]:
        p, q = _pair(making, "lokr_w1")
        left, right = _pair(making, "lokr_w2")
        module = making.module
        if not module.windows:
            return making.dense(torch.kron(p @ q, left @ right) * module.scaling)
        return [
            window.part(module.layer, module.projection, torch.kron(b, right), torch.kron(a, left) * module.scaling)
            for window in module.windows
            for a, b in [_factors(p, q, window, len(left), right.shape[1], left.shape[1])]
        ]


def _factors(p: Tensor, q: Tensor, window: Window, out_block: int, in_block: int, rank: int) -> tuple[Tensor, Tensor]:
    """P and Q of a window, P Q = w1 = p q there. rank: of w2."""
    rows = slice(window.outputs[0] // out_block, window.outputs[1] // out_block)
    columns = slice(window.inputs[0] // in_block, window.inputs[1] // in_block)
    w1, inner = (p @ q)[rows, columns], window.rank // rank
    if inner == w1.shape[1]:
        return w1, torch.eye(inner)
    return (torch.eye(inner), w1) if inner == len(w1) else (p, q)


def _pair(making: Making[LokrConfig], leaf: str) -> tuple[Tensor, Tensor]:
    """Two factors of one of the matrices, of no more ranks than it has."""
    split = f"{leaf}_a" in making.tensors
    left = making.floats(f"{leaf}_a") if split else torch.eye(len(making.tensors[leaf]))
    right = making.floats(f"{leaf}_b" if split else leaf)
    if left.shape[1] < min(len(left), right.shape[1]):
        return left, right
    whole = left @ right
    out, width = whole.shape
    return (torch.eye(out), whole) if out <= width else (whole, torch.eye(width))


def _shapes(leaf: str, rows: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Of one of the matrices in the file; rank 0: it is not decomposed."""
    return {f"{leaf}_a": (rows, rank), f"{leaf}_b": (rank, columns)} if rank else {leaf: (rows, columns)}


def _cut(width: int, factor: int) -> tuple[int, int]:
    """The number of blocks and the width of each, as PEFT cuts (peft/tuners/lokr/layer.py, factorization)."""
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    most = width if factor == -1 else factor
    blocks, block = 1, width
    while blocks < block:
        more = next(n for n in range(blocks + 1, width + 1) if not width % n)
        if more > most:
            break
        blocks, block = more, width // more
    return min(blocks, block), max(blocks, block)
