"""Linears in the formats of compressed-tensors (llm-compressor): 8 bits, packed 4 and 8 bits, and fp8.

int-quantized: `weight` int8 [out, in], `weight_scale` [out, 1], and `weight_zero_point` int8 where it is asymmetric.
pack-quantized: `weight_packed` int32 [out, in * bits / 32], lowest bits first, of codes that stand for themselves less
half of their range; `weight_scale` [out, groups]; `weight_shape`; `weight_zero_point` packed down the outputs,
[out * bits / 32, groups]; `weight_g_idx` [in], the group of each input, where they are ordered by importance.
float-quantized: as fp8.py says. weight = scale * (code - zero point) (compressed-tensors 0.20, quantization/lifecycle/
forward.py and compressors/; weight_g_idx is of versions before 0.20).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from loraplex.kernels.quantized import Activations, GroupScales, QuantizedWeight, WeightFormat
from loraplex.server.models.checkpoint import WeightsError
from loraplex.server.models.formats.fp8 import Block, fp8_linear
from loraplex.server.models.formats.settings import Settings
from loraplex.server.models.formats.shards import Shards
from loraplex.server.models.formats.stored import StoredLinear
from loraplex.server.models.formats.unpack import finite, low_first, offset_of, order_of, signed, unpack_codes

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
SCALES = ("F32", "F16", "BF16")
STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class GroupScheme:
    """How the linears of a config_group are quantised."""

    where: str  # of its settings, for messages
    targets: tuple[str, ...]  # names, "re:" and a pattern, or a class
    floating: bool
    bits: int  # 4 or 8
    symmetric: bool
    strategy: str  # one of STRATEGIES
    group: int | None  # with the strategy "group"
    block: Block | None  # with the strategy "block"
    inputs: bool  # activations are rounded too

    @property
    def name(self) -> str:
        return "fp8" if self.floating else f"w{self.bits}a{8 if self.inputs else 16}"

    def covers(self, module: str) -> bool:
        """Tell whether a target names `module`, such as "model.layers.0.mlp.up_proj"."""
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        return any(
            re.match(target.removeprefix("re:"), module) if target.startswith("re:") else target in (module, kind)
            for target in self.targets
        )


def read_compressed_tensors(shards: Shards, settings: Settings) -> dict[str, StoredLinear]:
    """Find the quantised linears by their weights' names. Raises WeightsError."""
    settings.refuse(["kv_cache_scheme"], "null: keys and values are not quantised here")
    settings.refuse(["transform_config"])
    sparsity = settings.part("sparsity_config")
    if sparsity is not None:
        sparsity.text("format", ("dense",), default="dense")
    groups = settings.part("config_groups")
    if groups is None:
        raise settings.error("config_groups", "an object")
    parts = [part for part in map(groups.part, groups.values) if part is not None]
    schemes = [_scheme(part, settings) for part in parts]
    found = {}
    for name in shards.headers:
        prefix, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            found[f"{prefix}.weight"] = _packed(shards, prefix, _scheme_of(prefix, schemes, name))
        elif kind == "weight_scale" and f"{prefix}.weight" in shards.headers:
            found[f"{prefix}.weight"] = _naive(shards, prefix, _scheme_of(prefix, schemes, name))
    return found


def _scheme(part: Settings, whole: Settings) -> GroupScheme:
    """Read one config_group. Raises WeightsError."""
    settings = part if part.values.get("format") else whole
    settings.text("format", FORMATS)
    part.refuse(["output_activations"], "null: outputs are not quantised here")
    weights, inputs = part.part("weights"), part.part("input_activations")
    if weights is None:
        raise part.error("weights", "an object")
    if inputs is not None:
        inputs.integer("num_bits", (8,))
    targets = part.values.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise part.error("targets", "a list of names")
    for target in targets:
        _compiles(target, part)
    floating = weights.text("type", ("int", "float"), default="int") == "float"
    group = weights.values.get("group_size")
    strategy = weights.text("strategy", STRATEGIES, default=_strategy(group))
    return GroupScheme(
        where=weights.where,
        targets=tuple(targets),
        floating=floating,
        bits=weights.integer("num_bits", (8,) if floating else (4, 8)),
        symmetric=weights.flag("symmetric", True),
        strategy=strategy,
        group=weights.integer("group_size") if strategy == "group" else None,
        block=weights.pair("block_structure") if strategy == "block" else None,
        inputs=inputs is not None,
    )


