"""A checkpoint's tensors, checked and packed for the ops, one linear at a time.

Every tensor of the checkpoint is checked against the config by name and shape before the first is read. Then each is
copied out of the mapped file straight into the place it keeps, and its mapping is dropped: the most that lies in memory
beside the packed model is one linear.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraplex.kernels.ops import Backend, PackedLinear
from loraplex.kernels.records import Projection, Site, element_bytes
from loraplex.server.models.config import ModelConfig

logger = logging.getLogger(__name__)

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

IGNORED = ("rotary_emb.inv_freq",)
"""Ends of names that old checkpoints carry and nobody needs: buffers that are computed."""

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
"""safetensors' names of the types a weight may have in the file: bytes of an element."""


class WeightsError(Exception):
    """The checkpoint's weights are missing, damaged, or not those its config promises."""


@dataclass(frozen=True)
class Linear:
    """The fused base linear of one site: its packed weight and its bias."""

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
    checkpoint = _Checkpoint(Path(path))
    checkpoint.check(expected_shapes(config), optional=(HEAD,) if config.tie_word_embeddings else ())
    return _Loader(checkpoint, config, ops, dtype, device or ops.device).load()


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint; a tied head is not among them."""
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
    """Bytes the weights of `config` take in `dtype`, before any padding of a backend's own."""
    total = 0
    for shape in expected_shapes(config).values():
        elements = 1
        for size in shape:
            elements *= size
        total += elements
    return total * element_bytes(dtype)


def packed_shapes(config: ModelConfig, own_head: bool) -> list[tuple[int, int]]:
    """[out, in] of what is packed, in the order it is packed in. own_head: the head is not the embedding."""
    sizes: dict[Site, list[int]] = {}
    for projection in config.projections():
        out, _ = sizes.setdefault(projection.site, [0, projection.in_features])
        sizes[projection.site][0] = out + projection.out_features
    layer = [(sizes[site][0], sizes[site][1]) for site in (Site.QKV, Site.O, Site.GATE_UP, Site.DOWN)]
    table = (config.vocab_size, config.hidden_size)
    return [table, *(layer * config.num_layers), *([table] if own_head else [])]


