"""The border between a base's files and what loads them: tensors by name, dense or quantised, whatever the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from loraplex.kernels.quantized import QuantizedWeight, WeightFormat


class WeightsError(Exception):
    """The checkpoint's weights are missing, damaged, or not those its config promises."""


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a file says of one tensor."""

    file: Path
    shape: tuple[int, ...]  # the logical one, [out, in], however codes are laid out in the file
    element_bytes: int  # of an element in the file; quantised: the most that an element takes while it is read
    format: WeightFormat | None = None  # None: read() yields a Tensor, else a QuantizedWeight of this format


class Checkpoint(Protocol):
    """The tensors of a base by the names of a Hugging Face checkpoint (weight_sizes.expected_shapes lists them).

    What belongs to a quantised weight (scales, zeros, orders) is part of its tensor and has no name of its own.
    """

    @property
    def folder(self) -> Path:
        """Where the files are, for messages: a folder, or a file that holds all."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Map the name of every tensor to what its header says."""
        ...

    def read(self, name: str) -> Tensor | QuantizedWeight:
        """Read the tensor `name`; nothing of it is kept. Raises WeightsError where the file is damaged."""
        ...
