"""A base's weights, checked against its config, fused and packed for the ops, one linear at a time.

Every tensor of the checkpoint is checked against the config by name and shape before the first is read. Then each is
copied out of the mapped file straight into the place it keeps, and its mapping is dropped: the most that lies in memory
beside the packed model is one linear. Quantised weights go to the backend as they are read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from loraplex.kernels.ops import Backend, PackedLinear
from loraplex.kernels.quantized import A8_GROUP, Activations, QuantizedWeight, WeightFormat, join
from loraplex.kernels.records import Projection
from loraplex.server.models.checkpoint import Checkpoint
from loraplex.server.models.config import ModelConfig, Site
from loraplex.server.models.weight_sizes import EMBED, HEAD, NORM, check_shape, check_tensors, layer_norms, linear_names

logger = logging.getLogger(__name__)

EXACT_NIBBLES = frozenset({"amx"})
"""Instruction sets where integers of 4 bits take exact inputs: a matrix unit multiplies them. Times as fast as bf16 on
a Xeon at 1, 4, 16, 36, 96 rows: 8-bit inputs 2.89, 2.52, 1.13, 0.76, 0.40, exact (NF4) 2.50, 2.05, 1.63, 1.26, 0.71.
Of 8 bits a code nothing is known there."""


@dataclass(frozen=True)
class Linear:
    """Hold the fused base linear of one site: its packed weight and its bias."""

    weight: PackedLinear
    bias: Tensor | None  # [out] compute dtype


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Norm weights are [hidden] (q_norm, k_norm: [head_dim]) in the compute dtype."""

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    attention_out_norm: Tensor | None  # sandwich norm
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    mlp_out_norm: Tensor | None  # sandwich norm


@dataclass(frozen=True)
class ModelWeights:
    """All weights of a base, in the compute dtype on the backend's device."""

    embedding: PackedLinear  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    head: PackedLinear  # [vocab, hidden]; tied: the embedding itself
    dtype: torch.dtype


def load_checkpoint(
    checkpoint: Checkpoint,
    config: ModelConfig,
    ops: Backend,
    dtype: torch.dtype,
    device: torch.device | None = None,
    activations: Activations | None = None,
) -> ModelWeights:
    """Read `checkpoint`, fuse and pack its weights; dense ones are converted to `dtype`.

    device: where weights are handed to the ops; None: the ops' own. activations: of quantised linears; None: what suits
    their formats, see default_activations. Raises WeightsError naming what is missing, left over, misshapen or damaged.
    """
    check_tensors(checkpoint, config)
    return _Loader(checkpoint, config, ops, dtype, device or ops.device, activations).load()


def default_activations(formats: Sequence[WeightFormat], device: torch.device, isa: str) -> Activations:
    """Choose how exact the inputs are of a linear with parts of `formats`: in 8 bits where that suits all, or exact.

    On the CPU 8 bits suit integers whose scales are for groups of inputs, since their products are integers then. They
    do not suit a codebook (NF4's adapters were trained on exact inputs, fp8 is no integer), nor scales for all inputs,
    where one for a whole row of inputs costs ten times as much accuracy (docs/quantised.md), unless the base was made
    for that. Nor do they suit 4 bits on an instruction set of EXACT_NIBBLES. isa: Backend.isa.
    """
    suits = all(form.activations is Activations.A8 or _suits_8_bits(form, isa) for form in formats)
    return Activations.A8 if suits and device.type == "cpu" else Activations.EXACT


def _suits_8_bits(form: WeightFormat, isa: str) -> bool:
    """Tell whether inputs in 8 bits suit a format that was made for none in particular."""
    if form.activations is not None or form.codebook is not None or form.group is None:
        return False
    return not (isa in EXACT_NIBBLES and form.bits == 4 and form.group % A8_GROUP == 0)


def activations_name(checkpoint: Checkpoint, config: ModelConfig, ops: Backend, chosen: Activations | None) -> str:
    """Say how exact the inputs of the decoder's quantised linears are ("a8", "exact", "a8 + exact"); "" for none."""
    found: set[str] = set()
    for names in linear_names(config):
        formats = [form for name in names if (form := checkpoint.tensors[name].format) is not None]
        if formats:
            found.add((chosen or default_activations(formats, ops.device, ops.isa)).value)
    return " + ".join(sorted(found))


