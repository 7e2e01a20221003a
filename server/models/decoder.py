"""The base model: one decoder for all supported families. Ragged sequences in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loraplex.kernels.ops import Backend
from loraplex.kernels.records import KVLayer
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.inputs import ForwardBatch
from loraplex.server.models.layers import DecoderLayer
from loraplex.server.models.rotary import RotaryTable
from loraplex.server.models.weights import ModelWeights


class Decoder:
    """Pure but for the KV pages of the arena, which each step writes its tokens' keys and values into."""

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, ops: Backend, kv_layers: Sequence[KVLayer], arena: Tensor
    ) -> None:
        """kv_layers: one per layer, views into `arena` ([num_pages, page_bytes] uint8)."""
        if len(kv_layers) != config.num_layers:
            raise ValueError(f"{len(kv_layers)} KV layers for a model of {config.num_layers} layers")
        self.config = config
        self.weights = weights
        self.ops = ops
        self.kv_layers = tuple(kv_layers)
        self.arena = arena
        self._ropes = [RotaryTable(rope, ops.device) for rope in config.ropes]
        self._layers = [
            DecoderLayer(index, config, layer, ops, kv, arena)
            for index, (layer, kv) in enumerate(zip(weights.layers, kv_layers, strict=True))
        ]

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The final hidden states [L, H], normed, of the tokens in batch.logit_rows."""
        return self.hidden(batch, self.rotations(batch))

    def rotations(self, batch: ForwardBatch) -> list[tuple[Tensor, Tensor]]:
        """cos and sin [T, rotary_dim] fp32 of the step's tokens, per rotary kind of the config."""
        bounds = batch.attention.query_bounds
        return [rope.gather(batch.positions, bounds, batch.rope_lens) for rope in self._ropes]

    def hidden(self, batch: ForwardBatch, rotations: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """forward() with the angles given. Ops alone touch tensors here, so that a backend can record it."""
        config, ops = self.config, self.ops
        x = ops.embed(batch.input_ids, self.weights.embedding, config.embed_scale)
        residual: Tensor | None = None
        for layer in self._layers:
            cos, sin = rotations[layer.rope]
            x, residual = layer.forward(x, residual, cos, sin, batch)
        x = ops.take_rows(x, batch.logit_rows)
        if residual is not None:
            residual = ops.take_rows(residual, batch.logit_rows)
        hidden, _ = ops.rms_norm(x, self.weights.norm, config.rms_norm_eps, residual, config.norm_offset)
        return hidden

    def logits(self, hidden: Tensor, room: Tensor | None = None) -> Tensor:
        """hidden [L, H] of forward() -> [L, vocab] fp32, soft-capped where the model says so.

        room: see Backend.logits.
        """
        logits = self.ops.logits(hidden, self.weights.head, room)
        cap = self.config.final_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