def _strategy(group: object) -> str:
    """Say what a missing strategy means, as QuantizationArgs does."""
    if group is None:
        return "tensor"
    return "channel" if group == -1 else "group"


def _compiles(target: str, part: Settings) -> None:
    try:
        re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise part.error("targets", f"patterns of re ({error})") from error


def _scheme_of(module: str, schemes: Iterable[GroupScheme], tensor: str) -> GroupScheme:
    for scheme in schemes:
        if scheme.covers(module):
            return scheme
    raise WeightsError(
        f"tensor {tensor} is quantised, but no target of quantization_config.config_groups names {module}"
    )


def _helpers(shards: Shards, prefix: str) -> tuple[str, ...]:
    """List what belongs to a linear and says nothing of its weight: activations are rounded by their own rows."""
    return tuple(name for name in (f"{prefix}.input_scale", f"{prefix}.input_zero_point") if name in shards.headers)


def _naive(shards: Shards, prefix: str, scheme: GroupScheme) -> StoredLinear:
    """Check the headers of a linear with a byte for each code."""
    weight, scale, zero = (f"{prefix}.{kind}" for kind in ("weight", "weight_scale", "weight_zero_point"))
    if scheme.floating:
        if not scheme.symmetric:
            raise WeightsError(f"{scheme.where}.symmetric is false, which is not read with type float")
        if scheme.strategy == "group":
            raise WeightsError(f"{scheme.where}.strategy is group, which is not read with type float")
        return fp8_linear(shards, weight, scale, scheme.block, [*_helpers(shards, prefix), zero])
    header = shards.expect(weight, ["I8"])
    if len(header.shape) != 2:
        raise WeightsError(f"tensor {weight} of {header.file} has shape {list(header.shape)}, expected [out, in]")
    shape = header.shape[0], header.shape[1]
    form = _format(shards, scale, shape, scheme)
    names = [weight, scale, *_helpers(shards, prefix)]
    if not scheme.symmetric or zero in shards.headers:
        shards.expect(zero, ["I8"], shards.headers[scale].shape)
        names.append(zero)
    return StoredLinear(shape, form, tuple(names), partial(_read_naive, shards, prefix, form))


