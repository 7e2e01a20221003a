"""The base model: one decoder for all supported families. Ragged sequences in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.kernels.backend import Backend
from loraplex.kernels.metadata import KVLayer
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
        self._weights = weights
        self._ops = ops
        self._ropes = [RotaryTable(rope, ops.device) for rope in config.ropes]
        self._layers = [
            DecoderLayer(index, config, layer, ops, kv, arena)
            for index, (layer, kv) in enumerate(zip(weights.layers, kv_layers, strict=True))
        ]

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The final hidden states [L, H], normed, of the tokens in batch.logit_rows."""
        config, ops = self.config, self._ops
        bounds = batch.attention.query_bounds
        rotations = [rope.gather(batch.positions, bounds, batch.rope_lens) for rope in self._ropes]
        x = ops.embed(batch.input_ids, self._weights.embedding, config.embed_scale)
        residual: Tensor | None = None
        for layer in self._layers:
            cos, sin = rotations[layer.rope]
            x, residual = layer.forward(x, residual, cos, sin, batch)
        rows = batch.logit_rows
        x = x.index_select(0, rows)
        if residual is not None:
            residual = residual.index_select(0, rows)
        hidden, _ = ops.rms_norm(x, self._weights.norm, config.rms_norm_eps, residual, config.norm_offset)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [L, H] of forward() -> [L, vocab] fp32, soft-capped where the model says so."""
        logits = self._ops.linear(hidden, self._weights.head).float()
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