class _Loader:
    """Load a checkpoint that has been checked, in one pass."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        ops: Backend,
        dtype: torch.dtype,
        device: torch.device,
        activations: Activations | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._ops = ops
        self._dtype = dtype
        self._device = device
        self._activations = activations

    def load(self) -> ModelWeights:
        config = self._config
        embedding = self._pack([EMBED])
        tied = config.tie_word_embeddings and _head_is_embedding(self._checkpoint)
        return ModelWeights(
            embedding=embedding,
            layers=tuple(self._layer(index) for index in range(config.num_layers)),
            norm=self._tensor(NORM),
            head=embedding if tied else self._pack([HEAD]),
            dtype=self._dtype,
        )

    def _layer(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        norms = {field: self._tensor(prefix + name) for field, name in layer_norms(self._config).items()}
        qk_norm = self._config.qk_norm
        return LayerWeights(
            attention_norm=norms["attention_norm"],
            qkv=self._linear(prefix, Site.QKV),
            q_norm=self._tensor(prefix + "self_attn.q_norm.weight") if qk_norm else None,
            k_norm=self._tensor(prefix + "self_attn.k_norm.weight") if qk_norm else None,
            o=self._linear(prefix, Site.O),
            attention_out_norm=norms.get("attention_out_norm"),
            mlp_norm=norms["mlp_norm"],
            gate_up=self._linear(prefix, Site.GATE_UP),
            down=self._linear(prefix, Site.DOWN),
            mlp_out_norm=norms.get("mlp_out_norm"),
        )

    def _linear(self, prefix: str, site: int) -> Linear:
        """Fuse the projections of `site`, and their biases."""
        parts: Sequence[Projection] = [p for p in self._config.projections() if p.site == site]
        bias = self._rows([f"{prefix}{part.name}.bias" for part in parts]) if parts[0].has_bias else None
        return Linear(self._pack([f"{prefix}{part.name}.weight" for part in parts]), bias)

    def _pack(self, names: Sequence[str]) -> PackedLinear:
        """Pack the weights `names` of one input, one behind the other."""
        tensors = self._checkpoint.tensors
        formats = [form for name in names if (form := tensors[name].format) is not None]
        if not formats:
            return self._ops.pack_linear(self._rows(names))
        parts: list[Tensor | QuantizedWeight] = []
        for form, group in groupby(names, lambda name: tensors[name].format):
            neighbours = list(group)
            parts += [self._rows(neighbours)] if form is None else self._quantised(neighbours)
        activations = self._activations or default_activations(formats, self._device, self._ops.isa)
        return self._ops.pack_parts(parts, self._dtype, activations)

    def _quantised(self, names: Sequence[str]) -> list[QuantizedWeight]:
        """Read weights of one format: as one where they can be, or else as they are."""
        weights = []
        for name in names:
            weight = self._checkpoint.read(name)
            assert isinstance(weight, QuantizedWeight), f"{name} has a format and was read as numbers"
            weights.append(weight.to(self._device))
        joined = join(weights)
        return weights if joined is None else [joined]

    def _rows(self, names: Sequence[str]) -> Tensor:
        """Read dense tensors into the rows of one, in the compute dtype."""
        shapes = [self._checkpoint.tensors[name].shape for name in names]
        rows = torch.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype=self._dtype, device=self._device)
        for name, place in zip(names, rows.split([shape[0] for shape in shapes]), strict=True):
            tensor = self._checkpoint.read(name)
            assert isinstance(tensor, Tensor), f"{name} has no format and was read as codes"
            place.copy_(tensor)
        return rows

    def _tensor(self, name: str) -> Tensor:
        return self._rows([name])


def _head_is_embedding(checkpoint: Checkpoint) -> bool:
    """Tell whether the head of a config that ties it is tied in the files too.

    A head of its own with other values wins over the config; one of another shape raises WeightsError.
    """
    if HEAD not in checkpoint.tensors:
        return True
    embedding = checkpoint.tensors[EMBED]
    check_shape(checkpoint, HEAD, embedding.shape)
    if checkpoint.tensors[HEAD].format == embedding.format and _equal(checkpoint.read(HEAD), checkpoint.read(EMBED)):
        return True
    logger.warning("config.json ties the head to the embedding, but %s differs from it: using both", HEAD)
    return False


def _equal(a: Tensor | QuantizedWeight, b: Tensor | QuantizedWeight) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return torch.equal(a.codes, b.codes) and all(
        torch.equal(one.expanded(), other.expanded())
        for one, other in ((a.scale, b.scale), (a.offset, b.offset))
        if one is not None and other is not None
    )
