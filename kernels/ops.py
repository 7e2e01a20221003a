"""The ops every backend has.

A backend owns where results live: ops return tensors of its choosing, so that a step can later be recorded over fixed
buffers without touching the model. Ops ending in `_` work in place. Exact formulas: the `Semantics:` blocks here;
reference.py is those blocks as code.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loraplex.kernels.quantized import Activations, PartShape, QuantizedWeight, dequantize
from loraplex.kernels.records import AdapterStep, AttentionMeta, AttentionParams, KVLayer, OwnInput, QKNorm


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here. There is no silent fallback."""


class PackedLinear(Protocol):
    """A base weight as one backend wants it: opaque to the model. One copy in memory."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


@dataclass(frozen=True)
class DecodeSteps:
    """Up to `most` steps of L decode rows, one after the other: each computes the tokens that the one before drew.

    No step follows one that drew a token of `stops`, or whose logits are not finite, or after `halt` has become other
    than 0, which any thread may see to.
    """

    most: int
    hidden: Tensor  # [L or more, H]: where the program leaves its result
    head: PackedLinear
    logits: Tensor  # [L or more, vocab] fp32: where the last step's are left
    drawn: array[int]  # [most, L], of type "q": tokens in the order of logit_rows; -1 of logits that are not finite
    draws: Tensor | None  # [most, L, 5] float64, of sample(): temperature, top_k, top_p, min_p, uniform; None: argmax
    stops: Tensor  # [n] int64
    halt: ctypes.c_int32
    followed: ctypes.c_int32 | None  # steps that another one has followed, while others run


@dataclass(frozen=True)
class StepInputs:
    """What a recorded forward pass is run on."""

    ids: Tensor  # [T] int64
    logit_rows: Tensor  # [L] int64
    rotations: Sequence[tuple[Tensor, Tensor]]  # (cos, sin) [T, rotary_dim] fp32 per rotary kind
    attention: AttentionMeta
    adapters: AdapterStep | None  # None: no row uses one
    own: Tensor | None = None  # of Backend.embed


class Program(Protocol):
    """A recorded forward pass: run() does one step of it, whatever the step's size up to the recorded one."""

    def run(self, inputs: StepInputs) -> None: ...

    def decode(self, inputs: StepInputs, steps: DecodeSteps) -> int:
        """As run() of steps.most steps, whose rows lie one step behind the other: T = steps.most * L.

        Of inputs.ids the first L are given, and the others are filled in. Block tables, logit_rows and adapters are one
        step's. Returns how many steps were done.
        """
        ...

    def await_step(self, followed: ctypes.c_int32, seen: int) -> int:
        """Wait, without the interpreter's lock, until a decode() in another thread has set DecodeSteps.followed other
        than `seen`, or end_waits() has set it to -1. Returns it."""
        ...

    def end_waits(self, followed: ctypes.c_int32) -> None:
        """Set `followed` to -1 and wake whoever awaits a step: no more come of decode(), or it has failed."""
        ...


class Recorder(Protocol):
    """Watches the model run through its ops once."""

    @property
    def ops(self) -> Backend:
        """Ops that note themselves; their results are workspace, filled whenever the program runs."""
        ...

    def program(self) -> Program:
        """What was noted so far."""
        ...


