"""A base's weights, checked against its config, fused and packed for the ops, one linear at a time.

Every tensor of the checkpoint is checked against the config by name and shape before the first is read. Then each is
copied out of the mapped file straight into the place it keeps, and its mapping is dropped: the most that lies in memory
beside the packed model is one linear.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraplex.kernels.ops import Backend, PackedLinear
from loraplex.kernels.records import Projection, Site, element_bytes
from loraplex.server.models.checkpoint import DenseCheckpoint, WeightsError, open_checkpoint
from loraplex.server.models.config import ModelConfig

logger = logging.getLogger(__name__)

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


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


def load_weights(
    path: str | Path, config: ModelConfig, ops: Backend, dtype: torch.dtype, device: torch.device | None = None
) -> ModelWeights:
    """Read the safetensors files in `path`, convert to `dtype`, fuse and pack. `device` defaults to the ops' own.

    Raises WeightsError naming what is missing, left over, misshapen or damaged.
    """
    checkpoint = open_checkpoint(path)
    _check(checkpoint, expected_shapes(config), optional=(HEAD,) if config.tie_word_embeddings else ())
    return _Loader(checkpoint, config, ops, dtype, device or ops.device).load()


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List the name and shape of every tensor of the checkpoint; a tied head is not among them."""
    shapes: dict[str, tuple[int, ...]] = {EMBED: (config.vocab_size, config.hidden_size), NORM: (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = shapes[EMBED]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for projection in config.projections():
            shapes[f"{prefix}{projection.name}.weight"] = (projection.out_features, projection.in_features)
            if projection.has_bias:
                shapes[f"{prefix}{projection.name}.bias"] = (projection.out_features,)
        for name in _layer_norms(config).values():
            shapes[f"{prefix}{name}"] = (config.hidden_size,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def weights_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Count the bytes that the weights of `config` take in `dtype`, before any padding of a backend's own."""
    total = 0
    for shape in expected_shapes(config).values():
        elements = 1
        for size in shape:
            elements *= size
        total += elements
    return total * element_bytes(dtype)


def packed_shapes(config: ModelConfig, own_head: bool) -> list[tuple[int, int]]:
    """List [out, in] of each packed linear in packing order. own_head: the head is not the embedding."""
    sizes: dict[Site, list[int]] = {}
    for projection in config.projections():
        out, _ = sizes.setdefault(projection.site, [0, projection.in_features])
        sizes[projection.site][0] = out + projection.out_features
    layer = [(sizes[site][0], sizes[site][1]) for site in (Site.QKV, Site.O, Site.GATE_UP, Site.DOWN)]
    table = (config.vocab_size, config.hidden_size)
    return [table, *(layer * config.num_layers), *([table] if own_head else [])]


def resident_bytes(config: ModelConfig, dtype: torch.dtype, ops: Backend, own_head: bool) -> int:
    """Bound the bytes that loaded weights take: linears as `ops` packs them, norms and biases as they are."""
    linears = {EMBED, HEAD} | {name for name in expected_shapes(config) if name.endswith("_proj.weight")}
    vectors = [shape for name, shape in expected_shapes(config).items() if name not in linears]
    small = sum(-(-shape[0] * element_bytes(dtype) // 64) * 64 + 64 for shape in vectors)  # malloc's own beside each
    return ops.packed_bytes([[(*shape, None)] for shape in packed_shapes(config, own_head)], dtype) + small


def loading_bytes(path: str | Path, config: ModelConfig, dtype: torch.dtype) -> int:
    """Bound the bytes that loading takes beside the packed weights: one linear, and what of its file is mapped.

    Raises WeightsError as load_weights does.
    """
    widest = max((tensor.element_bytes for tensor in open_checkpoint(path).tensors.values()), default=0)
    element = element_bytes(dtype) + widest
    return max(out * columns for out, columns in packed_shapes(config, own_head=False)) * element


class BaseBiases:
    """Find the base's own bias vectors, for adapters whose file replaces them."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self._projections = {projection.name: projection for projection in config.projections()}
        self._layers = weights.layers

    def get(self, layer: int, projection_name: str) -> Tensor | None:
        """Return the bias [out] of e.g. (3, "self_attn.q_proj") in the compute dtype; None where the base has none."""
        projection = self._projections[projection_name]
        weights = self._layers[layer]
        linears = {Site.QKV: weights.qkv, Site.O: weights.o, Site.GATE_UP: weights.gate_up, Site.DOWN: weights.down}
        bias = linears[projection.site].bias
        return None if bias is None else bias[projection.out_start : projection.out_start + projection.out_features]


def _layer_norms(config: ModelConfig) -> dict[str, str]:
    """Map fields of LayerWeights to names in the checkpoint. Gemma's sandwich gives an old name a new place."""
    if not config.sandwich_norm:
        return {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
    return {
        "attention_norm": "input_layernorm.weight",
        "attention_out_norm": "post_attention_layernorm.weight",
        "mlp_norm": "pre_feedforward_layernorm.weight",
        "mlp_out_norm": "post_feedforward_layernorm.weight",
    }


class _Loader:
    """Load a checkpoint that has been checked, in one pass."""

    def __init__(
        self, checkpoint: DenseCheckpoint, config: ModelConfig, ops: Backend, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._ops = ops
        self._dtype = dtype
        self._device = device

    def load(self) -> ModelWeights:
        config = self._config
        embedding = self._ops.pack_linear(self._tensor(EMBED))
        tied = config.tie_word_embeddings and _head_is_embedding(self._checkpoint)
        return ModelWeights(
            embedding=embedding,
            layers=tuple(self._layer(index) for index in range(config.num_layers)),
            norm=self._tensor(NORM),
            head=embedding if tied else self._ops.pack_linear(self._tensor(HEAD)),
            dtype=self._dtype,
        )

    def _layer(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        norms = {field: self._tensor(prefix + name) for field, name in _layer_norms(self._config).items()}
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

    def _linear(self, prefix: str, site: Site) -> Linear:
        """Fuse the projections of `site` by copying each into its rows."""
        parts: Sequence[Projection] = [p for p in self._config.projections() if p.site is site]
        out_features = sum(part.out_features for part in parts)
        weight = self._empty(out_features, parts[0].in_features)
        bias = self._empty(out_features) if parts[0].has_bias else None
        for part in parts:
            rows = slice(part.out_start, part.out_start + part.out_features)
            weight[rows].copy_(self._checkpoint.read(f"{prefix}{part.name}.weight"))
            if bias is not None:
                bias[rows].copy_(self._checkpoint.read(f"{prefix}{part.name}.bias"))
        return Linear(self._ops.pack_linear(weight), bias)

    def _tensor(self, name: str) -> Tensor:
        return self._empty(*self._checkpoint.tensors[name].shape).copy_(self._checkpoint.read(name))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)


def _check(checkpoint: DenseCheckpoint, expected: dict[str, tuple[int, ...]], optional: tuple[str, ...]) -> None:
    """Raise WeightsError unless the checkpoint's tensors are exactly `expected`, give or take `optional` ones."""
    tensors = checkpoint.tensors
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise WeightsError(f"{checkpoint.folder} lacks {_some(missing)} that its config.json asks for")
    extra = [name for name in tensors if name not in expected and name not in optional]
    if extra:
        raise WeightsError(f"{checkpoint.folder} holds {_some(extra)} that its config.json has no place for")
    for name, shape in expected.items():
        _check_shape(checkpoint, name, shape)


def _check_shape(checkpoint: DenseCheckpoint, name: str, shape: tuple[int, ...]) -> None:
    tensor = checkpoint.tensors[name]
    if tensor.shape != shape:
        raise WeightsError(
            f"tensor {name} of {tensor.file} has shape {list(tensor.shape)}, expected {list(shape)} by its config.json"
        )


def _head_is_embedding(checkpoint: DenseCheckpoint) -> bool:
    """Tell whether the head of a config that ties it is tied in the files too.

    A head of its own with other values wins over the config; one of another shape raises WeightsError.
    """
    if HEAD not in checkpoint.tensors:
        return True
    _check_shape(checkpoint, HEAD, checkpoint.tensors[EMBED].shape)
    if torch.equal(checkpoint.read(HEAD), checkpoint.read(EMBED)):
        return True
    logger.warning("config.json ties the head to the embedding, but %s differs from it: using both", HEAD)
    return False


def _some(names: Sequence[str]) -> str:
    """Write a list of tensor names for one line."""
    shown = ", ".join(names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {shown}{more}"
