"""Take the blocks of ggml's types apart: their bytes become codes and scales.

A row of a weight is cut into blocks of 32 or 256 inputs; each has its scales and its codes side by side. The layouts
are ggml-common.h's, the values those of the gguf package (gguf.quants.dequantize), to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex.kernels.quantized import GroupScales, QuantizedWeight, WeightFormat

Array = NDArray[Any]

CHUNK = 1 << 20
"""Elements that are taken apart together: temporaries of 2 to 4 MB, whatever the size of the tensor."""


Parts = dict[str, Array]
"""What n blocks are made of: "codes" [n, block] uint8 (int8 where the format has no zero), "scale" [n] float16 and,
where the type has them, "scale_codes" [n, block / group] uint8 or int8, "offset" and "offset_codes" likewise."""


@dataclass(frozen=True)
class BlockType:
    """A quantised type of ggml."""

    format: WeightFormat
    block: int  # inputs of a block
    block_bytes: int
    take_apart: Callable[[Array], Parts]  # blocks [n, block_bytes] uint8


def quantized_weight(kind: BlockType, data: Array, order: Array | None = None) -> QuantizedWeight:
    """Take the weight apart whose rows are `data` [out, row bytes] uint8.

    order: [out], the row of `data` that each output has; None: as they are. Raises ValueError for scales not finite.
    """
    rows = data.shape[0]
    blocks = data.shape[1] // kind.block_bytes
    step = max(1, CHUNK // (blocks * kind.block))
    whole: Parts = {}
    for start in range(0, rows, step):
        chunk = data[start : start + step] if order is None else data[order[start : start + step]]
        for name, part in kind.take_apart(np.ascontiguousarray(chunk).reshape(-1, kind.block_bytes)).items():
            if name not in whole:
                whole[name] = np.empty((rows, blocks, *part.shape[1:]), part.dtype)
            target = whole[name]
            target[start : start + step] = part.reshape(-1, *target.shape[1:])
    for name in ("scale", "offset"):
        if name in whole and not np.isfinite(whole[name]).all():
            raise ValueError("has scales that are not finite numbers")
    found = {name: torch.from_numpy(array.reshape(rows, -1)) for name, array in whole.items()}
    span = kind.block // (kind.format.group or kind.block)
    scale = GroupScales(found["scale"], found.get("scale_codes"), span)
    offset = GroupScales(found["offset"], found.get("offset_codes"), span) if "offset" in found else None
    return QuantizedWeight(kind.format, found["codes"], scale, offset)


def _nibbles(packed: Array, width: int) -> Array:
    """Unpack bytes [n, m] to [n, 2 m] uint8: of each `width` bytes the low halves, then the high ones."""
    grouped = packed.reshape(packed.shape[0], -1, 1, width) >> np.array([[0], [4]], np.uint8)
    return (grouped & np.uint8(15)).reshape(packed.shape[0], -1)


def _half(blocks: Array, at: int) -> Array:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0]


def _q4_0(blocks: Array) -> Parts:
    return {"codes": _nibbles(blocks[:, 2:], 16), "scale": _half(blocks, 0)}


def _q4_1(blocks: Array) -> Parts:
    return {"codes": _nibbles(blocks[:, 4:], 16), "scale": _half(blocks, 0), "offset": _half(blocks, 2)}


def _fifth_bits(packed: Array) -> Array:
    """Unpack 4 bytes [n, 4] to [n, 32], 0 or 16."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: Array) -> Parts:
    return {"codes": _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6]), "scale": _half(blocks, 0)}


def _q5_1(blocks: Array) -> Parts:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return {"codes": codes, "scale": _half(blocks, 0), "offset": _half(blocks, 2)}


def _q8_0(blocks: Array) -> Parts:
    return {"codes": blocks[:, 2:].view(np.int8), "scale": _half(blocks, 0)}


def _six_bit_scales(packed: Array) -> tuple[Array, Array]:
    """Unpack 12 bytes [n, 12] to the scales' and the minima's codes, [n, 8] each, 0 to 63."""
    low_scale, low_least, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = [low_scale & np.uint8(63), (high & np.uint8(15)) | ((low_scale >> np.uint8(2)) & np.uint8(48))]
    least = [low_least & np.uint8(63), (high >> np.uint8(4)) | ((low_least >> np.uint8(2)) & np.uint8(48))]
    return np.concatenate(scale, 1), np.concatenate(least, 1)


def _k_parts(blocks: Array, codes: Array) -> Parts:
    """Add the scales of Q4_K and Q5_K to `codes`. What is subtracted there is an offset with the other sign here."""
    scale, least = _six_bit_scales(blocks[:, 4:16])
    subtracted = {"offset": -_half(blocks, 2), "offset_codes": least}
    return {"codes": codes, "scale": _half(blocks, 0), "scale_codes": scale, **subtracted}


def _q4_k(blocks: Array) -> Parts:
    return _k_parts(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Array) -> Parts:
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]
    fifth = ((high & np.uint8(1)) << np.uint8(4)).reshape(blocks.shape[0], -1)
    return _k_parts(blocks, _nibbles(blocks[:, 48:], 32) | fifth)


def _q6_k(blocks: Array) -> Parts:
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    upper = ((high & np.uint8(3)) << np.uint8(4)).reshape(blocks.shape[0], -1)
    scale = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    codes = _nibbles(blocks[:, :128], 64) | upper
    return {"codes": codes, "scale": _half(blocks, 208), "scale_codes": scale}


def _simple(name: str, bits: int, zero: int, block_bytes: int, take_apart: Callable[[Array], Parts]) -> BlockType:
    form = WeightFormat(name, bits, group=32, zero=zero, scale_bits=16, has_offset=name.endswith("_1"))
    return BlockType(form, 32, block_bytes, take_apart)


def _super(name: str, bits: int, zero: int, group: int, block_bytes: int, take: Callable[[Array], Parts]) -> BlockType:
    form = WeightFormat(name, bits, group, zero, scale_bits=8, has_offset=zero == 0)
    return BlockType(form, 256, block_bytes, take)


QUANTIZED = {  # ggml's number of the type
    2: _simple("Q4_0", 4, 8, 18, _q4_0),
    3: _simple("Q4_1", 4, 0, 20, _q4_1),
    6: _simple("Q5_0", 5, 16, 22, _q5_0),
    7: _simple("Q5_1", 5, 0, 24, _q5_1),
    8: _simple("Q8_0", 8, 0, 34, _q8_0),
    12: _super("Q4_K", 4, 0, 32, 144, _q4_k),
    13: _super("Q5_K", 5, 0, 32, 176, _q5_k),
    14: _super("Q6_K", 6, 32, 16, 210, _q6_k),
}

DENSE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


def type_name(number: int) -> str:
    """Name ggml's type `number`."""
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"type {number}"


SUPPORTED = ", ".join([*(kind.format.name for kind in QUANTIZED.values()), "F32", "F16", "BF16"])
