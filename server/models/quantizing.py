"""A dense base whose weights are quantised as they are read: `--quantize int8`, `int4` and `nf4`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from loraplex.kernels.quantized import QuantizedWeight, WeightFormat
from loraplex.server.models.checkpoint import Checkpoint, StoredTensor, WeightsError
from loraplex.server.models.formats.quantize import (
    INT4,
    INT8,
    nf4_format,
    quantize_int4,
    quantize_int8,
    quantize_nf4,
)
from loraplex.server.models.formats.unpack import SLICE
from loraplex.server.models.weight_sizes import EMBED, HEAD, format_names

CODE_BYTES = 2
"""Of each weight once it is quantised: a code, and its share of the scales, the half of one at most."""

TEMPORARY_BYTES = 24
"""Of each weight of a slice that is quantised at once: six numbers in fp32 (quantize_int4 has the most)."""


@dataclass(frozen=True)
class Quantizer:
    """One way to quantise a weight."""

    format: Callable[[int], WeightFormat]  # of a weight with so many inputs
    quantize: Callable[[Tensor], QuantizedWeight]  # [out, in]; raises ValueError


@dataclass(frozen=True)
class LoadScheme:
    """How a whole base is quantised."""

    linears: Quantizer  # of the decoder
    tables: Quantizer | None  # embedding and head; None: they stay as they are


_INT8 = Quantizer(lambda _: INT8, quantize_int8)
_INT4 = Quantizer(lambda _: INT4, quantize_int4)
_NF4 = Quantizer(nf4_format, quantize_nf4)

SCHEMES: Mapping[str, LoadScheme] = {
    # A head of 49,152 x 576 in bf16 is 0.46 of the bytes of SmolLM2-135M in int4, in 8 bits 0.31; 4 bits are too few
    # for it: llama.cpp keeps it at 6 to 8.
    "int8": LoadScheme(_INT8, _INT8),
    "int4": LoadScheme(_INT4, _INT8),
    "nf4": LoadScheme(_NF4, None),  # as QLoRA trains it
}
"""By the word of `--quantize`."""


class QuantizingCheckpoint:
    """Yield the weights of a dense checkpoint as `scheme` has them, everything else as it is."""

    def __init__(self, dense: Checkpoint, name: str) -> None:
        """Look at the headers; `name` is one of SCHEMES.

        Raises WeightsError where the checkpoint is quantised already, or a weight has no such format.
        """
        if found := format_names(dense):
            raise WeightsError(
                f"--quantize {name}: {dense.folder} is quantised already ({found}); leave the option out, or serve the "
                "original in bf16, fp16 or fp32"
            )
        self._dense = dense
        self._quantizers = {
            tensor: quantizer
            for tensor in dense.tensors
            if (quantizer := _quantizer(SCHEMES[name], tensor)) is not None
        }
        self._tensors = dict(dense.tensors)
        for tensor, quantizer in self._quantizers.items():
            self._tensors[tensor] = _quantised(tensor, dense.tensors[tensor], quantizer)

    @property
    def folder(self) -> Path:
        return self._dense.folder

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Map the name of every tensor to what it is once it is read."""
        return self._tensors

    def read(self, name: str) -> Tensor | QuantizedWeight:
        """Read the tensor `name` and quantise it where the scheme says so.

        Raises WeightsError where the file is damaged, or a value is NaN or infinite.
        """
        tensor, quantizer = self._dense.read(name), self._quantizers.get(name)
        if quantizer is None:
            return tensor
        assert isinstance(tensor, Tensor)
        try:
            return quantizer.quantize(tensor)
        except ValueError as error:
            raise WeightsError(f"tensor {name} of {self._tensors[name].file}: {error}") from error


def _quantizer(scheme: LoadScheme, name: str) -> Quantizer | None:
    if name in (EMBED, HEAD):
        return scheme.tables
    return scheme.linears if name.endswith("_proj.weight") else None


def _quantised(name: str, stored: StoredTensor, quantizer: Quantizer) -> StoredTensor:
    if len(stored.shape) != 2:
        return stored  # check_tensors says what is wrong with it
    out, columns = stored.shape
    try:
        form = quantizer.format(columns)
        form.groups(columns)
    except ValueError as error:
        raise WeightsError(f"tensor {name} of {stored.file} cannot be quantised so: {error}") from error
    weights = max(1, out * columns)
    temporary = -(-TEMPORARY_BYTES * min(SLICE, weights) // weights)
    return replace(stored, element_bytes=stored.element_bytes + CODE_BYTES + temporary, format=form)
