"""The header of an adapter's safetensors file: which tensors there are, and where; read without trusting it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files.bounded_json import parse_json
from loraplex.adapters.format.adapter_files import WEIGHTS_FILE, AdapterHead, bad_file

MIN_TENSORS = 4096
"""Taken in a header whatever the base, so that an adapter for a larger one is told what is wrong with it."""

TENSOR_BYTES = 256
"""Of a header for each tensor; 80 layers of a multimodal base take 170."""

TENSOR_VALUES = 16
"""Brackets, colons and commas for each: {"dtype":"F32","shape":[8,64],"data_offsets":[0,2048]}, has 11."""

METADATA_BYTES = 64 << 10

MAX_NAME = 8192
"""Characters of a tensor's name."""

MAX_DIMENSION = 1 << 40

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a safetensors file says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the data, which the header precedes


def parse_header(head: AdapterHead, max_tensors: int = MIN_TENSORS, *, integers: bool = False) -> dict[str, TensorInfo]:
    """The tensors by name; float32, float16 and bfloat16 only, one after the other with no byte between.

    max_tensors: that an adapter of the base can have. integers: whole numbers of 8 to 64 bits may be there too. Raises
    AdapterRefused("bad_file").
    """
    bound = max(MIN_TENSORS, max_tensors)
    known = _FLOATS | (_INTEGERS if integers else {})
    try:
        raw = parse_json(head.header, METADATA_BYTES + TENSOR_BYTES * bound, TENSOR_VALUES * bound)
        found = sorted(_entry(name, described) for name, described in _tensors(raw, bound))
        tensors = {}
        at = 0
        for start, stop, name, dtype, shape in found:
            if dtype not in known:
                raise AdapterRefused(
                    "bad_file", f"{WEIGHTS_FILE}: {name} is {dtype}; expected {', '.join(known)}; convert it"
                )
            info = TensorInfo(known[dtype], shape, at)
            end = at + math.prod(shape) * info.dtype.itemsize
            if (start, stop) != (at, end):
                raise ValueError(f"{name} of shape {list(shape)} lies at bytes {[start, stop]}, expected {[at, end]}")
            tensors[name] = info
            at = end
        if at != head.data_bytes:
            raise ValueError(f"the tensors take {at} bytes and the file holds {head.data_bytes} for them")
    except ValueError as error:
        raise bad_file(error) from error
    return tensors


def view_tensors(data: Tensor, header: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """The tensors of `header` as views of `data`, wherever they start."""
    buffer = data.numpy()

    def view(info: TensorInfo) -> Tensor:
        count = math.prod(info.shape)
        if not count:  # torch makes no view of nothing
            return torch.empty(info.shape, dtype=info.dtype)
        return torch.frombuffer(buffer, dtype=info.dtype, count=count, offset=info.offset).reshape(info.shape)

    return {name: view(info) for name, info in header.items()}


def _tensors(raw: Any, most: int) -> list[tuple[str, Any]]:
    """All that a header describes. Raises ValueError."""
    if not isinstance(raw, dict):
        raise ValueError("its header is no JSON object")
    found = [(name, described) for name, described in raw.items() if name != "__metadata__"]
    if len(found) > most:
        raise ValueError(f"its header has {len(found)} tensors; an adapter of this base has {most} at most")
    return found


def _entry(name: str, described: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """(first byte, end, name, dtype, shape) of a tensor, before anything is computed of them. Raises ValueError."""
    if len(name) > MAX_NAME:
        raise ValueError(f"a tensor's name has {len(name)} characters, at most {MAX_NAME} are read")
    match described:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if len(
            shape
        ) <= 4 and all(type(n) is int and 0 <= n <= MAX_DIMENSION for n in (*shape, start, stop)):
            return start, stop, name, dtype[:32], tuple(shape)
    raise ValueError(
        f"{name} is not described by a dtype, a shape of up to four sizes and two data_offsets, all from 0 to 2 ** 40"
    )
