"""Linears in the layouts of GPTQ and of AWQ: int32 words of codes, for kernels that go down the inputs.

GPTQ (GPTQModel, nn_modules/qlinear: BaseQuantLinear.dequantize_weight, pack_block): `qweight` [in / per, out] with
per = 32 / bits codes a word along the inputs, the lowest bits first; `qzeros` [in / group, out / per]; `scales`
[in / group, out]; `g_idx` [in], the group of each input. weight = scale * (code - zero). In version 1,
checkpoint_format "gptq", zeros are stored less one.

AWQ (AutoAWQ, modules/linear/gemm.py: WQLinear_GEMM.from_linear): `qweight` [in, out / 8] with codes along the outputs,
which lie in a word in the order AWQ_ORDER; `qzeros` likewise, and as they are; `scales` as above.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loraplex.kernels.quantized import GroupScales, QuantizedWeight, WeightFormat
from loraplex.server.models.checkpoint import WeightsError
from loraplex.server.models.formats.settings import Settings
from loraplex.server.models.formats.shards import Header, Shards
from loraplex.server.models.formats.stored import StoredLinear
from loraplex.server.models.formats.unpack import SIGN, finite, low_first, offset_of, order_of, signed, unpack_codes

SCALES = ("F16", "BF16", "F32")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each place of a word has, the lowest bits first."""


