"""The base model: one decoder for all supported families. Ragged sequences in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.kernels.constants import Own
from loraplex.kernels.ops import Backend
from loraplex.kernels.records import AdapterStep, AttentionMeta, KVLayer, OwnPlaces
from loraplex.server.models.blocks import Attention, Mlp
from loraplex.server.models.config import BlockSite, ModelConfig
from loraplex.server.models.inputs import ForwardBatch, HeadRows, Rotations
from loraplex.server.models.rotary import RotaryTable
from loraplex.server.models.weights import LayerWeights, ModelWeights


class DecoderLayer:
    """norm, attention, norm, MLP; with sandwich norms also one after each of the two."""

    def __init__(self, index: int, config: ModelConfig, weights: LayerWeights, ops: Backend, kv: KVLayer) -> None:
        self._ops = ops
        self._index = index
        self._places = OwnPlaces(config.num_layers)
        self._weights = weights
        self._eps = config.rms_norm_eps
        self._offset = config.norm_offset
        self._attention = Attention(index, config, weights, ops, kv)
        self._mlp = Mlp(index, config, weights, ops)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotations: Rotations,
        meta: AttentionMeta,
        adapters: AdapterStep | None,
        norms: AdapterStep | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute x and residual [T, H] of x and residual [T, H]. The stream is their sum; the next norm adds them.

        norms: the adapters, where some have norms of their own.
        """
        weights = self._weights
        x, residual = self._norm(x, weights.attention_norm, residual, 0, norms)
        attended = self._attention(x, rotations, meta, adapters, norms)
        x = self._block(attended, residual, BlockSite.ATTENTION_OUT, adapters)
        if weights.attention_out_norm is not None:
            x, _ = self._norm(x, weights.attention_out_norm, None, 1, norms)
        x, residual = self._norm(x, weights.mlp_norm, residual, 2, norms)
        x = self._block(self._mlp(x, adapters), residual, BlockSite.MLP_OUT, adapters)
        if weights.mlp_out_norm is not None:
            x, _ = self._norm(x, weights.mlp_out_norm, None, 3, norms)
        return self._block(x, residual, BlockSite.LAYER_OUT, adapters), residual

    def _block(self, x: Tensor, residual: Tensor, block: BlockSite, adapters: AdapterStep | None) -> Tensor:
        """Add what acts at `block` to x [T, H], about to be added to residual; a step without any does nothing."""
        if adapters is None:
            return x
        return self._ops.adapter_add_(x, x, self._index, block, adapters, residual)

    def _norm(
        self, x: Tensor, weight: Tensor, residual: Tensor | None, index: int, norms: AdapterStep | None
    ) -> tuple[Tensor, Tensor]:
        """index: among the layer's norms, as of OwnPlaces.norm."""
        y, r = self._ops.rms_norm(x, weight, self._eps, residual, self._offset)
        if norms is not None:
            place = self._places.norm(self._index, index)
            y = self._ops.adapter_norm_(y, r, self._eps, self._offset, place, norms)
        return y, r


