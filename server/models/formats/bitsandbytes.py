"""Linears that bitsandbytes has quantised: NF4 and FP4, with double quantisation or without, and 8 bits (LLM.int8).

transformers writes them under the weight's own name. 4 bits: `weight` has two codes a byte, the first in the high half,
in the order of the flattened [out, in]; beside it are `weight.absmax`, one number for each block of codes,
`weight.quant_map`, what a code stands for, and `weight.quant_state.bitsandbytes__nf4`, JSON in bytes. Where absmax is
quantised too, it has codes of its own: nested_quant_map[code] * nested_absmax[block of blocks] + nested_offset.
8 bits: `weight` int8, and `SCB` beside it, the largest |value| of each output, which stands at 127
(bitsandbytes 0.50, functional.py: QuantState.as_dict, dequantize_4bit, int8_vectorwise_dequant).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loraplex.kernels.quantized import GroupScales, QuantizedWeight, WeightFormat
from loraplex.server.models.checkpoint import WeightsError
from loraplex.server.models.formats.settings import Settings
from loraplex.server.models.formats.shards import Shards
from loraplex.server.models.formats.stored import StoredLinear
from loraplex.server.models.formats.unpack import common_group, finite, high_first

KINDS = ("nf4", "fp4")
STATE = ".weight.quant_state.bitsandbytes__"
STATE_BYTES = 4096
"""Most bytes of a state's JSON, which has about 200."""

STORAGE = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Types that the bytes of 4-bit codes may pass for (bnb_4bit_quant_storage): bytes of an element."""

LEAST_GROUP = 8
"""Inputs that share a scale at least, where blocks do not divide a row: below it scales would outweigh the codes."""

INT8 = WeightFormat("int8", bits=8, group=None)
INV_127 = 7.874015718698502e-3
"""1 / 127 as bitsandbytes writes it."""


@dataclass(frozen=True)
class Nested:
    """How absmax is quantised."""

    block: int
    offset: float


@dataclass(frozen=True)
class State:
    """What the JSON beside a weight of 4 bits says."""

    kind: str
    block: int
    shape: tuple[int, int]  # [out, in]
    nested: Nested | None

    @property
    def codes(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def blocks(self) -> int:
        return -(-self.codes // self.block)


def read_bitsandbytes(shards: Shards, settings: Settings) -> dict[str, StoredLinear]:
    """Find the quantised linears by their weights' names. Raises WeightsError."""
    four, eight = (settings.flag(f"load_in_{bits}bit", False) for bits in (4, 8))
    if four == eight:
        raise settings.error("load_in_4bit", "it or load_in_8bit to be true, and not both")
    return _of_4_bits(shards) if four else _of_8_bits(shards)


def _of_8_bits(shards: Shards) -> dict[str, StoredLinear]:
    found = {}
    for scb in [name for name in shards.headers if name.endswith(".SCB")]:
        name = scb.removesuffix("SCB") + "weight"
        shape = shards.expect(name, ["I8"]).shape
        if len(shape) != 2:
            raise WeightsError(f"tensor {name} of {shards.folder} has shape {list(shape)}, expected [out, in]")
        shards.expect(scb, ["F32"], shape[:1])
        names = [name, scb]
        layout = scb.removesuffix("SCB") + "weight_format"
        if layout in shards.headers:
            shards.expect(layout, ["U8"], ())
            names.append(layout)
        found[name] = StoredLinear((shape[0], shape[1]), INT8, tuple(names), partial(_read_8_bits, shards, names))
    return found


def _read_8_bits(shards: Shards, names: list[str]) -> QuantizedWeight:
    tensors = shards.read_all(names)
    if len(names) == 3 and int(tensors[names[2]]) != 0:
        raise WeightsError(
            f"tensor {names[2]} of {shards.folder} is {int(tensors[names[2]])}, expected 0 (rows): the weight is laid "
            "out for one kind of GPU; save it again with bitsandbytes 0.43 or newer"
        )
    scale = finite(tensors[names[1]], f"tensor {names[1]} of {shards.folder}") * INV_127
    return QuantizedWeight(INT8, tensors[names[0]], GroupScales(scale[:, None]))


