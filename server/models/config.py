"""Describe a base model by about two dozen numbers and switches, read from a checkpoint's config.json.

transformers normalises old and new config.json styles; the families differ only in the fields of ModelConfig, never in
code paths of their own. A base that cannot be served is refused here with one error, before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from loraplex.kernels.records import AttentionParams, OwnInput, OwnPlaces, Projection
from loraplex.server.models.normalise import normalise
from loraplex.server.models.rotary import RopeConfig

SUPPORTED = {  # architecture: model_type of its config.json
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
}

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' name: the ops' name."""


class Site(IntEnum):
    """A fused linear of a layer, where adapters act."""

    QKV = 0
    O = 1  # noqa: E741  the projection's name in every checkpoint
    GATE_UP = 2
    DOWN = 3


class BlockSite(IntEnum):
    """A place of a layer's stream where bottlenecks act, in front of a residual add."""

    ATTENTION_OUT = 4  # what o_proj gives, before any norm; the numbers go on where those of Site end
    MLP_OUT = 5  # what down_proj gives, before any norm
    LAYER_OUT = 6  # what the layer is about to add last: with the residual the layer's output, which ReFT edits


class UnsupportedModel(Exception):
    """Say that a folder is no base that can be served: what was found and what is supported."""


@dataclass(frozen=True)
class ModelConfig:
    """Hold the parameters of the decoder."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # tokens the model was made for
    rms_norm_eps: float
    tie_word_embeddings: bool
    activation: str  # "silu" | "gelu_tanh"
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # an RMS norm over each query and key head (Qwen3, Gemma 3)
    norm_offset: float  # 1.0: norms multiply by 1 + weight (Gemma)
    sandwich_norm: bool  # also a norm after attention and after the MLP (Gemma)
    embed_scale: float | None
    attn_scale: float
    attn_softcap: float | None
    final_softcap: float | None
    windows: tuple[int | None, ...]  # per layer; None: attends to all of the past
    ropes: tuple[RopeConfig, ...]
    rope_of_layer: tuple[int, ...]  # index into ropes
    fused_checkpoint: bool  # one qkv_proj and one gate_up_proj in the checkpoint (Phi-3)

    @classmethod
    def from_hf(cls, path: str | Path) -> ModelConfig:
        """Read `path`/config.json. Raises UnsupportedModel, also for a missing or damaged file."""
        raw = _read_json(Path(path) / "config.json")
        architecture = _supported_architecture(raw)
        try:
            config = SimpleNamespace(**normalise(raw, SUPPORTED[architecture]))
            result = _from_transformers(cls, architecture, config)
        except UnsupportedModel:
            raise
        except (
            Exception
        ) as error:  # transformers raises many types here; all of them mean a config.json nobody can serve
            reason = " ".join(str(error).split())
            raise UnsupportedModel(f"{path}/config.json does not describe a {architecture}: {reason}") from error
        return result

    @property
    def rope_switch(self) -> int | None:
        """Return the known tokens past which a sequence must be computed anew (longrope); None: never."""
        return min((rope.switch for rope in self.ropes if rope.switch is not None), default=None)

    def attention_params(self, layer: int) -> AttentionParams:
        return AttentionParams(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.attn_scale,
            window=self.windows[layer],
            softcap=self.attn_softcap,
        )

    @property
    def num_sites(self) -> int:
        """Count the sites of a layer, blocks and all."""
        return len(Site) + len(BlockSite)

    def blocks(self) -> tuple[Projection, ...]:
        """List the blocks as adapters name them; each is as wide as the hidden state."""
        hidden = self.hidden_size
        return tuple(Projection(block.name.lower(), block, hidden, 0, hidden, has_bias=False) for block in BlockSite)

    def projections(self) -> tuple[Projection, ...]:
        """List the linears of a layer as the checkpoint names them, by site and then by place in the site's output."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        qkv: tuple[Projection, ...]
        gate_up: tuple[Projection, ...]
        if self.fused_checkpoint:
            qkv = (Projection("self_attn.qkv_proj", Site.QKV, hidden, 0, q + 2 * kv, self.qkv_bias),)
            gate_up = (Projection("mlp.gate_up_proj", Site.GATE_UP, hidden, 0, 2 * inner, self.mlp_bias),)
        else:
            qkv = (
                Projection("self_attn.q_proj", Site.QKV, hidden, 0, q, self.qkv_bias),
                Projection("self_attn.k_proj", Site.QKV, hidden, q, kv, self.qkv_bias),
                Projection("self_attn.v_proj", Site.QKV, hidden, q + kv, kv, self.qkv_bias),
            )
            gate_up = (
                Projection("mlp.gate_proj", Site.GATE_UP, hidden, 0, inner, self.mlp_bias),
                Projection("mlp.up_proj", Site.GATE_UP, hidden, inner, inner, self.mlp_bias),
            )
        o = Projection("self_attn.o_proj", Site.O, q, 0, hidden, self.o_bias, reads_hidden=False)
        down = Projection(
            *("mlp.down_proj", Site.DOWN, inner, 0, hidden, self.mlp_bias), reads_hidden=False, gated_by=Site.GATE_UP
        )
        return (*qkv, o, *gate_up, down)

    def inputs(self, layer: int, site: int) -> tuple[OwnInput, ...]:
        """List the outputs of `site` of a layer by the projections whose input an adapter may turn."""
        places = OwnPlaces(self.num_layers)
        return tuple(
            OwnInput(places.input(layer, index), each.out_start, each.out_start + each.out_features)
            for index, each in enumerate(self.projections())
            if each.site == site
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedModel(f"{path} is missing: expected a model folder in the Hugging Face format") from None
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _supported_architecture(raw: dict[str, Any]) -> str:
    """Read the architecture from the raw file, so that one that transformers has never heard of is named as well."""
    named = raw.get("architectures")
    if isinstance(named, list) and len(named) == 1:
        found = str(named[0])
    elif not named:  # some exports leave it out; the model type says the same
        found = next((a for a, t in SUPPORTED.items() if t == raw.get("model_type")), repr(raw.get("model_type")))
    else:
        found = str(named)
    if found not in SUPPORTED:
        hint = ""
        if found == "Gemma3ForConditionalGeneration":
            hint = " (this checkpoint also takes images; the text-only Gemma 3 checkpoints are Gemma3ForCausalLM)"
        raise UnsupportedModel(f"architecture {found} is not supported{hint}; supported: {', '.join(SUPPORTED)}")
    return found


def _from_transformers(make: Callable[..., ModelConfig], architecture: str, config: Any) -> ModelConfig:
    family = SUPPORTED[architecture]
    gemma = family in ("gemma2", "gemma3_text")
    activation = config.hidden_activation if gemma else config.hidden_act
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModel("use_bidirectional_attention is set: an encoder cannot generate text")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise UnsupportedModel(f"{heads} query heads do not divide evenly over {kv_heads} key-value heads")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention_bias = bool(getattr(config, "attention_bias", False)) and family not in ("mistral", "qwen2", "phi3")
    ropes, rope_of_layer = _ropes(config, family, head_dim)
    return make(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        activation=ACTIVATIONS[activation],
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and bool(config.mlp_bias),
        qk_norm=family in ("qwen3", "gemma3_text"),
        norm_offset=1.0 if gemma else 0.0,
        sandwich_norm=gemma,
        embed_scale=config.hidden_size**0.5 if gemma else None,
        attn_scale=(config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
        attn_softcap=config.attn_logit_softcapping if family == "gemma2" else None,  # Gemma 3's field has no effect
        final_softcap=config.final_logit_softcapping if gemma else None,
        windows=_windows(config, family),
        ropes=ropes,
        rope_of_layer=rope_of_layer,
        fused_checkpoint=family == "phi3",
    )


def _windows(config: Any, family: str) -> tuple[int | None, ...]:
    """List the sliding window of each layer. Llama's config may carry the fields of one; Llama's model has none."""
    window = None if family == "llama" else config.sliding_window
    if family in ("mistral", "phi3", "llama"):
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in _layer_types(config))


def _layer_types(config: Any) -> list[str]:
    types = list(config.layer_types)
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != config.num_hidden_layers:
        raise UnsupportedModel(
            f"layer_types names {len(types)} layers of kinds {sorted(set(types))}; expected one of full_attention or "
            f"sliding_attention for each of {config.num_hidden_layers} layers"
        )
    return types


def _ropes(config: Any, family: str, head_dim: int) -> tuple[tuple[RopeConfig, ...], tuple[int, ...]]:
    """List the distinct rotations and which of them each layer uses: one for all layers, for Gemma 3 one per kind."""
    num_layers, parameters = config.num_hidden_layers, config.rope_parameters
    if family == "gemma3_text":
        kinds = _layer_types(config)
        names = sorted(set(kinds))
        of_layer = tuple(names.index(kind) for kind in kinds)
        per_name = [parameters[name] for name in names]
    else:
        of_layer, per_name = (0,) * num_layers, [parameters]
    for each in per_name:
        if not each:
            raise UnsupportedModel("rope_parameters are missing: every layer needs rotary positions")
        partial = each.get("partial_rotary_factor", 1.0)
        if partial != 1.0 and family != "phi3":
            raise UnsupportedModel(f"partial_rotary_factor {partial} is supported for Phi3ForCausalLM only")
    return tuple(RopeConfig.from_hf(each, head_dim, config.max_position_embeddings) for each in per_name), of_layer
