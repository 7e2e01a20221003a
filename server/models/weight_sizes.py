"""What a base's weights are and take, before any is read: names, shapes and formats against the config, and bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loraplex.kernels.ops import Backend
from loraplex.kernels.quantized import PartShape
from loraplex.kernels.records import element_bytes
from loraplex.server.models.checkpoint import Checkpoint, WeightsError
from loraplex.server.models.config import ModelConfig, Site

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

JOINING_BYTES = 3
"""Of an element of quantised neighbours that are laid one behind the other: its code twice, and as much as a code for
its scales and offsets (two numbers of 4 bytes for 16 inputs are half of one)."""


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
        for name in layer_norms(config).values():
            shapes[f"{prefix}{name}"] = (config.hidden_size,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def layer_norms(config: ModelConfig) -> dict[str, str]:
    """Map fields of LayerWeights to names in the checkpoint. Gemma's sandwich gives an old name a new place."""
    if not config.sandwich_norm:
        return {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
    return {
        "attention_norm": "input_layernorm.weight",
        "attention_out_norm": "post_attention_layernorm.weight",
        "mlp_norm": "pre_feedforward_layernorm.weight",
        "mlp_out_norm": "post_feedforward_layernorm.weight",
    }


def norms_in_order(config: ModelConfig) -> tuple[str, ...]:
    """List the names of a layer's norms in the order of OwnPlaces.norm, with "" for those that the base has not."""
    names = layer_norms(config)
    fields = ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm")
    of_heads = ("self_attn.q_norm", "self_attn.k_norm") if config.qk_norm else ("", "")
    return (*(names.get(field, "").removesuffix(".weight") for field in fields), *of_heads)


def linear_names(config: ModelConfig) -> Iterator[tuple[str, ...]]:
    """List the checkpoint's names of the parts of each decoder linear, in packing order."""
    for layer in range(config.num_layers):
        for site in Site:
            parts = [projection for projection in config.projections() if projection.site == site]
            yield tuple(f"model.layers.{layer}.{part.name}.weight" for part in parts)


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise WeightsError unless the checkpoint's tensors are those of `config`.

    A tied head may be repeated, and there may be biases of zeros: AutoGPTQ wrote one for every linear.
    """
    tensors, expected = checkpoint.tensors, expected_shapes(config)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise WeightsError(f"{checkpoint.folder} lacks {_some(missing)} that its config.json asks for")
    extra = [name for name in tensors if name not in expected and name != HEAD and not _is_no_bias(checkpoint, name)]
    if extra:
        raise WeightsError(f"{checkpoint.folder} holds {_some(extra)} that its config.json has no place for")
    for name, shape in expected.items():
        check_shape(checkpoint, name, shape)
        form = tensors[name].format
        if form is not None and len(shape) == 1:
            raise WeightsError(f"tensor {name} of {tensors[name].file} is {form.name}; expected a vector of numbers")


def _is_no_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Tell whether the tensor `name` is a bias that changes nothing."""
    stored = checkpoint.tensors[name]
    if not name.endswith("_proj.bias") or stored.format is not None or len(stored.shape) != 1:
        return False
    bias = checkpoint.read(name)
    return isinstance(bias, Tensor) and not bool(bias.any())


def check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """Raise WeightsError unless the tensor `name` has `shape`."""
    tensor = checkpoint.tensors[name]
    if tensor.shape != shape:
        raise WeightsError(
            f"tensor {name} of {tensor.file} has shape {list(tensor.shape)}, expected {list(shape)} by its config.json"
        )


def weights_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Count the bytes that the weights of `config` take in `dtype`, before any padding of a backend's own."""
    return sum(math.prod(shape) for shape in expected_shapes(config).values()) * element_bytes(dtype)


def packed_parts(checkpoint: Checkpoint, config: ModelConfig, own_head: bool) -> list[list[PartShape]]:
    """List the parts of each packed linear in packing order. own_head: the head is not the embedding.

    Dense neighbours are one part. Quantised ones are counted apart, though those of one format and order are packed as
    one: that takes less padding, if any. Raises WeightsError where the checkpoint is not that of `config`.
    """
    check_tensors(checkpoint, config)
    names = [(EMBED,), *linear_names(config), *([(HEAD,)] if own_head else [])]
    return [_parts(checkpoint, linear) for linear in names]


def resident_bytes(
    checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, ops: Backend, own_head: bool
) -> int:
    """Bound the bytes that loaded weights take: linears as `ops` packs them, norms and biases as they are.

    Raises WeightsError as packed_parts does.
    """
    vectors = [shape for shape in expected_shapes(config).values() if len(shape) == 1]
    small = sum(-(-shape[0] * element_bytes(dtype) // 64) * 64 + 64 for shape in vectors)  # malloc's own beside each
    return ops.packed_bytes(packed_parts(checkpoint, config, own_head), dtype) + small


def loading_bytes(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> int:
    """Bound the bytes that loading takes beside the packed weights: one linear, and what of its file is mapped.

    Raises WeightsError as packed_parts does.
    """
    check_tensors(checkpoint, config)
    tables = [(name,) for name in (EMBED, HEAD) if name in checkpoint.tensors]
    return max(_linear_bytes(checkpoint, names, dtype) for names in (*tables, *linear_names(config)))


def format_names(checkpoint: Checkpoint) -> str:
    """Name the formats of the quantised tensors, that of the most elements first ("Q4_1 + Q8_0"); "" for none."""
    elements: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if tensor.format is not None:
            elements[tensor.format.name] += math.prod(tensor.shape)
    return " + ".join(name for name, _ in elements.most_common())


def _linear_bytes(checkpoint: Checkpoint, names: Sequence[str], dtype: torch.dtype) -> int:
    total = 0
    for name in names:
        tensor = checkpoint.tensors[name]
        if tensor.format is None:
            element = element_bytes(dtype) + tensor.element_bytes
        else:
            element = tensor.element_bytes if len(names) == 1 else max(JOINING_BYTES, tensor.element_bytes)
        total += tensor.shape[0] * tensor.shape[1] * element
    return total


def _parts(checkpoint: Checkpoint, names: Sequence[str]) -> list[PartShape]:
    parts: list[PartShape] = []
    for name in names:
        tensor = checkpoint.tensors[name]
        out, columns = tensor.shape
        if parts and parts[-1][2] is None and tensor.format is None:
            out += parts.pop()[0]
        parts.append((out, columns, tensor.format))
    return parts


def _some(names: Sequence[str]) -> str:
    """Write a list of tensor names for one line."""
    shown = ", ".join(names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {shown}{more}"