def _packed(shards: Shards, prefix: str, scheme: GroupScheme) -> StoredLinear:
    """Check the headers of a linear with int32 words of codes."""
    words, scale, zero, size, g_idx = (
        f"{prefix}.{kind}"
        for kind in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    )
    if scheme.floating or scheme.strategy == "block":
        raise WeightsError(f"{scheme.where} says float or blocks, but tensor {words} is packed")
    header = shards.expect(words, ["I32"])
    shards.expect(size, ["I64", "I32"], (2,))
    out, in_features = (int(each) for each in shards.read(size))
    expected = (out, -(-in_features * scheme.bits // 32))
    if header.shape != expected:
        raise WeightsError(
            f"tensor {words} of {header.file} has shape {list(header.shape)}, expected {list(expected)} by "
            f"{scheme.where}.num_bits {scheme.bits} and weight_shape {[out, in_features]}"
        )
    form = _format(shards, scale, (out, in_features), scheme)
    names = [words, scale, size, *_helpers(shards, prefix)]
    if not scheme.symmetric or zero in shards.headers:
        if scheme.strategy == "tensor":
            raise WeightsError(f"{scheme.where}.strategy is tensor, which is not read with {zero}")
        shards.expect(zero, ["I32"], (-(-out * scheme.bits // 32), form.groups(in_features)))
        names.append(zero)
    if g_idx in shards.headers:
        shards.expect(g_idx, ["I32", "I64"], (in_features,))
        names.append(g_idx)
    read = partial(_read_packed, shards, prefix, form, (out, in_features))
    return StoredLinear((out, in_features), form, tuple(names), read)


def _format(shards: Shards, scale: str, shape: tuple[int, int], scheme: GroupScheme) -> WeightFormat:
    """Check the header of `scale` and say which format its weight is of."""
    out, in_features = shape
    group = scheme.group if scheme.strategy == "group" else None
    if group is not None and in_features % group:
        raise WeightsError(
            f"{scheme.where}.group_size is {group}, which does not divide the {in_features} inputs of {scale}"
        )
    header = shards.expect(scale, SCALES)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "tensor": [(), (1,), (1, 1)],
        "channel": [(out, 1), (out,)],
        "group": [(out, in_features // (group or in_features))],
    }
    allowed = shapes.get(scheme.strategy, [])
    if header.shape not in allowed:
        raise WeightsError(
            f"tensor {scale} of {header.file} has shape {list(header.shape)}, expected "
            f"{' or '.join(str(list(each)) for each in allowed) or 'another strategy'} by {scheme.where}"
        )
    return WeightFormat(
        scheme.name,
        bits=scheme.bits,
        group=group,
        zero=8 if scheme.symmetric and scheme.bits == 4 else 0,
        scale_bits=16 if scheme.symmetric and header.dtype == "F16" else 32,
        has_offset=not scheme.symmetric,
        activations=Activations.A8 if scheme.inputs else None,
    )


def _scales(scale: Tensor, form: WeightFormat, out: int, what: str) -> Tensor:
    """Shape a scale as [out, groups], one for the whole tensor repeated, in the dtype that the format counts."""
    finite(scale, what)
    scale = scale.reshape(1, 1).expand(out, 1) if scale.numel() == 1 else scale.reshape(out, -1)
    return (scale if form.scale_bits == 16 else scale.float()).contiguous()


def _symmetric(zeros: Tensor, middle: int, what: str) -> None:
    """Raise WeightsError naming `what` unless all `zeros` are `middle`."""
    if bool((zeros != middle).any()):
        raise WeightsError(f"{what} has other zeros than {middle}, which the config's symmetric, true, allows alone")


def _read_naive(shards: Shards, prefix: str, form: WeightFormat) -> QuantizedWeight:
    weight, scale, zero = (f"{prefix}.{kind}" for kind in ("weight", "weight_scale", "weight_zero_point"))
    tensors = shards.read_all([weight, scale, *([zero] if zero in shards.headers else [])])
    codes = tensors[weight]
    if not form.has_offset and zero in tensors:
        _symmetric(tensors[zero], 0, f"tensor {zero} of {shards.folder}")
    numbers = _scales(tensors[scale], form, codes.shape[0], f"tensor {scale} of {shards.folder}")
    offset = None
    if form.has_offset:
        offset = offset_of(numbers, tensors[zero].reshape(-1, 1).expand(numbers.shape))
    return QuantizedWeight(form, codes, GroupScales(numbers), offset)


def _read_packed(shards: Shards, prefix: str, form: WeightFormat, shape: tuple[int, int]) -> QuantizedWeight:
    out, in_features = shape
    words, scale, zero, g_idx = (
        f"{prefix}.{kind}" for kind in ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
    )
    tensors = shards.read_all([words, scale, *(name for name in (zero, g_idx) if name in shards.headers)])
    numbers = _scales(tensors[scale], form, out, f"tensor {scale} of {shards.folder}")
    offset = None
    if zero in tensors:
        zeros = low_first(tensors[zero].T, form.bits)[:, :out].T
        if form.has_offset:
            offset = offset_of(numbers, signed(zeros) if form.bits == 8 else zeros)
        else:
            _symmetric(zeros, 1 << (form.bits - 1), f"tensor {zero} of {shards.folder}")
    order = None
    if g_idx in tensors and bool((tensors[g_idx] >= 0).any()):  # all of them -1: none
        group = form.group or in_features
        order = order_of(tensors[g_idx], group, f"tensor {g_idx} of {shards.folder}")

    def unpack(rows: slice) -> Tensor:
        codes = low_first(tensors[words][rows], form.bits)[:, :in_features]
        return signed(codes) if form.bits == 8 else codes

    return QuantizedWeight(form, unpack_codes(shape, order, unpack), GroupScales(numbers), offset, order)
