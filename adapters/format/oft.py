"""OFT and BOFT as PEFT saves them: blocks of the input are turned before the base's linear takes them.

adapter_model.safetensors                           what it becomes
...<projection>.oft_R.weight [in / b, b (b - 1) / 2]   InputTurn: R - I, R of blocks b x b along the diagonal
          or [1, ...], block_share                     the same, one block for all
...<projection>.boft_R [m, in / b, b, b]               InputTurn: the product of m such, in blocks of b 2^(m - 1)
...<projection>.boft_s [out, 1]                        OutputScale

R is Cayley's map of a skew matrix Q, (I - Q) (I + Q)^-1, or for OFT, by default, the first terms of its Neumann sum,
which turns a little more or less than that and is taken as it is. Where b does not divide the inputs PEFT takes the
nearest number that does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import (
    bad_config,
    read_count,
    read_flag,
    read_number,
    shown,
    unsupported,
)
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import InputTurn, OutputScale, Part, PartShape, turn_shape
from loraplex.kernels.constants import TileKind

LEAF = "oft_R.weight"
R, S = "boft_R", "boft_s"

TERMS, FACTORS = "num_cayley_neumann_terms", "boft_n_butterfly_factor"

MAX_TERMS = 64
"""Of a sum that PEFT cuts after five: each is a product of all blocks, and what converges has done so by then."""

MAX_FACTORS = 32
"""Each doubles what a block takes of the inputs."""


@dataclass(frozen=True)
class OftConfig(AdapterConfig):
    """What inference needs of an OFT adapter's config."""

    blocks: int  # of a module; 0: `size` says
    size: int  # of a block; 0: `blocks` says
    shared: bool  # one block for all
    terms: int  # of the Neumann sum; 0: Cayley's map itself
    least: float | None  # coft: the most that a block may be, over the root of their number

    def turns(self, width: int) -> tuple[int, int]:
        """Return how many blocks of so many inputs there are, of which one is kept if it is shared, and their size."""
        blocks = _nearest(self.blocks, width) if self.blocks else width // _nearest(self.size, width)
        return 1 if self.shared else blocks, width // blocks


@dataclass(frozen=True)
class BoftConfig(AdapterConfig):
    """What inference needs of a BOFT adapter's config."""

    blocks: int
    size: int
    factors: int

    def turns(self, width: int) -> tuple[int, int]:
        """Return how many blocks the product of the factors has, and their size."""
        size, wide = self.size or width // self.blocks, 1 << self.factors - 1
        return width // (size * wide), size * wide


