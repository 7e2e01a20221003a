"""The reader of a folder's weights, chosen by the quantization_config of its config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loraplex.server.models.checkpoint import WeightsError
from loraplex.server.models.formats.bitsandbytes import read_bitsandbytes
from loraplex.server.models.formats.compressed_tensors import read_compressed_tensors
from loraplex.server.models.formats.fp8 import read_fp8
from loraplex.server.models.formats.gptq import read_awq, read_gptq
from loraplex.server.models.formats.settings import Settings, quantization_settings
from loraplex.server.models.formats.shards import Shards
from loraplex.server.models.formats.stored import FolderCheckpoint, StoredLinear

READERS: dict[str, Callable[[Shards, Settings], dict[str, StoredLinear]]] = {
    "bitsandbytes": read_bitsandbytes,
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
    "awq": read_awq,
    "fp8": read_fp8,
}
"""By quant_method, as transformers calls it."""


def open_folder(folder: Path) -> FolderCheckpoint:
    """Open the weights in `folder`, dense or quantised, reading headers. Raises WeightsError saying what is wrong."""
    settings = quantization_settings(folder)
    if settings is None:
        return FolderCheckpoint(Shards(folder), {})
    method = settings.values.get("quant_method")
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise WeightsError(
            f"{settings.where}.quant_method is {str(method)[:80]!r}, expected one of {', '.join(READERS)}; take a "
            "checkpoint in one of these, a GGUF file, or the original with --quantize"
        )
    shards = Shards(folder)
    linears = reader(shards, settings)
    if not linears:
        raise WeightsError(f"{settings.where} says {method}, but no tensor of the folder is quantised that way")
    return FolderCheckpoint(shards, linears)