def _of_4_bits(shards: Shards) -> dict[str, StoredLinear]:
    states = [name for name in shards.headers if STATE in name]
    for name in states:
        header = shards.expect(name, ["U8"])
        if math.prod(header.shape) > STATE_BYTES:
            raise WeightsError(
                f"tensor {name} of {header.file} has {header.shape}, expected {STATE_BYTES} bytes at most"
            )
    maps = [name.partition(STATE)[0] + ".weight.quant_map" for name in states]
    for name in maps:
        shards.expect(name, ["F32"], (16,))
    small = shards.read_all([*states, *maps])
    found = {}
    for state_name, map_name in zip(states, maps, strict=True):
        weight = map_name.removesuffix(".quant_map")
        what = f"tensor {state_name} of {shards.headers[state_name].file}"
        state = _parse(bytes(small[state_name].tolist()), state_name.partition(STATE)[2], what)
        codebook = tuple(finite(small[map_name], f"tensor {map_name} of {shards.folder}").tolist())
        found[weight] = _linear_of_4_bits(shards, weight, state_name, state, codebook)
    return found


def _parse(text: bytes, kind: str, what: str) -> State:
    """Read the JSON beside a weight. Raises WeightsError naming `what`."""
    try:
        value = json.loads(text)
        out, in_features = value["shape"]
        nested = None
        if "nested_blocksize" in value:
            nested = Nested(value["nested_blocksize"], float(value["nested_offset"]))
        state = State(value["quant_type"], value["blocksize"], (out, in_features), nested)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{what} is no quant_state of a linear: {error!r}") from error
    sizes = [*state.shape, state.block, *([nested.block] if nested else [])]
    if kind not in KINDS or state.kind != kind:
        raise WeightsError(f"{what} is of type {state.kind!r}, expected its name's, {' or '.join(KINDS)}")
    if not all(type(size) is int and 0 < size < 1 << 31 for size in sizes) or (
        nested and not math.isfinite(nested.offset)
    ):
        raise WeightsError(f"{what} has sizes {sizes} and offset {nested and nested.offset}: the file is damaged")
    return state


def _linear_of_4_bits(
    shards: Shards, weight: str, state_name: str, state: State, codebook: tuple[float, ...]
) -> StoredLinear:
    header = shards.expect(weight, STORAGE)
    octets = -(-state.codes // 2)
    if math.prod(header.shape) * STORAGE[header.dtype] != octets:
        raise WeightsError(
            f"tensor {weight} of {header.file} has shape {list(header.shape)}, expected {octets} bytes by its "
            "quant_state"
        )
    group = common_group(state.shape[1], state.block)
    if group < LEAST_GROUP:
        raise WeightsError(
            f"tensor {weight} has blocks of {state.block} and rows of {state.shape[1]} inputs, whose largest common "
            f"factor is {group}; expected {LEAST_GROUP} at least: quantise it with another blocksize"
        )
    names = [weight, state_name, f"{weight}.quant_map", f"{weight}.absmax"]
    shards.expect(f"{weight}.absmax", ["U8" if state.nested else "F32"], (state.blocks,))
    if state.nested:
        shards.expect(f"{weight}.nested_absmax", ["F32"], (-(-state.blocks // state.nested.block),))
        shards.expect(f"{weight}.nested_quant_map", ["F32"], (256,))
        names += [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"]
    form = WeightFormat(state.kind, bits=4, group=group, codebook=codebook)
    return StoredLinear(
        state.shape, form, tuple(names), partial(_read_4_bits, shards, weight, state, form, tuple(names))
    )


def _read_4_bits(
    shards: Shards, weight: str, state: State, form: WeightFormat, names: tuple[str, ...]
) -> QuantizedWeight:
    tensors = shards.read_all([name for name in names if STATE not in name])
    out, in_features = state.shape
    codes = high_first(tensors[weight].reshape(-1).view(torch.uint8))[: state.codes].view(state.shape)
    absmax = finite(_absmax(tensors, weight, state), f"absmax of tensor {weight} of {shards.folder}")
    assert form.group is not None
    if in_features % state.block:  # a group is of the block that its first code is in
        absmax = absmax[torch.arange(0, state.codes, form.group) // state.block]
    return QuantizedWeight(form, codes, GroupScales(absmax.view(out, -1)))


def _absmax(tensors: Mapping[str, Tensor], weight: str, state: State) -> Tensor:
    """Compute the scale of each block, [blocks] fp32."""
    absmax = tensors[f"{weight}.absmax"]
    if state.nested is None:
        return absmax
    values = tensors[f"{weight}.nested_quant_map"][absmax.int()]
    largest = tensors[f"{weight}.nested_absmax"].repeat_interleave(state.nested.block)[: state.blocks]
    return values * largest + state.nested.offset