class Backend(Protocol):
    """Pure ops on tensors. T tokens, H hidden, all floating tensors in the compute dtype unless said otherwise."""

    name: str
    device: torch.device
    isa: str = ""  # the instruction set of a CPU's kernels, by which formats are computed with other inputs

    def recorder(self, dtype: torch.dtype, cosines: Sequence[Tensor]) -> Recorder | None:
        """For recording a forward pass in `dtype`. None: this backend runs its ops one by one.

        cosines: the tensors that stand for the step's cosines while recording, one per rotary kind.
        """
        ...

    def pack_linear(self, weight: Tensor) -> PackedLinear:
        """Take over a weight [out, in]; the caller drops its own reference."""
        ...

    def pack_parts(
        self, parts: Sequence[Tensor | QuantizedWeight], dtype: torch.dtype, activations: Activations
    ) -> PackedLinear:
        """Take over weights [out, in] of one input, whose outputs lie one behind the other, some of them quantised.

        dtype: the compute dtype. A backend that keeps no codes rounds the weights to it once.
        """
        dense = [part if isinstance(part, Tensor) else dequantize(part) for part in parts]
        return self.pack_linear(torch.cat([part.to(dtype) for part in dense]))

    def beside(self) -> Backend:
        """Return the same ops for another thread than the engine's: they take one core, and weights packed by any."""
        return self

    def packed_bytes(self, linears: Iterable[Sequence[PartShape]], dtype: torch.dtype) -> int:
        """Count the most bytes that `linears` of these parts, packed in this order, take with all their padding.

        dtype: the compute dtype, in which a backend that keeps no codes has quantised parts too.
        """
        return sum(out * columns for parts in linears for out, columns, _ in parts) * dtype.itemsize

    def embed(self, ids: Tensor, table: PackedLinear, scale: float | None, own: Tensor | None = None) -> Tensor:
        """ids [T] int64, table packed from [vocab, H] (a tied head's own copy), own [E, H] -> [T, H].

        own: rows of this step alone, virtual tokens for one. Without it all ids are within the table.

        Semantics: 0 <= ids[t] < vocab: y[t] = table[ids[t]] * scale, scale rounded to the compute dtype first (Gemma)
                   ids[t] < 0: y[t] = own[-1 - ids[t]], as it is
                   ids[t] >= vocab, tokens that an adapter has added: y[t] = 0
        """
        ...

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [T, H], rows [L] int64 -> [L, H]. Semantics: y[i] = x[rows[i]]."""
        ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float
    ) -> tuple[Tensor, Tensor]:
        """x [T, H] (or [T, heads, D]), weight [H] -> (normed, residual).

        Semantics: r = x if residual is None else x + residual (rounded to the compute dtype)
                   y = r / sqrt(mean(r^2) + eps), in fp32
                   offset == 0: y = weight * round(y)          (Llama: rounded to the compute dtype before the weight)
                   offset == 1: y = round(y * (1 + weight))    (Gemma: all in fp32)
        """
        ...

    def linear(self, x: Tensor, weight: PackedLinear) -> Tensor:
        """x [T, in] -> [T, out].

        Semantics: y = x @ W.T, accumulated in fp32, rounded once. The bias is apart (add_bias_).
                   Of quantised parts W is dequantize(part) in fp32, and with Activations.A8 x is
                   round_activations(x[:, part.order], part.format.group) in fp32.
        """
        ...

    def adapter_linear(
        self, x: Tensor, weight: PackedLinear, inputs: Sequence[OwnInput], adapters: AdapterStep
    ) -> Tensor:
        """x [T, in] -> [T, out], as linear(), but that adapters turn the inputs of some outputs.

        Semantics: y = linear(x, weight). For each token t, and each of `inputs` at whose place t's mix has tiles:
                     z = 0 (fp32, [in])
                     for (slot, w) in the mix, in order; for tile in tiles(slot, place); for each row r of its matrix:
                       z[columns of r's block] += w * x[t, r] * row r
                     y[t, start : stop] = linear(round(x[t] + z), weight)[start : stop]
        """
        ...

    def logits(self, x: Tensor, weight: PackedLinear, room: Tensor | None = None) -> Tensor:
        """x [L, H] -> [L, vocab] fp32. Semantics: as linear; rounded to the compute dtype at most.

        room: at least as many rows of the same kind, in which the result may be left.
        """
        ...

    def add_bias_(self, y: Tensor, bias: Tensor) -> Tensor:
        """Semantics: y += bias, bias [out]."""
        ...

    def adapter_add_(
        self, y: Tensor, x: Tensor, layer: int, site: int, adapters: AdapterStep, residual: Tensor | None = None
    ) -> Tensor:
        """y [T, out_of_site], x [T, in] -> y. residual [T, in]: at block sites, where y may be x itself.

        Semantics: for each segment s and token t in it:
                     acc = 0 (fp32, [out])
                     for (slot, w) in mixes[s], in order; for tile in tiles(slot, layer, site), in order:
                       window = [out_start, out_start + out_len)
                       LOW_RANK: u = round(A x[t]) to the compute dtype, accumulated in fp32
                                 acc[window] += w * (u @ B)
                       BIAS:     acc[window] += w * B
                       SCALE:    acc[window] += w * (v - 1) * y[t, window]
                       DENSE:    acc[window] += w * u
                       ACTIVATION: of the next tile u = round(f(A s + c)), in fp32 but for s = x[t],
                                 round(x[t] + residual[t]) or residual[t], by its source
                     y[t] = round(y[t] + acc)
                   Tokens past the last segment are not touched.
        """
        ...

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
        """y, r [L, H] as rms_norm returns them, rows [L] int64: the tokens they are of; None: token t in row t.

        place: of OwnPlaces.

        Semantics: for each row whose token's mix is one slot with a tile at `place`: y = as rms_norm of r with the
                   tile's row, fp32, as the weight. Other rows are not touched.
        """
        ...

    def adapter_embed_(self, y: Tensor, ids: Tensor, place: int, adapters: AdapterStep) -> Tensor:
        """y [T, H] as embed() of ids [T] int64 returns it.

        Semantics: for each token t whose mix is one slot with a row for ids[t] at `place`: y[t] = that row; then
                   for (slot, w) in the mix, for LOW_RANK tiles of slot at TableSite.EMBED whose columns are ids, ids[t]
                   among them:
                     acc += w * B[:, ids[t] - out_start] A, in fp32
                   y[t] = round(y[t] + acc)
        """
        ...

    def adapter_head_(self, logits: Tensor, x: Tensor, place: int, adapters: AdapterStep) -> Tensor:
        """logits [L, at least the vocabulary] fp32, x [L, H]; the step's tokens are the rows of logits, all of decode.

        Semantics: for each row i whose mix is one slot, and each row w that its tiles at `place` hold for a token c:
                   logits[i, c] = x[i] . w, accumulated in fp32; rounded to the compute dtype at most. Then as
                   adapter_add_ to logits at TableSite.HEAD, whose sums are not rounded.
        """
        ...

    def rope_store_kv(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        layer: KVLayer,
        store_index: Tensor,
        params: AttentionParams,
        norm: QKNorm | None,
        adapters: AdapterStep | None = None,
    ) -> Tensor:
        """qkv [T, (num_heads + 2 * num_kv_heads) * head_dim] -> q [T, num_heads, head_dim]; K and V go to the cache.

        cos, sin [T, rotary_dim] in fp32, already gathered by position; rotary_dim <= head_dim (partial rotary: the
        first rotary_dim elements are rotated, the rest pass).
        Semantics: q, k, v = split(qkv); q, k = rms_norm over head_dim with norm.q, norm.k if given, and where a token's
                   mix is one slot with a tile at norm.place (q) or the next (k), with its row in place of that;
                   rotate_half(x) = [-x[d/2:], x[:d/2]]; q = q * cos + rotate_half(q) * sin, k alike;
                   layer.k[p, :, o] = k[t], layer.v[p, :, o] = v[t] with (p, o) = divmod(store_index[t], block_size).
        """
        ...

    def attention(self, q: Tensor, layer: KVLayer, meta: AttentionMeta, params: AttentionParams) -> Tensor:
        """q [T, num_heads, head_dim] -> [T, num_heads * head_dim]. Keys and values of this step are already stored.

        Semantics: sequence i has queries at positions kv_len - n .. kv_len - 1 (n its query count); each attends to
                   the keys at positions <= its own and > its own - window, found through its group's block table;
                   head h reads kv head h // (num_heads / num_kv_heads); softmax in fp32.
        """
        ...

    def act_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        """gate_up [T, 2 * F] -> [T, F].

        Semantics: act(gate) * up in fp32, rounded once; activation "silu" or "gelu_tanh".
        """
        ...

    def argmax(self, logits: Tensor) -> Tensor:
        """logits [N, V] fp32 -> [N] int64.

        Semantics: the lowest id of the largest logits; the first NaN where there is one.
        """
        ...

    def sample(
        self,
        logits: Tensor,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        uniform: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        """logits [N, V] fp32, unchanged; a number of each kind per row -> (ids [N] int64, log-probabilities [N] fp32).

        The log-probability is the drawn token's under softmax(logits): temperature and truncation do not count.
        Semantics, row by row: temperature 0, or a largest logit that is not finite: id as argmax. Else
                   kept = all tokens; top_k in 1..V-1: those with logits >= the k-th largest (all that equal it)
                   w = exp((logits - largest) / max(temperature, 1e-6)) of the kept
                   top_p < 1: the fewest, likeliest first and then by id, that make up top_p of the weight kept so far
                   min_p > 0: those with w >= min_p, so relative to the likeliest
                   the first, by id, whose cumulative weight in fp64 is above uniform * total weight; uniform in [0, 1)
        """
        ...
