"""Convert a GGUF file to an ordinary checkpoint: bf16 safetensors, tokenizer, config, chat template.

Only what the embedded demo base needs. transformers can do it too, but takes four times as long, refuses to save what
it has read, and loses the tokenizer's rule that every digit is a token of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loraplex.server.models.gguf.config import CONFIG_FILES, write_config
from loraplex.server.models.gguf.header import GgufError, read_header
from loraplex.server.models.gguf.tokenizer import TOKENIZER_FILES, write_tokenizer

CONVERTER_VERSION = 2
"""Raised whenever the files below would come out differently: older conversions are then made again."""

WEIGHTS = "model.safetensors"
CONVERTED_FILES = (WEIGHTS, *TOKENIZER_FILES, *CONFIG_FILES)

Report = Callable[[str, int, int], None]
"""Called with what is being done, how many units of it are done, and of how many."""


def convert_gguf(source: Path, folder: Path, report: Report) -> None:
    """Write CONVERTED_FILES into `folder` (which exists) from the GGUF file `source`.

    Tensors are dequantised in fp32 and rounded once, to bf16.
    Raises GgufError, or OSError when the folder cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    from loraplex.kernels.quantized import QuantizedWeight, dequantize
    from loraplex.server.models.checkpoint import WeightsError
    from loraplex.server.models.gguf.checkpoint import GgufCheckpoint

    report("reading", 0, 1)
    header = read_header(source)
    write_config(header, folder)  # refuses other architectures before any work is done
    write_tokenizer(header, folder)
    tensors = {}
    try:
        checkpoint = GgufCheckpoint(source)
        for done, name in enumerate(checkpoint.tensors):
            report("converting", done, len(checkpoint.tensors))
            weight = checkpoint.read(name)
            values = dequantize(weight) if isinstance(weight, QuantizedWeight) else weight
            tensors[name] = values.to(torch.bfloat16)
    except WeightsError as error:
        raise GgufError(str(error)) from error
    report("converting", len(tensors), len(tensors))
    report("writing", 0, 1)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # save_file leaves it to its owner alone
    report("writing", 1, 1)
