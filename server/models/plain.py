"""The base in plain fp32, its weights read from the checkpoint piece by piece: what fused answers are compared with.

It shares the decoder's arrangement and the reference's formulas with what serves, and neither its kernels, its packed
weights, its tiles nor its rounding. A piece of a weight is in memory at a time, and others run in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from loraplex.kernels.constants import BLOCK_SIZE, Own, TableSite
from loraplex.kernels.ops import PackedLinear
from loraplex.kernels.quantized import QuantizedWeight, dequantize
from loraplex.kernels.records import AdapterSegments, AdapterStep, KVLayer, OwnPlaces, OwnTable, TileTable
from loraplex.kernels.reference import ReferenceBackend
from loraplex.server.models.checkpoint import Checkpoint
from loraplex.server.models.config import ModelConfig, Site
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.inputs import ForwardBatch, HeadRows, no_tiles
from loraplex.server.models.weight_sizes import EMBED, HEAD, NORM, layer_norms
from loraplex.server.models.weights import LayerWeights, Linear, ModelWeights

MAX_TOKENS = BLOCK_SIZE
"""Of a sequence: one block of keys and values."""

PIECE = 1 << 18
"""Elements of a weight that are widened at a time: 1 MiB, and with a dozen tokens half a millisecond."""


class Change(Protocol):
    """What an adapter does to the base's linears, called in the order of the layers."""

    def turned(self, layer: int, site: int, x: Tensor) -> Sequence[tuple[slice, Tensor]]:
        """Return outputs of the site that the base computes of another input than x [n, in], and that input."""
        ...

    def __call__(self, layer: int, site: int, y: Tensor, x: Tensor, residual: Tensor | None = None) -> None:
        """Make y [n, out], a base linear's output before its bias, the adapted one's, for the input x [n, in].

        At a block x is what y was, [n, H], and residual what y will be added to, [n, H]; elsewhere there is none.
        """
        ...

    @property
    def tokens(self) -> int:
        """Return where the ids of tokens end that have rows below; 0: there are none."""
        ...

    def rows(self, place: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Return (numbers [k], rows [k, n]) in place of the base's at `place` (OwnPlaces); a norm is one row."""
        ...

    def factors(self, site: int) -> Sequence[tuple[Tensor, Tensor, float]]:
        """Return (A [r, H], B [V, r], s): s B A is added to the table at `site` (TableSite), in stream scale."""
        ...


Adapted = Sequence[tuple[slice, int]]
"""Rows of a pass that an adapter acts on, and what to add to a site for what acts there: 0 but for second units."""


@dataclass(frozen=True)
class _Streamed:
    """A linear that stays in its file."""

    names: tuple[str, ...]  # of the weights in the checkpoint, whose outputs lie one behind the other
    in_features: int
    out_features: int
    place: tuple[int, int] | None = None  # layer and site; None: the table or the head


class _PlainOps(ReferenceBackend):
    """The reference's ops on linears that are read as they are used."""

    def __init__(self, checkpoint: Checkpoint, throttle: Callable[[], None], change: Change, adapted: Adapted) -> None:
        """adapted: the rows that `change` is for, and what is added to its sites there."""
        super().__init__(torch.device("cpu"))
        self._checkpoint = checkpoint
        self._throttle = throttle
        self._change = change
        self._adapted = adapted
        self._embed_scale = 1.0

    def embed(self, ids: Tensor, table: PackedLinear, scale: float | None, own: Tensor | None = None) -> Tensor:
        streamed = _streamed(table)
        weight = self._checkpoint.read(streamed.names[0])
        nothing = torch.zeros(1, streamed.in_features)  # of a token that an adapter has added
        rows = [_rows(weight, slice(i, i + 1)) if i < streamed.out_features else nothing for i in ids.tolist()]
        self._embed_scale = 1.0 if scale is None else scale
        return torch.cat(rows) * self._embed_scale

    def adapter_embed_(self, y: Tensor, ids: Tensor, place: int, adapters: AdapterStep) -> Tensor:
        for worn, _ in self._adapted:
            mine, tokens = y[worn], ids[worn]
            for numbers, rows in self._change.rows(place):
                at, which = (tokens[:, None] == numbers).nonzero(as_tuple=True)
                mine[at] = rows[which].float() * self._embed_scale
            for a, b, scaling in self._change.factors(TableSite.EMBED):
                known = tokens < len(b)
                mine[known] += scaling * (b[tokens[known]].float() @ a.float())
        return y

    def adapter_norm_(
        self,
        y: Tensor,
        r: Tensor,
        eps: float,
        offset: float,
        place: int,
        adapters: AdapterStep,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Norm again what wears another weight; `rows` are all there are."""
        for _, weight in self._change.rows(place):
            for worn, _ in self._adapted:
                y[worn] = self.rms_norm(r[worn], weight[0].float(), eps, None, offset)[0]
        return y

    def adapter_head_(self, logits: Tensor, x: Tensor, place: int, adapters: AdapterStep) -> Tensor:
        for worn, _ in self._adapted:
            for numbers, rows in self._change.rows(place):
                for some in self._some(rows):
                    logits[worn, numbers[some]] = F.linear(x[worn], rows[some].float())
            for a, b, scaling in self._change.factors(TableSite.HEAD):
                u = scaling * F.linear(x[worn], a.float())
                for some in self._some(b):
                    logits[worn, some] += F.linear(u, b[some].float())
        return logits

    def _some(self, rows: Tensor) -> Iterator[slice]:
        """Give ranges of `rows` with PIECE elements at most."""
        step = max(1, PIECE // rows.shape[1])
        for start in range(0, len(rows), step):
            self._throttle()
            yield slice(start, min(start + step, len(rows)))

    def linear(self, x: Tensor, weight: PackedLinear) -> Tensor:
        streamed = _streamed(weight)
        layer, site = streamed.place or (-1, -1)
        turned = [
            (rows, outputs, other)
            for rows, more in (self._adapted if streamed.place is not None else ())
            for outputs, other in self._change.turned(layer, site + more, x[rows])
        ]
        inputs = torch.cat([x, *(other for _, _, other in turned)])
        y, *others = torch.cat([F.linear(inputs, piece) for piece in self._pieces(streamed)], dim=1).split(
            [len(x), *(len(other) for _, _, other in turned)]
        )
        for (rows, outputs, _), other in zip(turned, others, strict=True):
            y[rows, outputs] = other[:, outputs]
        if streamed.place is not None:
            for rows, more in self._adapted:
                self._change(layer, site + more, y[rows], x[rows], None)
        return y

    def adapter_add_(
        self, y: Tensor, x: Tensor, layer: int, site: int, adapters: AdapterStep, residual: Tensor | None = None
    ) -> Tensor:
        """Change what is at a block: at linears that is done already."""
        if residual is not None:
            for rows, more in self._adapted:
                self._change(layer, site + more, y[rows], x[rows].clone(), residual[rows])
        return y

    def logits(self, x: Tensor, weight: PackedLinear, room: Tensor | None = None) -> Tensor:
        return self.linear(x, weight)

    def _pieces(self, linear: _Streamed) -> Iterator[Tensor]:
        """Give the weight's rows in fp32, PIECE elements at a time."""
        step = max(1, PIECE // linear.in_features)
        for name in linear.names:
            weight = self._checkpoint.read(name)
            count = weight.out_features if isinstance(weight, QuantizedWeight) else len(weight)
            for start in range(0, count, step):
                self._throttle()
                yield _rows(weight, slice(start, start + step))


class PlainModel:
    """Log-probabilities of tokens, of the base and of what an adapter makes of it, in one pass."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self._config = config
        self._checkpoint = checkpoint

    def logprobs(
        self,
        base: Sequence[int],
        adapted: Sequence[int],
        change: Change,
        throttle: Callable[[], None],
        acts: Sequence[tuple[int, int, int]] = ((0, MAX_TOKENS, 0),),
    ) -> tuple[Tensor, Tensor]:
        """Compute those of all tokens but the first, [n - 1] fp32 each, of the base's and of the adapter's sequence.

        base, adapted: token ids, as many of each and MAX_TOKENS at most. change: called for each layer and site once,
        in the order of the layers, and for each of `acts`: (first, end, unit), positions that it acts on. Sites of its
        second unit (1) are greater by ModelConfig.num_sites.

        Raises ValueError for other counts, and WeightsError where the base's files are gone or others.
        """
        count = len(base)
        if len(adapted) != count or not 2 <= count <= MAX_TOKENS:
            raise ValueError(f"{count} and {len(adapted)} tokens; expected as many of each, from 2 to {MAX_TOKENS}")
        config = self._config
        wears: Adapted = [
            (slice(count + first, count + min(end, count)), unit * config.num_sites) for first, end, unit in acts
        ]
        ops = _PlainOps(self._checkpoint, throttle, change, wears)
        heads, dim = config.num_kv_heads, config.head_dim
        kv = KVLayer(torch.zeros(2, heads, BLOCK_SIZE, dim), torch.zeros(2, heads, BLOCK_SIZE, dim), 0)
        layers = (kv,) * config.num_layers  # each is done with it before the next writes
        decoder = Decoder(config, self._weights(throttle), ops, layers, torch.zeros(2, 0, dtype=torch.uint8))
        ids = torch.tensor([*base, *adapted])
        segments, tiles = _worn_somewhere(config)
        batch = ForwardBatch.blank(tiles, 1, sequences=2, tokens=count, adapters=segments)
        batch = replace(batch, input_ids=ids, logit_rows=torch.arange(2 * count))
        with torch.inference_mode():
            head = HeadRows(segments, max(0, change.tokens - config.vocab_size), tiles)
            scores = decoder.logits(decoder.forward(batch), own=head).log_softmax(-1)
        base_scores, adapted_scores = scores.split(count)
        return _of(base_scores, ids[:count]), _of(adapted_scores, ids[count:])

    def _weights(self, throttle: Callable[[], None]) -> ModelWeights:
        config = self._config
        table = _Streamed((EMBED,), config.hidden_size, config.vocab_size)
        has_head = HEAD in self._checkpoint.tensors
        return ModelWeights(
            embedding=table,
            layers=tuple(self._layer(index, throttle) for index in range(config.num_layers)),
            norm=self._vector(NORM),
            head=replace(table, names=(HEAD,)) if has_head else table,
            dtype=torch.float32,
        )

    def _layer(self, index: int, throttle: Callable[[], None]) -> LayerWeights:
        throttle()
        prefix = f"model.layers.{index}."
        norms = {field: self._vector(prefix + name) for field, name in layer_norms(self._config).items()}
        qk_norm = self._config.qk_norm
        return LayerWeights(
            attention_norm=norms["attention_norm"],
            qkv=self._linear(index, Site.QKV),
            q_norm=self._vector(prefix + "self_attn.q_norm.weight") if qk_norm else None,
            k_norm=self._vector(prefix + "self_attn.k_norm.weight") if qk_norm else None,
            o=self._linear(index, Site.O),
            attention_out_norm=norms.get("attention_out_norm"),
            mlp_norm=norms["mlp_norm"],
            gate_up=self._linear(index, Site.GATE_UP),
            down=self._linear(index, Site.DOWN),
            mlp_out_norm=norms.get("mlp_out_norm"),
        )

    def _linear(self, layer: int, site: Site) -> Linear:
        parts = [projection for projection in self._config.projections() if projection.site == site]
        names = tuple(f"model.layers.{layer}.{part.name}" for part in parts)
        bias = torch.cat([self._vector(f"{name}.bias") for name in names]) if parts[0].has_bias else None
        width = sum(part.out_features for part in parts)
        weights = tuple(f"{name}.weight" for name in names)
        return Linear(_Streamed(weights, parts[0].in_features, width, (layer, int(site))), bias)

    def _vector(self, name: str) -> Tensor:
        vector = self._checkpoint.read(name)
        assert isinstance(vector, Tensor), f"{name} is a vector, which no format quantises"
        return vector.float()


def _worn_somewhere(config: ModelConfig) -> tuple[AdapterSegments, TileTable]:
    """Make segments and tiles which say that something acts everywhere, so that the decoder asks at each place."""
    none, ranges = torch.zeros(1, dtype=torch.int32), torch.zeros(1, OwnPlaces(config.num_layers).count, 2)
    segments = AdapterSegments(none, none, none, torch.zeros(1), (0, 0), (((0, 1.0),),), 0)
    own = OwnTable(ranges, ranges, {0: Own.NORM | Own.EMBED | Own.HEAD})
    return segments, replace(no_tiles(config), own=own)


def _streamed(linear: PackedLinear) -> _Streamed:
    assert isinstance(linear, _Streamed), "made by PlainModel"
    return linear


def _rows(weight: Tensor | QuantizedWeight, outputs: slice) -> Tensor:
    """Some rows of a weight in fp32."""
    return dequantize(weight.rows(outputs)) if isinstance(weight, QuantizedWeight) else weight[outputs].float()


def _of(scores: Tensor, ids: Tensor) -> Tensor:
    """Pick the log-probability of each token but the first: scores [n, vocab], ids [n] -> [n - 1]."""
    return scores[:-1].gather(1, ids[1:, None]).squeeze(1)
