"""Readers of weight formats: the tensors of a base's files by name, whatever the format.

`open_checkpoint` is the one place that chooses a reader by what the folder holds. A further format is a Checkpoint in a
file of its own, and its line there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from loraplex.kernels.quantized import QuantizedWeight, WeightFormat

IGNORED = ("rotary_emb.inv_freq",)
"""Ends of names that old checkpoints carry and nobody needs: buffers that are computed."""

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
"""safetensors' names of the types a weight may have in the file: bytes of an element."""


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


class DenseCheckpoint:
    """Read the safetensors files of one folder, one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        """Read the headers alone. Raises WeightsError where a file is missing, damaged or of another type."""
        self.folder = folder
        self._tensors: dict[str, StoredTensor] = {}
        for file in _shards(folder):
            self._index(file)

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Map the name of every tensor but the IGNORED ones to what its header says."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """Map the tensor `name` from its file, in the file's dtype. The mapping ends with the tensor.

        Raises WeightsError where the file changed meanwhile.
        """
        from safetensors import SafetensorError, safe_open

        file = self._tensors[name].file
        try:
            with safe_open(file, framework="pt") as shard:
                tensor: Tensor = shard.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"tensor {name} of {file} cannot be read: {error}") from error

    def _index(self, file: Path) -> None:
        """Note the tensors of one file. Opening reads the header only and compares it with the file's length."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  not a mapping
                    if name.endswith(IGNORED):
                        continue
                    view = shard.get_slice(name)
                    twin = self._tensors.get(name)
                    if twin is not None:
                        raise WeightsError(f"tensor {name} is both in {twin.file.name} and in {file.name}")
                    if view.get_dtype() not in WIDTHS:
                        raise WeightsError(
                            f"tensor {name} of {file} is {view.get_dtype()}, expected one of {', '.join(WIDTHS)}"
                        )
                    self._tensors[name] = StoredTensor(file, tuple(view.get_shape()), WIDTHS[view.get_dtype()])
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is damaged or cut short: {error}; download it again") from error


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the weights at `path`, reading headers only. Raises WeightsError naming the file and what is wrong."""
    folder = Path(path)
    quantisation = _quantization_config(folder)
    if quantisation is not None:
        method = quantisation.get("quant_method")
        raise WeightsError(
            f"the checkpoint is quantised ({method}), which is not supported; use its bf16, fp16 or fp32 original"
        )
    return DenseCheckpoint(folder)


def _quantization_config(folder: Path) -> dict[str, Any] | None:
    """Read what config.json says of how the weights are quantised; None: nothing."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # ModelConfig says what is wrong with it
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else None


def _shards(folder: Path) -> Iterator[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        yield single
        return
    if not index.exists():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is never loaded: convert it to safetensors" if pickled else ""
        raise WeightsError(f"{folder} has neither model.safetensors nor model.safetensors.index.json{hint}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} cannot be read: expected a JSON object with a weight_map ({error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"{index} names the shard {name!r}: expected a file of the same folder")
        if not (folder / name).exists():
            raise WeightsError(f"{index} names the shard {name}, which is missing: download it again")
        yield folder / name
