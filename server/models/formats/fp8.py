"""Linears in 8-bit floating point (E4M3), with a scale for the tensor, for each output or for each block.

"quant_method": "fp8" is two layouts: blocks of weight_block_size with `weight_scale_inv` [out / block, in / block],
rounded up, as DeepSeek and Qwen write them (transformers, integrations/finegrained_fp8.py), and one scale a tensor,
`weight_scale` or `weight_scale_inv`. In both weight = code * scale. compressed-tensors' fp8 is read with the same
functions. Scales of activations are passed over: activations are not rounded to fp8 here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from loraplex.kernels.quantized import GroupScales, QuantizedWeight, WeightFormat
from loraplex.server.models.checkpoint import WeightsError
from loraplex.server.models.formats.settings import Settings
from loraplex.server.models.formats.shards import Shards
from loraplex.server.models.formats.stored import StoredLinear
from loraplex.server.models.formats.unpack import common_group, finite, slices, spread_blocks

CODES = "F8_E4M3"
SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E4M3: tuple[float, ...] = tuple(torch.nan_to_num(_VALUES, nan=0.0).tolist())
"""What each code stands for; 0x7f and 0xff are NaN, which is refused when a weight is read."""

Block = tuple[int, int]


def read_fp8(shards: Shards, settings: Settings) -> dict[str, StoredLinear]:
    """Find the linears of "quant_method": "fp8" by their weights' names. Raises WeightsError."""
    settings.text("activation_scheme", ("dynamic", "static"), default="dynamic")
    block = None if settings.values.get("weight_block_size") is None else settings.pair("weight_block_size")
    found = {}
    for name, header in shards.headers.items():
        if header.dtype == CODES:
            prefix = name.removesuffix("weight")
            scale = f"{prefix}weight_scale"
            if block is not None or scale not in shards.headers:
                scale = f"{prefix}weight_scale_inv"
            found[name] = fp8_linear(shards, name, scale, block, [f"{prefix}input_scale", f"{prefix}activation_scale"])
    return found


def fp8_linear(shards: Shards, name: str, scale: str, block: Block | None, passed_over: Iterable[str]) -> StoredLinear:
    """Check the headers of one linear; block: None, where it has one scale, or one an output. Raises WeightsError.

    passed_over: names of tensors that belong to it and say nothing of the weight.
    """
    header = shards.expect(name, [CODES])
    if len(header.shape) != 2:
        raise WeightsError(f"tensor {name} of {header.file} has shape {list(header.shape)}, expected [out, in]")
    shape = out, in_features = header.shape[0], header.shape[1]
    stored = shards.expect(scale, SCALES)
    single = [(), (1,), (1, 1), (out, 1), (out,)]
    allowed = single if block is None else [(-(-out // block[0]), -(-in_features // block[1]))]
    if stored.shape not in allowed:
        raise WeightsError(
            f"tensor {scale} of {stored.file} has shape {list(stored.shape)}, expected "
            f"{' or '.join(str(list(each)) for each in allowed)}"
        )
    form = WeightFormat(
        "fp8",
        bits=8,
        group=None if block is None else common_group(in_features, block[1]),
        codebook=E4M3,
        scale_bits=16 if stored.dtype == "F16" else 32,
    )
    names = (name, scale, *(each for each in passed_over if each in shards.headers))
    return StoredLinear(shape, form, names, partial(_read, shards, name, scale, block, form))


def _read(shards: Shards, name: str, scale: str, block: Block | None, form: WeightFormat) -> QuantizedWeight:
    tensors = shards.read_all([name, scale])
    codes = tensors[name].view(torch.uint8)
    if any(bool(((codes[rows] & 0x7F) == 0x7F).any()) for rows in slices(*codes.shape)):
        raise WeightsError(f"tensor {name} of {shards.folder} holds NaN: the checkpoint is damaged, download it again")
    out, in_features = codes.shape
    numbers = tensors[scale] if form.scale_bits == 16 else tensors[scale].float()
    finite(numbers, f"tensor {scale} of {shards.folder}")
    if block is None:
        return QuantizedWeight(form, codes, GroupScales(numbers.reshape(-1, 1).expand(out, 1).contiguous()))
    return QuantizedWeight(form, codes, GroupScales(spread_blocks(numbers, (out, in_features), block)))