class Oft(ModuleKind[OftConfig]):
    """y = W (R x) + b."""

    name = "oft"
    label = "OFT"
    keys = module_keys(
        *("r", "oft_block_size", "block_share", "coft", "eps", "use_cayley_neumann", TERMS),
        *("peft_version", "bias"),
        no_bearing=("module_dropout", "fan_in_fan_out", "init_weights"),
    )
    leaves = (LEAF,)

    def read(self, raw: Mapping[str, Any]) -> OftConfig:
        common = read_common(self, raw)
        if "oft_block_size" not in raw:
            raise unsupported("oft_block_size is not there: PEFT before 0.14 computed another rotation; train it again")
        neumann = raw.get("use_cayley_neumann") is None or read_flag(raw, "use_cayley_neumann")
        version = re.match(r"(\d{1,6})\.(\d{1,6})", str(raw.get("peft_version") or ""))
        if neumann and (version is None or (int(version[1]), int(version[2])) < (0, 18)):
            raise unsupported(
                f"use_cayley_neumann is set and peft_version is {shown(raw.get('peft_version'))}; PEFT before 0.18 "
                "computed another sum; train it again with 0.18 or later"
            )
        blocks, size = _read_sizes(raw, "r", "oft_block_size", 0, 32)
        return OftConfig(
            **common,
            blocks=blocks,
            size=size,
            shared=read_flag(raw, "block_share"),
            terms=read_count(raw.get(TERMS, 5), TERMS, MAX_TERMS) if neumann else 0,
            least=read_number(raw.get("eps", 6e-5), "eps") if read_flag(raw, "coft") else None,
        )

    def wanted(self, config: OftConfig, module: FoundModule, match: Matcher) -> Wanted:
        kept, size = config.turns(module.projection.in_features)
        turn = turn_shape(module.layer, module.projection, kept, size)
        return Wanted({LEAF: (kept, size * (size - 1) // 2)}, parts=(turn,))

    def making_bytes(self, config: OftConfig, modules: Sequence[AdapterModule]) -> int:
        return _making_bytes(config, modules)

    def make(self, making: Making[OftConfig]) -> Part:
        config, flat = making.config, making.floats(LEAF)
        _, size = config.turns(making.module.projection.in_features)
        q = torch.zeros(len(flat), size, size)
        q[:, *torch.triu_indices(size, size, 1)] = flat
        q = q - q.transpose(1, 2)
        if config.least is not None:
            lengths = q.flatten(1).norm(dim=1)[:, None, None]
            most = config.least / len(q) ** 0.5
            q = torch.where(lengths <= most, q, q * (most / lengths))
        turn = _neumann(q, config.terms) if config.terms else _cayley(q)
        return InputTurn(making.module.layer, making.module.projection, turn)


class Boft(ModuleKind[BoftConfig]):
    """y = s * (W (R x)) + b, R the product of butterfly factors."""

    name = "boft"
    label = "BOFT"
    keys = module_keys(
        *("boft_block_size", "boft_block_num", FACTORS, "bias"),
        no_bearing=("boft_dropout", "fan_in_fan_out", "init_weights"),
    )
    leaves = (R, S)

    def read(self, raw: Mapping[str, Any]) -> BoftConfig:
        common = read_common(self, raw)
        factors = read_count(raw.get(FACTORS, 1), FACTORS, MAX_FACTORS)
        blocks, size = _read_sizes(raw, "boft_block_num", "boft_block_size", 0, 4)
        return BoftConfig(
            **common,
            blocks=blocks,
            size=size,
            factors=factors,
        )

    def wanted(self, config: BoftConfig, module: FoundModule, match: Matcher) -> Wanted:
        width = module.projection.in_features
        if width % (config.blocks or config.size):
            found = f"boft_block_num is {config.blocks}" if config.blocks else f"boft_block_size is {config.size}"
            raise bad_config(f"{found}, which does not divide {module.path}'s {width} inputs")
        blocks = config.blocks or width // config.size
        size, wide = width // blocks, 1 << config.factors - 1
        if wide > 1 and (size % 2 or blocks % wide):
            raise bad_config(
                f"boft_n_butterfly_factor is {config.factors}; expected an even block size and a number of blocks that "
                f"{wide} divides, and {module.path} has {blocks} blocks of {size}"
            )
        shapes = {R: (config.factors, blocks, size, size), S: (module.projection.out_features, 1)}
        turn = turn_shape(module.layer, module.projection, *config.turns(width))
        return Wanted(shapes, parts=(turn, PartShape(module.layer, module.projection, 1, TileKind.SCALE)))

    def making_bytes(self, config: BoftConfig, modules: Sequence[AdapterModule]) -> int:
        return _making_bytes(config, modules)

    def make(self, making: Making[BoftConfig]) -> list[Part]:
        free, where = making.floats(R), (making.module.layer, making.module.projection)
        factors = [_cayley((factor - factor.transpose(1, 2)) / 2) for factor in free]
        return [InputTurn(*where, _butterfly(factors)), OutputScale(*where, making.floats(S)[:, 0])]


def _read_sizes(raw: Mapping[str, Any], blocks: str, size: str, no_blocks: int, usual: int) -> tuple[int, int]:
    """Read how many blocks there are and how large one is: one of the two is 0."""
    found = {blocks: raw.get(blocks, no_blocks), size: raw.get(size, usual)}
    for key, value in found.items():
        if value != 0:
            read_count(value, key)
    if bool(found[blocks]) == bool(found[size]):
        raise bad_config(
            f"{blocks} is {shown(found[blocks])} and {size} is {shown(found[size])}; expected one of them 0"
        )
    return int(found[blocks]), int(found[size])


def _nearest(wanted: int, width: int) -> int:
    """Find the divisor of `width` that is nearest to `wanted`, the smaller one of two."""
    if wanted >= width:
        return width
    higher = next(number for number in range(wanted, width + 1) if width % number == 0)
    lower = next(number for number in range(wanted, 0, -1) if width % number == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _cayley(q: Tensor) -> Tensor:
    """Compute (I - Q) (I + Q)^-1 - I = -2 Q (I + Q)^-1 of skew blocks [n, b, b]."""
    return torch.linalg.solve(torch.eye(q.shape[1]) + q, -2 * q, left=False)


def _neumann(q: Tensor, terms: int) -> Tensor:
    """Compute the sum without its I: 2 Q + 2 Q^2 + .. + Q^(terms - 1), as PEFT adds it up."""
    if terms == 1:
        return torch.zeros_like(q)
    total = 2 * q
    if terms > 2:
        power = q @ q
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ q
            total = total + 2 * power
        total = total + power @ q
    return total


def _butterfly(factors: Sequence[Tensor]) -> Tensor:
    """Multiply factors of blocks R - I [n, b, b] to the blocks of their product less I.

    Factor i turns, of every b 2^i neighbours, first those in even places and then the others, half a block to a place.
    So nothing leaves the b 2^(m - 1) neighbours of the last of m factors.
    """
    count, size, _ = factors[0].shape
    wide = size << len(factors) - 1
    total = torch.zeros(count * size // wide, wide, wide)
    for i, factor in enumerate(factors):
        places = torch.arange(size << i).view(-1, size // 2) if i else torch.arange(size)[None]
        order = torch.cat((places[::2], places[1::2])).flatten()
        order = (torch.arange(0, wide, size << i)[:, None] + order).flatten()
        spread = torch.zeros_like(total)
        for block in range(wide // size):
            at = slice(block * size, (block + 1) * size)
            spread[:, at, at] = factor[block :: wide // size]
        spread = spread[:, order][:, :, order]
        total = total + spread + spread @ total  # (I + spread) (I + total) - I
    return total


def _making_bytes(config: OftConfig | BoftConfig, modules: Sequence[AdapterModule]) -> int:
    """Bound what a module's blocks, their powers and its scales take beside each other, fp32."""
    projections = [module.projection for module in modules]
    blocks = [(*config.turns(projection.in_features), projection.out_features) for projection in projections]
    return max(24 * count * size**2 + 8 * out for count, size, out in blocks)
