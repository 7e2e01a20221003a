"""Checkpoints that are no files: tensors held in memory, some of them quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from loraplex.kernels.quantized import QuantizedWeight
from loraplex.server.models.checkpoint import StoredTensor
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.weight_sizes import expected_shapes


@dataclass(frozen=True)
class HeldCheckpoint:
    held: Mapping[str, Tensor | QuantizedWeight]
    folder: Path = Path("held")
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # told in the place of the tensors' own

    @classmethod
    def of_shapes(cls, config: ModelConfig) -> HeldCheckpoint:
        """Tensors of the shapes that `config` asks for, in bf16, without memory of their own."""
        shapes = expected_shapes(config).items()
        return cls({name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes})

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        stored = {name: self._stored(tensor) for name, tensor in self.held.items()}
        return stored | {name: replace(stored[name], shape=shape) for name, shape in self.shapes.items()}

    def read(self, name: str) -> Tensor | QuantizedWeight:
        return self.held[name]

    def _stored(self, tensor: Tensor | QuantizedWeight) -> StoredTensor:
        if isinstance(tensor, Tensor):
            return StoredTensor(self.folder, tuple(tensor.shape), tensor.element_size())
        return StoredTensor(self.folder, tuple(tensor.codes.shape), 2, tensor.format)