class Decoder:
    """The forward pass of the base, pure but for the KV pages, which each step writes its keys and values into."""

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, ops: Backend, kv_layers: Sequence[KVLayer], arena: Tensor
    ) -> None:
        """kv_layers: one per layer, views into `arena` ([num_pages, page_bytes] uint8).

        Raises ValueError where kv_layers are not one per layer.
        """
        if len(kv_layers) != config.num_layers:
            raise ValueError(f"{len(kv_layers)} KV layers for a model of {config.num_layers} layers")
        self.config = config
        self.weights = weights
        self.ops = ops
        self.kv_layers = tuple(kv_layers)
        self.arena = arena
        self._places = OwnPlaces(config.num_layers)
        self._no_rows = torch.empty(0, config.hidden_size, dtype=weights.dtype, device=arena.device)
        self._ropes = [RotaryTable(rope, ops.device) for rope in config.ropes]
        self._layers = [
            DecoderLayer(index, config, layer, ops, kv)
            for index, (layer, kv) in enumerate(zip(weights.layers, kv_layers, strict=True))
        ]

    @property
    def num_kv_groups(self) -> int:
        """Count the KV groups; AttentionMeta.groups has one entry for each."""
        return 1 + max(layer.group for layer in self.kv_layers)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Compute the final hidden states [L, H], normed, of the tokens in batch.logit_rows."""
        return self.hidden(batch, self.rotations(batch))

    def rotations(self, batch: ForwardBatch) -> Rotations:
        """Look up the rotary angles of the step's tokens, per rotary kind of the config."""
        bounds = batch.attention.query_bounds
        return [rope.gather(batch.positions, bounds, batch.rope_lens) for rope in self._ropes]

    def adapters(self, batch: ForwardBatch) -> AdapterStep | None:
        """Join the step's adapters and the arena they lie in; None: no row uses one."""
        return None if batch.adapters is None else AdapterStep(self.arena, batch.tiles, batch.adapters)

    def hidden(self, batch: ForwardBatch, rotations: Rotations) -> Tensor:
        """Compute forward() with the angles given. Ops alone touch tensors here, so that a backend can record them."""
        config, ops, places = self.config, self.ops, self._places
        adapters, own = self.adapters(batch), batch.own
        tokens = adapters if adapters is not None and adapters.own & Own.EMBED else None
        norms = adapters if adapters is not None and adapters.own & Own.NORM else None
        if own is None and tokens is not None:
            own = self._no_rows  # tokens that an adapter has added are beyond the table
        x = ops.embed(batch.input_ids, self.weights.embedding, config.embed_scale, own)
        if tokens is not None:
            x = ops.adapter_embed_(x, batch.input_ids, places.embed, tokens)
        residual: Tensor | None = None
        for layer in self._layers:
            x, residual = layer.forward(x, residual, rotations, batch.attention, adapters, norms)
        x = ops.take_rows(x, batch.logit_rows)
        if residual is not None:
            residual = ops.take_rows(residual, batch.logit_rows)
        hidden, r = ops.rms_norm(x, self.weights.norm, config.rms_norm_eps, residual, config.norm_offset)
        if norms is not None:
            eps, offset = config.rms_norm_eps, config.norm_offset
            hidden = ops.adapter_norm_(hidden, r, eps, offset, places.last_norm, norms, batch.logit_rows)
        return hidden

    def store(self, rows: Tensor, places: Sequence[Tensor]) -> None:
        """Write keys and values that were not computed, as they are, into pages.

        rows [n, layers * 2 * kv_heads * head_dim]: of n tokens, keys before values in each layer; places: per KV group
        [up to n] int64 page * block_size + offset, of the last ones of the tokens.
        """
        config, kv = self.config, rows.view(rows.shape[0], self.config.num_layers, -1)
        for index, layer in enumerate(self.kv_layers):
            place = places[layer.group]
            count = place.shape[0]
            if count:
                params = config.attention_params(index)
                qkv = rows.new_zeros(count, (params.num_heads + 2 * params.num_kv_heads) * params.head_dim)
                qkv[:, params.num_heads * params.head_dim :] = kv[-count:, index]
                width = config.ropes[config.rope_of_layer[index]].rotary_dim
                unturned = torch.ones(count, width, device=rows.device), torch.zeros(count, width, device=rows.device)
                self.ops.rope_store_kv(qkv, *unturned, layer, place, params, None)

    def logits(self, hidden: Tensor, room: Tensor | None = None, own: HeadRows | None = None) -> Tensor:
        """Compute the logits [L, vocab] fp32, soft-capped where the base does so, of forward()'s hidden [L, H].

        room: see Backend.logits. own: of rows whose adapters act on the head; it adds columns for tokens beyond the
        base's vocabulary, which are -inf for all who have none.
        """
        logits = self.ops.logits(hidden, self.weights.head, room)
        if own is not None:
            if own.added:
                wide = logits.new_full((logits.shape[0], logits.shape[1] + own.added), -torch.inf)
                wide[:, : logits.shape[1]] = logits
                logits = wide
            self.ops.adapter_head_(logits, hidden, self._places.head, AdapterStep(self.arena, own.tiles, own.segments))
        cap = self.config.final_softcap
        if cap is None:
            return logits
        absent = None if own is None or not own.added else logits == -torch.inf
        logits.div_(cap).tanh_().mul_(cap)
        return logits if absent is None else logits.masked_fill_(absent, -torch.inf)
