"""Checkpoints of folders: linears that are kept quantised, and everything else as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from loraplex.kernels.quantized import QuantizedWeight, WeightFormat
from loraplex.server.models.checkpoint import StoredTensor, WeightsError
from loraplex.server.models.formats.shards import Shards

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
"""safetensors' names of the types a dense weight may have in the file: bytes of an element."""

READING_BYTES = 4
"""Bytes that a code takes at most while it is read: packed, unpacked, and once more in another order."""


@dataclass(frozen=True)
class StoredLinear:
    """A quantised linear in a folder's files."""

    shape: tuple[int, int]  # [out, in]
    format: WeightFormat
    names: tuple[str, ...]  # of the tensors it is made of; the first is the codes
    read: Callable[[], QuantizedWeight] = field(repr=False)  # raises WeightsError


class FolderCheckpoint:
    """Read a folder whose `linears`, by the names of their weights, are quantised."""

    def __init__(self, shards: Shards, linears: Mapping[str, StoredLinear]) -> None:
        """Check the types of what is dense. Raises WeightsError."""
        self._shards = shards
        self._linears = linears
        self._tensors: dict[str, StoredTensor] = {}
        swallowed = {name for linear in linears.values() for name in linear.names}
        for name, header in shards.headers.items():
            if name in swallowed:
                continue
            if header.dtype not in WIDTHS:
                raise WeightsError(
                    f"tensor {name} of {header.file} is {header.dtype}, expected one of {', '.join(WIDTHS)}"
                )
            self._tensors[name] = StoredTensor(header.file, header.shape, WIDTHS[header.dtype])
        for name, linear in linears.items():
            if name in self._tensors:
                raise WeightsError(f"tensor {name} is both dense and quantised, as {linear.names[0]}")
            file = shards.headers[linear.names[0]].file
            self._tensors[name] = StoredTensor(file, linear.shape, READING_BYTES, linear.format)

    @property
    def folder(self) -> Path:
        return self._shards.folder

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Map the name of every tensor to what its header says."""
        return self._tensors

    def read(self, name: str) -> Tensor | QuantizedWeight:
        """Read the tensor `name`: a dense one is mapped, in the file's dtype. Raises WeightsError."""
        linear = self._linears.get(name)
        return self._shards.read(name) if linear is None else linear.read()
