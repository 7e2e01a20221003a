"""Numbers that Python and the C++ kernels share, written here and nowhere else.

`setup.py` runs this file alone and writes C_HEADER as constants.h, so the file imports the standard library only. In
C++ BLOCK_SIZE is `kBlockSize` and OpCode.RMS_NORM is `OpCode::kRmsNorm`. A library that was built from other numbers is
refused when it is loaded (kernels/cpu/abi.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import IntEnum

ALIGN = 64
"""Bytes. Unit of every tile offset, alignment of every tile: one cache line, one AVX-512 register."""

TILE_RANKS = 16
"""Most ranks in a tile."""

TILE_COLUMNS = 8
"""Of a row of TileTable.tiles."""

BLOCK_SIZE = 16
"""Tokens in a KV page."""


class BlockInput(IntEnum):
    """What the A of an activated tile is multiplied by."""

    BRANCH = 0  # x
    SUM = 1  # x + residual, rounded to the compute dtype
    RESIDUAL = 2  # residual


class Function(IntEnum):
    """What an activated tile makes of its A's products."""

    IDENTITY = 0
    RELU = 1
    GELU = 2
    GELU_TANH = 3
    SILU = 4
    TANH = 5
    LEAKY_RELU = 6  # slope 0.01


class TileKind(IntEnum):
    """What a tile adds to its window of y, the columns [out_start, out_start + out_len); w: its weight in the mix."""

    LOW_RANK = 0  # w * (A x[in_start : in_start + in_len]) B
    BIAS = 1  # w * B, one row
    SCALE = 2  # w * (v - 1) * y, v one row of fp32: y becomes (1 + sum of w * (v - 1)) * y
    DENSE = 3  # w * A x[in_start : in_start + in_len], A having a row for each column of the window, and no B
    ACTIVATION = 4  # nothing: of the tile behind it u is f(A source + c) instead of A x
    TURN = 5  # nothing: of what the base's linear multiplies, see OwnTable
    OWN = 7  # nothing: it holds rows in place of the base's, see OwnTable


class TableSite(IntEnum):
    """A site of the layer behind the base's last: a table, to which low-rank changes are added."""

    EMBED = 0  # the embedding: tiles of a linear from hidden state to ids, of which an id's column is added
    HEAD = 1  # the head: tiles of a linear whose output are the logits


class Own(IntEnum):
    """What of the base, outside its layers' linears, an adapter acts on: bits of OwnTable.wearers."""

    NORM = 1
    EMBED = 2
    HEAD = 4
    INPUT = 8


OWN_NORMS = 6
"""Norms of a layer that have places of their own: those of the stream in the order of the pass, two of them with
sandwich norms alone, then those of query and of key heads."""

QUERY_NORM = 4
"""The number among them of the norm of query heads; the next is that of key heads."""

OWN_INPUTS = 7
"""Linears of a layer whose inputs have places of their own, in the order of the base's projections."""


# ---- the records of kernels/cpu ----

MAX_GROUPS = 8
"""KV groups of a Step."""

MAX_ROPES = 4
"""Rotary kinds of a Step."""

DRAW = 5
"""Numbers of a row of Step.draws: temperature, top_k, top_p, min_p, uniform."""

ALL_TOKENS = -1
"""As Op.rows: the step's tokens."""

LOGIT_ROWS = -2
"""As Op.rows: the step's rows of logits."""


class OpCode(IntEnum):
    """What an Op does (kernels/cpu/kernels.cpp)."""

    EMBED = 0
    RMS_NORM = 1
    LINEAR = 2
    BIAS = 3
    ADAPTER = 4
    ROPE = 5
    ATTENTION = 6
    ACT_MUL = 7
    GATHER = 8
    SAMPLE = 9
    PACK = 10
    QUANTISED = 11
    PACK_QUANTISED = 12
    OWN_NORM = 13
    OWN_EMBED = 14
    OWN_HEAD = 15
    OWN_INPUT = 16
    COLUMNS = 17


class Turned(IntEnum):
    """In which steps a linear of a recorded program is computed."""

    ANY = 0
    NEVER = 1  # in those in which no adapter turns an input
    ALWAYS = 2  # in all others


class NumberKind(IntEnum):
    """How the scales or offsets of a quantised weight are stored."""

    NONE = 0
    FP16 = 1
    FP32 = 2
    INT8 = 3
    UINT8 = 4


PANEL = 64
"""Output columns of a panel of a packed weight."""


class Activation(IntEnum):
    """The function of the gate in ACT_MUL."""

    SILU = 0
    GELU_TANH = 1


ACTIVATIONS = {member.name.lower(): member for member in Activation}
"""By the names that Backend.act_mul takes."""


class ComputeType(IntEnum):
    """The type of activations and weights, for which all kernels of a call are compiled."""

    BF16 = 0
    FP32 = 1


def _c_name(name: str) -> str:
    return "k" + "".join(word.capitalize() for word in name.split("_"))


def _c_lines(names: Mapping[str, object]) -> Iterator[str]:
    for name, value in names.items():
        if isinstance(value, int):
            yield f"constexpr int {_c_name(name)} = {value};"
        elif isinstance(value, type) and issubclass(value, IntEnum) and value is not IntEnum:
            members = ", ".join(f"{_c_name(member.name)} = {member.value}" for member in value)
            yield f"enum class {name} : int32_t {{ {members} }};"


C_CONSTANTS = "\n".join(_c_lines(dict(globals())))
"""The numbers above as C++, in their order."""

C_HEADER = f"""\
// Written by setup.py from kernels/constants.py.
#pragma once
#include <cstdint>

{C_CONSTANTS}

constexpr char kConstants[] = R"({C_CONSTANTS})";
"""
"""What setup.py writes as constants.h. `kConstants` tells Python what the library was built from."""
