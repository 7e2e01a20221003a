"""Block sizes and warps of every kernel: constants, so that no result depends on what else is in the batch.

Chosen so that nothing spills on sm_80, sm_90, sm_100 and gfx942 and shared memory stays under the limit of each of
these (84 KiB at most on sm_90); `python -m loraplex.benchmarks.kernels.aot_report` shows what each of them costs.
"""

from __future__ import annotations

from dataclasses import dataclass

SHRINK_SPLIT = 512
"""bgmv: input columns one program sums. A decode step has few rows: splitting gives every multiprocessor a part."""

SHRINK_BLOCK = 256
SHRINK_WARPS = 4
EXPAND_BLOCK = 256
EXPAND_WARPS = 8

SGMV_ROWS = 32
"""Tokens of a tile of y. They may belong to several segments: each is then taken in turn under a mask."""

SGMV_DEPTH = 128
SGMV_COLUMNS = 64
SGMV_WARPS = 4

LINEAR_ROWS = 64
"""Of a base linear without a library: what a Hopper matrix unit takes at once, for a decode step as for a prompt."""

LINEAR_COLUMNS = 64
LINEAR_DEPTH = 64
LINEAR_WARPS = 4

QUANTIZED_DEPTH = 64
"""Inputs dequantised at a time, by the table's rows too: 2 KiB of codes of 4 bits for 64 columns."""

QUANTIZED_IDS = 16
"""Rows of a quantised table that one program looks up."""

KV_SPLIT = 256
"""Keys one program of decode attention reads, counted from position 0: never from the batch."""

COMBINE_SPLITS = 16
"""Partial results of decode attention combined at once."""

TURN_COLUMNS = 256
"""Columns of a turned input that a program computes."""

ELEMENTS = 1024
"""Columns of one program of the elementwise ops."""

EMBED_COLUMNS = 512
"""Columns of the embedding that a program changes: with 1,024 it spills on sm_80, sm_90 and sm_100."""


@dataclass(frozen=True)
class LinearTile:
    """Sizes of the product with quantised weights."""

    rows: int
    columns: int
    warps: int


QUANTIZED_FEW = LinearTile(rows=16, columns=32, warps=4)
"""Up to so many rows, unless batch invariance is asked for: fewer columns, for more programs."""

QUANTIZED_MANY = LinearTile(rows=64, columns=32, warps=4)
"""With 64 columns weights that are dequantised and split spill on sm_80, with 8 warps too."""


@dataclass(frozen=True)
class AttentionTile:
    """Sizes of an attention kernel for one head_dim."""

    rows: int  # queries times (padded) heads of one kv head; at least 16 for the matrix units
    keys: int  # per iteration
    warps: int
    stages: int


def decode_tile(dim_pad: int, element_bytes: int) -> AttentionTile:
    """dim_pad: head_dim rounded up to a power of two. All heads of a group are one tile of rows."""
    if dim_pad * element_bytes <= 256:  # up to 128 elements of 16 bits
        return AttentionTile(rows=16, keys=64, warps=4, stages=2)
    return AttentionTile(rows=16, keys=32, warps=4, stages=2)


def prefill_tile(dim_pad: int, element_bytes: int) -> AttentionTile:
    """dim_pad: head_dim rounded up to a power of two."""
    if dim_pad * element_bytes <= 256:
        return AttentionTile(rows=64, keys=64, warps=8, stages=2)
    return AttentionTile(rows=32, keys=32, warps=4, stages=2)


def row_warps(block: int) -> int:
    """Warps of a program that holds a whole row of `block` elements."""
    return min(16, max(1, block // 256))
