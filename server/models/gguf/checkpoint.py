"""Read the weights of a GGUF file as a checkpoint: its names, its order of rows, codes and scales as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loraplex.kernels.quantized import QuantizedWeight
from loraplex.server.models.checkpoint import StoredTensor, WeightsError
from loraplex.server.models.gguf.blocks import DENSE, QUANTIZED, SUPPORTED, Array, quantized_weight, type_name
from loraplex.server.models.gguf.header import GgufError, StoredBlocks, read_header
from loraplex.server.models.gguf.names import ROPE_FACTORS, checkpoint_name, head_count_of, norm_offset, row_order

CODE_BYTES = 2
"""Of a quantised element while it is read: its code, and its share of the mapped file and of the scales."""


class GgufCheckpoint:
    """Read the tensors of one GGUF file, one at a time."""

    def __init__(self, file: Path) -> None:
        """Read the header alone. Raises WeightsError where it is damaged, or a tensor is none that can be served."""
        self.folder = file
        try:
            header = read_header(file, vocabulary=False)
            self._stamp = _stamp(file)
            self._architecture = header.architecture
            heads = header.whole(f"{self._architecture}.attention.head_count")
            self._heads = heads, header.whole(f"{self._architecture}.attention.head_count_kv", heads)
        except (GgufError, OSError) as error:
            raise WeightsError(str(error)) from error
        self._blocks: dict[str, StoredBlocks] = {}
        self._tensors: dict[str, StoredTensor] = {}
        for stored in header.tensors:
            if stored.name not in ROPE_FACTORS:
                self._index(stored, header.bytes)

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Map the checkpoint's name of every tensor to what the header says; rope factors are none of the weights."""
        return self._tensors

    def read(self, name: str) -> Tensor | QuantizedWeight:
        """Read the tensor `name`: a Tensor in the file's dtype or, of a quantised type, its codes and scales.

        Raises WeightsError where the file changed meanwhile or a scale is not finite.
        """
        stored, architecture = self._blocks[name], self._architecture
        heads = head_count_of(stored.name, architecture, *self._heads)
        order = None if heads is None else row_order(stored.shape[0], heads)
        data = self._mapped(stored)
        dtype = DENSE.get(stored.type)
        if dtype is None:
            try:
                return quantized_weight(QUANTIZED[stored.type], data, order)
            except ValueError as error:
                raise self._wrong(stored, f"{error}: it is damaged; download it again") from error
        tensor = torch.from_numpy(data).view(dtype).view(stored.shape)
        if order is not None:
            tensor = tensor[torch.from_numpy(order)]
        offset = norm_offset(stored.name, architecture)
        return tensor - offset if offset else tensor

    def _index(self, stored: StoredBlocks, file_bytes: int) -> None:
        """Note one tensor under the checkpoint's name."""
        architecture = self._architecture
        name = checkpoint_name(stored.name, architecture)
        if name is None:
            raise self._wrong(stored, f"is none of a {architecture} that can be served")
        if stored.type not in DENSE and stored.type not in QUANTIZED:
            raise self._wrong(stored, f"is {type_name(stored.type)}, expected one of {SUPPORTED}")
        kind = QUANTIZED.get(stored.type)
        if kind is not None and (len(stored.shape) != 2 or stored.shape[1] % kind.block):
            raise self._wrong(
                stored,
                f"has shape {list(stored.shape)}, and rows of {kind.format.name} are whole blocks of {kind.block}",
            )
        if stored.start + math.prod(_stored_shape(stored)) > file_bytes:
            raise self._wrong(stored, "goes beyond the file's end: it is cut short; download it again")
        heads = head_count_of(stored.name, architecture, *self._heads)
        if heads is not None and (heads == 0 or stored.shape[0] % (2 * heads)):
            raise self._wrong(stored, f"has {stored.shape[0]} rows, which are not pairs of {heads} heads")
        if norm_offset(stored.name, architecture) and stored.type != 0:
            raise self._wrong(stored, f"is {type_name(stored.type)}, expected F32 for a norm")
        form = None if kind is None else kind.format
        width = DENSE[stored.type].itemsize if kind is None else CODE_BYTES
        self._blocks[name] = stored
        self._tensors[name] = StoredTensor(self.folder, stored.shape, width, form)

    def _mapped(self, stored: StoredBlocks) -> Array:
        """Map the bytes of a tensor, [rows, bytes of a row]; the mapping ends with whatever is made of it."""
        try:
            if _stamp(self.folder) != self._stamp:  # adapters may ask for a weight hours after the start
                raise self._wrong(stored, "cannot be read any more: the file is another one since the start")
            return np.memmap(self.folder, np.uint8, "c", stored.start, _stored_shape(stored))
        except (OSError, ValueError) as error:
            raise self._wrong(stored, f"cannot be read any more: {error}") from error

    def _wrong(self, stored: StoredBlocks, reason: str) -> WeightsError:
        return WeightsError(f"tensor {stored.name[:80]!r} of {self.folder} {reason}")


def _stamp(file: Path) -> tuple[int, ...]:
    """Read what tells of a change: device, inode, bytes, modified ns."""
    info = file.stat()
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _stored_shape(stored: StoredBlocks) -> tuple[int, int]:
    """Compute [rows, bytes of a row]; a vector is one row."""
    rows = math.prod(stored.shape[:-1])
    kind = QUANTIZED.get(stored.type)
    if kind is not None:
        return rows, stored.shape[-1] // kind.block * kind.block_bytes
    return rows, stored.shape[-1] * DENSE[stored.type].itemsize