@dataclass(frozen=True)
class IntLayout:
    """How all quantised linears of a folder are laid out."""

    method: str  # "gptq" or "awq"
    bits: int  # 4 or 8
    group: int | None  # inputs of a group; None: all
    symmetric: bool
    zero_shift: int  # what is to be added to a stored zero

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def middle(self) -> int:
        """Give the zero of a symmetric weight."""
        return 1 << (self.bits - 1)

    def shape(self, words: Header | Tensor) -> tuple[int, int]:
        """Tell [out, in] of a qweight."""
        rows, columns = words.shape
        return (columns, rows * self.per_word) if self.method == "gptq" else (columns * self.per_word, rows)

    def codes(self, words: Tensor, rows: slice) -> Tensor:
        """Unpack `rows` of the outputs of a qweight into [rows, in], int8 of 8 bits, else uint8.

        AWQ's begin and end with a word.
        """
        if self.method == "gptq":
            codes = low_first(words[:, rows].T, self.bits)
        else:
            codes = self._along_outputs(words[:, rows.start // self.per_word : -(-rows.stop // self.per_word)]).T
        return signed(codes) if self.bits == 8 else codes

    def zeros(self, words: Tensor) -> Tensor:
        """Unpack qzeros [groups, out / per] into zeros [out, groups] int32."""
        zeros = self._along_outputs(words).int() + self.zero_shift
        return (zeros & ((1 << self.bits) - 1)).T

    def _along_outputs(self, words: Tensor) -> Tensor:
        """Unpack words [rows, out / per] into [rows, out] uint8."""
        codes = low_first(words, self.bits)
        if self.method == "gptq":
            return codes
        placed = codes.view(words.shape[0], -1, self.per_word)
        return torch.empty_like(placed).index_copy_(2, torch.tensor(AWQ_ORDER), placed).view(words.shape[0], -1)


def read_gptq(shards: Shards, settings: Settings) -> dict[str, StoredLinear]:
    """Find the linears that GPTQ has quantised by their weights' names. Raises WeightsError."""
    settings.text("pack_dtype", ("int32",), default="int32")
    settings.refuse(["dynamic"], "none: a checkpoint whose linears differ is not read here")
    layout = IntLayout(
        method="gptq",
        bits=settings.integer("bits", (4, 8)),
        group=_group(settings, "group_size"),
        symmetric=settings.flag("sym", True),
        zero_shift=1 if settings.text("checkpoint_format", ("gptq", "gptq_v2"), default="gptq") == "gptq" else 0,
    )
    return _linears(shards, layout)


def read_awq(shards: Shards, settings: Settings) -> dict[str, StoredLinear]:
    """Find the linears that AWQ has quantised by their weights' names. Raises WeightsError."""
    settings.text("version", ("gemm",), default="gemm")
    if not settings.flag("zero_point", True):
        raise settings.error("zero_point", "true")
    bits = settings.integer("w_bit" if "w_bit" in settings.values else "bits", (4,))
    group = _group(settings, "q_group_size" if "q_group_size" in settings.values else "group_size")
    return _linears(shards, IntLayout("awq", bits, group, symmetric=False, zero_shift=0))


def _group(settings: Settings, name: str) -> int | None:
    if settings.values.get(name) == -1:
        return None
    return settings.integer(name)


def _linears(shards: Shards, layout: IntLayout) -> dict[str, StoredLinear]:
    prefixes = [name.removesuffix("qweight") for name in shards.headers if name.endswith(".qweight")]
    return {f"{prefix}weight": _linear(shards, layout, prefix) for prefix in prefixes}


def _linear(shards: Shards, layout: IntLayout, prefix: str) -> StoredLinear:
    """Check the headers of one linear."""
    words = shards.expect(f"{prefix}qweight", ["I32"])
    what = f"tensor {prefix}qweight of {words.file}"
    if len(words.shape) != 2:
        raise WeightsError(f"{what} has shape {list(words.shape)}, expected two sizes")
    out, in_features = layout.shape(words)
    group = layout.group or in_features
    if in_features % group:
        raise WeightsError(f"{what} has {in_features} inputs, which the group_size {group} does not divide")
    if out % layout.per_word:
        raise WeightsError(f"{what} has {out} outputs, expected a multiple of {layout.per_word}, the codes of a word")
    groups = in_features // group
    scale = shards.expect(f"{prefix}scales", SCALES, (groups, out))
    shards.expect(f"{prefix}qzeros", ["I32"], (groups, out // layout.per_word))
    names = [f"{prefix}{kind}" for kind in ("qweight", "scales", "qzeros")]
    if f"{prefix}g_idx" in shards.headers:
        shards.expect(f"{prefix}g_idx", ["I32"], (in_features,))
        names.append(f"{prefix}g_idx")
    form = WeightFormat(
        layout.method,
        bits=layout.bits,
        group=layout.group,
        zero=layout.middle if layout.symmetric and layout.bits == 4 else 0,
        scale_bits=16 if layout.symmetric and scale.dtype == "F16" else 32,
        has_offset=not layout.symmetric,
    )
    return StoredLinear((out, in_features), form, tuple(names), partial(_read, shards, layout, prefix, form, names))


def _read(shards: Shards, layout: IntLayout, prefix: str, form: WeightFormat, names: list[str]) -> QuantizedWeight:
    tensors = shards.read_all(names)
    scale = finite(tensors[f"{prefix}scales"], f"tensor {prefix}scales of {shards.folder}").T
    scale = (scale if form.scale_bits == 16 else scale.float()).contiguous()
    zeros = layout.zeros(tensors[f"{prefix}qzeros"])
    if layout.symmetric and bool((zeros != layout.middle).any()):
        raise WeightsError(
            f"tensor {prefix}qzeros of {shards.folder} has other zeros than {layout.middle}, which alone "
            "quantization_config.sym, true, allows"
        )
    words = tensors[f"{prefix}qweight"]
    shape = layout.shape(words)
    order = None
    if f"{prefix}g_idx" in tensors:
        group = form.group or shape[1]
        order = order_of(tensors[f"{prefix}g_idx"], group, f"tensor {prefix}g_idx of {shards.folder}")
    codes = unpack_codes(shape, order, partial(layout.codes, words))
    offset = None if layout.symmetric else offset_of(scale, zeros - SIGN if form.bits == 8 else zeros)
    return QuantizedWeight(form, codes, GroupScales(scale), offset, order)
