"""BD-LoRA (use_bdlora): A or B of a LoRA has blocks on its diagonal, and the file holds the blocks alone.

A by blocks [r, in / n]    ranks [i r / n, (i + 1) r / n) take the i-th of n windows of the inputs
B by blocks [out, r / n]   they give the i-th of n windows of the outputs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.format.config import bad_config, read_count, read_flag, read_names, shown, unsupported
from loraplex.adapters.format.windows import Window
from loraplex.adapters.image.tiles import LowRank
from loraplex.kernels.records import Projection

_KEYS = frozenset({"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"})


@dataclass(frozen=True)
class BlockDiagonal:
    """What use_bdlora says: which modules' A and which modules' B has how many blocks."""

    a_names: tuple[str, ...]  # parts of paths, anywhere in them
    b_names: tuple[str, ...]
    count: int
    strict: bool  # every module has one of the two

    def side(self, path: str) -> str:
        """Say which factor of a module has blocks: "A", "B", or "" for none. Raises AdapterRefused("bad_config")."""
        found = [
            side for side, names in (("A", self.a_names), ("B", self.b_names)) if any(name in path for name in names)
        ]
        if len(found) == 2 or (self.strict and not found):
            what = "both A and B" if found else "neither A nor B"
            raise bad_config(f"use_bdlora has {what} of {path} by blocks, which PEFT does not train; expected one")
        return found[0] if found and self.count > 1 else ""


@dataclass(frozen=True)
class Blocks:
    """The blocks of one module."""

    side: str  # "A" or "B"
    count: int

    def windows(self, rank: int, projection: Projection, path: str) -> tuple[Window, ...]:
        """Cut a module of `rank` to a window for each block. Raises AdapterRefused("bad_config") for uneven ones."""
        n, width, out = self.count, projection.in_features, projection.out_features
        wide, what = (width, "inputs") if self.side == "A" else (out, "outputs")
        if rank % n or wide % n:
            raise bad_config(
                f"use_bdlora has nblocks {n}, which divides not both {path}'s rank, {rank}, and {wide} {what}"
            )
        own = [(i * wide // n, (i + 1) * wide // n) for i in range(n)]
        if self.side == "A":
            return tuple(Window(rank // n, columns, (0, out)) for columns in own)
        return tuple(Window(rank // n, (0, width), columns) for columns in own)

    def shapes(self, rank: int, projection: Projection) -> Mapping[str, tuple[int, int]]:
        """Say what shapes A and B have in the file."""
        a, b = (rank, projection.in_features), (projection.out_features, rank)
        if self.side == "A":
            return {"A": (rank, projection.in_features // self.count), "B": b}
        return {"A": a, "B": (projection.out_features, rank // self.count)}


def read_blocks(raw: Mapping[str, Any]) -> BlockDiagonal | None:
    """Read use_bdlora; None where it is not set. Raises AdapterRefused: "bad_config", "unsupported_option"."""
    value = raw.get("use_bdlora")
    if not value:
        return None
    if not isinstance(value, dict):
        raise bad_config(f"use_bdlora is {shown(value)}; expected an object")
    if unknown := value.keys() - _KEYS:
        raise unsupported(f"use_bdlora has {', '.join(sorted(unknown))}, which is not known here")
    return BlockDiagonal(
        _names(value, "target_modules_bd_a"),
        _names(value, "target_modules_bd_b"),
        read_count(value.get("nblocks", 1), "use_bdlora's nblocks"),
        read_flag(value, "match_strict") if "match_strict" in value else True,
    )


def by_windows(part: LowRank, windows: tuple[Window, ...]) -> Iterator[LowRank]:
    """Cut a part whose A or B are the file's blocks to the windows' own; a part without windows stays as it is."""
    if not windows:
        yield part
        return
    first = 0
    for window in windows:
        ranks = slice(first, first + window.rank)
        by_outputs = part.b.shape[1] == window.rank
        b = part.b[slice(*window.outputs)] if by_outputs else part.b[:, ranks]
        yield window.part(part.layer, part.projection, part.a[ranks], b, part.scaling)
        first += window.rank


def _names(value: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = read_names(value, key)
    return (found,) if isinstance(found, str) else found