def resident_bytes(config: ModelConfig, dtype: torch.dtype, ops: Backend, own_head: bool) -> int:
    """Most bytes that loaded weights take: linears as `ops` packs them, norms and biases as they are."""
    linears = {EMBED, HEAD} | {name for name in expected_shapes(config) if name.endswith("_proj.weight")}
    vectors = [shape for name, shape in expected_shapes(config).items() if name not in linears]
    small = sum(-(-shape[0] * element_bytes(dtype) // 64) * 64 + 64 for shape in vectors)  # malloc's own beside each
    return ops.packed_bytes(packed_shapes(config, own_head), dtype) + small


def loading_bytes(path: str | Path, config: ModelConfig, dtype: torch.dtype) -> int:
    """Most bytes that loading takes beside the packed weights: one linear, and what of its file is mapped.

    Raises WeightsError as load_weights does.
    """
    element = element_bytes(dtype) + _Checkpoint(Path(path)).widest
    return max(out * columns for out, columns in packed_shapes(config, own_head=False)) * element


class BaseBiases:
    """The base's own bias vectors, for adapters whose file replaces them."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self._projections = {projection.name: projection for projection in config.projections()}
        self._layers = weights.layers

    def get(self, layer: int, projection_name: str) -> Tensor | None:
        """The bias [out] of e.g. (3, "self_attn.q_proj") in the compute dtype; None where the base has none there."""
        projection = self._projections[projection_name]
        weights = self._layers[layer]
        linears = {Site.QKV: weights.qkv, Site.O: weights.o, Site.GATE_UP: weights.gate_up, Site.DOWN: weights.down}
        bias = linears[projection.site].bias
        return None if bias is None else bias[projection.out_start : projection.out_start + projection.out_features]


def _layer_norms(config: ModelConfig) -> dict[str, str]:
    """Field of LayerWeights: name in the checkpoint. Gemma's sandwich gives an old name a new place."""
    if not config.sandwich_norm:
        return {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
    return {
        "attention_norm": "input_layernorm.weight",
        "attention_out_norm": "post_attention_layernorm.weight",
        "mlp_norm": "pre_feedforward_layernorm.weight",
        "mlp_out_norm": "post_feedforward_layernorm.weight",
    }


class _Loader:
    """One pass over a checkpoint that has been checked."""

    def __init__(
        self, checkpoint: _Checkpoint, config: ModelConfig, ops: Backend, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._ops = ops
        self._dtype = dtype
        self._device = device

    def load(self) -> ModelWeights:
        config = self._config
        embedding = self._ops.pack_linear(self._tensor(EMBED))
        tied = config.tie_word_embeddings and self._checkpoint.head_is_embedding()
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
            self._checkpoint.read_into(f"{prefix}{part.name}.weight", weight[rows])
            if bias is not None:
                self._checkpoint.read_into(f"{prefix}{part.name}.bias", bias[rows])
        return Linear(self._ops.pack_linear(weight), bias)

    def _tensor(self, name: str) -> Tensor:
        out = self._empty(*self._checkpoint.shape(name))
        self._checkpoint.read_into(name, out)
        return out

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)


class _Checkpoint:
    """The safetensors files of one folder: an index of names, and reads of one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}  # tensor name: the file it lies in
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.widest = 0  # bytes of an element, of the widest type there is
        for file in self._shard_files():
            self._index(file)

    def _shard_files(self) -> Iterator[Path]:
        single, index = self._folder / "model.safetensors", self._folder / "model.safetensors.index.json"
        if single.exists():
            yield single
            return
        if not index.exists():
            pickled = sorted(file.name for file in self._folder.glob("*.bin"))
            hint = f"; {pickled[0]} is a pickle, which is never loaded: convert it to safetensors" if pickled else ""
            raise WeightsError(f"{self._folder} has neither model.safetensors nor model.safetensors.index.json{hint}")
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} cannot be read: expected a JSON object with a weight_map ({error})") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise WeightsError(f"{index} names the shard {name!r}: expected a file of the same folder")
            if not (self._folder / name).exists():
                raise WeightsError(f"{index} names the shard {name}, which is missing: download it again")
            yield self._folder / name

    def _index(self, file: Path) -> None:
        """Note the tensors of one file. Opening reads its header only and compares it with the file's length."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  not a mapping
                    view = shard.get_slice(name)
                    if name in self._files:
                        raise WeightsError(f"tensor {name} is both in {self._files[name].name} and in {file.name}")
                    if view.get_dtype() not in WIDTHS and not name.endswith(IGNORED):
                        raise WeightsError(
                            f"tensor {name} of {file} is {view.get_dtype()}, expected one of {', '.join(WIDTHS)}"
                        )
                    self._files[name] = file
                    self.widest = max(self.widest, WIDTHS.get(view.get_dtype(), 0))
                    self._shapes[name] = tuple(view.get_shape())
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is damaged or cut short: {error}; download it again") from error

    def check(self, expected: dict[str, tuple[int, ...]], optional: tuple[str, ...]) -> None:
        """Raise WeightsError unless the tensors are exactly `expected`, give or take `optional` and IGNORED ones."""
        missing = [name for name in expected if name not in self._files]
        if missing:
            raise WeightsError(f"{self._folder} lacks {_some(missing)} that its config.json asks for")
        extra = [n for n in self._files if n not in expected and n not in optional and not n.endswith(IGNORED)]
        if extra:
            raise WeightsError(f"{self._folder} holds {_some(extra)} that its config.json has no place for")
        for name, shape in expected.items():
            if self._shapes[name] != shape:
                raise WeightsError(
                    f"tensor {name} of {self._files[name]} has shape {list(self._shapes[name])}, "
                    f"expected {list(shape)} by its config.json"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy one tensor into `out`, converting its dtype. The file is mapped for as long as this takes, no longer."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._files[name], framework="pt") as shard:
                out.copy_(shard.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"tensor {name} of {self._files[name]} cannot be read: {error}") from error

    def head_is_embedding(self) -> bool:
        """Whether a config's tied head is so in the files: a head of its own with other values wins over the config."""
        from safetensors import safe_open

        if HEAD not in self._files:
            return True
        if self._shapes[HEAD] != self._shapes[EMBED]:
            raise WeightsError(
                f"tensor {HEAD} of {self._files[HEAD]} has shape {list(self._shapes[HEAD])}, "
                f"expected {list(self._shapes[EMBED])} by its config.json"
            )
        with (
            safe_open(self._files[HEAD], framework="pt") as head,
            safe_open(self._files[EMBED], framework="pt") as embed,
        ):
            if torch.equal(head.get_tensor(HEAD), embed.get_tensor(EMBED)):
                return True
        logger.warning("config.json ties the head to the embedding, but %s differs from it: using both", HEAD)
        return False


def _some(names: Sequence[str]) -> str:
    """A list of tensor names fit for one line."""
    shown = ", ".join(names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {shown}{more}"
