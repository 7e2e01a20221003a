"""Weight formats and random weights of them, of the size that a trained model's weights have."""

from __future__ import annotations

import torch

from loraplex.kernels.quantized import GroupScales, QuantizedWeight, WeightFormat

Q4 = WeightFormat("Q4_1", bits=4, group=32, scale_bits=16, has_offset=True)
Q8 = WeightFormat("Q8_0", bits=8, group=32, scale_bits=16)
ROWWISE = WeightFormat("int8", bits=8, group=None)
SIXTEEN = WeightFormat("levels", bits=4, group=32, codebook=tuple(level / 8 - 1 for level in range(16)))


def random_weight(form: WeightFormat, out: int, columns: int, seed: int, order: bool = False) -> QuantizedWeight:
    """Draw codes and scales; `order`: and an order of the inputs."""
    rng = torch.Generator().manual_seed(seed)
    signed = form.bits == 8 and form.zero == 0 and form.codebook is None
    low, high = (-127, 128) if signed else (0, 1 << form.bits)
    codes = torch.randint(low, high, (out, columns), generator=rng, dtype=torch.int8 if signed else torch.uint8)
    number = torch.float16 if form.scale_bits == 16 else torch.float32
    step = 0.3 / columns**0.5 / (1.0 if form.codebook else float(high))
    scale = ((0.5 + torch.rand(out, form.groups(columns), generator=rng)) * step).to(number)
    offset = GroupScales((-scale.float() * (high - 1) / 2).to(number)) if form.has_offset else None
    places = torch.randperm(columns, generator=rng) if order else None
    return QuantizedWeight(form, codes, GroupScales(scale), offset, places)
