"""The fast CPU backend: the ops of kernels/ops.py as C++ kernels (kernels/cpu/*.h), called through ctypes.

Every op is a record (abi.Op) that one C function runs. Called one by one, as here, an op costs some ten microseconds of
Python; program.py records a whole forward pass once and runs it by a single call per step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy

import torch
from torch import Tensor

from loraplex.kernels.constants import ACTIVATIONS, ALL_TOKENS, LOGIT_ROWS, OpCode, TableSite, Turned
from loraplex.kernels.cpu.abi import (
    ActMulArgs,
    AdapterArgs,
    AttentionArgs,
    CachedLayer,
    NormArgs,
    Op,
    OwnArgs,
    RopeArgs,
    Step,
)
from loraplex.kernels.cpu.op_records import (
    columns_op,
    embed_op,
    fill_adapters,
    fill_attention,
    linear_ops,
    sample_op,
    whole_panels,
)
from loraplex.kernels.cpu.program import CpuRecorder, Notes
from loraplex.kernels.cpu.team import Team
from loraplex.kernels.cpu.weights import CpuLinear, CpuParts, WeightPacker, packed_bytes
from loraplex.kernels.ops import Backend, PackedLinear, Recorder
from loraplex.kernels.quantized import Activations, PartShape, QuantizedWeight
from loraplex.kernels.records import AdapterStep, AttentionMeta, AttentionParams, KVLayer, OwnInput, QKNorm


class CpuBackend(Backend):
    """bf16 and fp32. Bits of a row never depend on the rows beside it, nor on the number of threads."""

    name = "cpu"

    def __init__(
        self,
        isa: str | None = None,
        threads: int | None = None,
        batch_invariant: bool = False,
        team: Team | None = None,
    ) -> None:
        """isa, threads: as for a Team, which is made of them where none is given.

        batch_invariant: adapters of decode rows take the prefill kernel too, whose sums are in another order (one
        element in thousands is then rounded the other way), so that a preempted answer is recomputed to the bit.

        Raises BackendUnavailable when the library is missing or the CPU lacks what was asked for.
        """
        self.device = torch.device("cpu")
        self.batch_invariant = batch_invariant
        self.team = team or Team(isa, threads)
        self.isa = self.team.isa
        self._sink: Team | Notes = self.team  # runs the ops now, or notes them
        self._packer = WeightPacker(self.team)

    def recorder(self, dtype: torch.dtype, cosines: Sequence[Tensor]) -> Recorder | None:
        twin, notes = copy(self), Notes(cosines)
        twin._sink = notes
        return CpuRecorder(twin, notes, self.team, dtype, self.batch_invariant)

    def beside(self) -> Backend:
        twin = copy(self)
        twin.team = twin._sink = Team(self.team.isa, threads=1)
        return twin

    def packed_bytes(self, linears: Iterable[Sequence[PartShape]], dtype: torch.dtype) -> int:
        return packed_bytes(linears, dtype)

    def pack_linear(self, weight: Tensor) -> CpuLinear:
        return self._packer.dense(weight)

    def pack_parts(
        self, parts: Sequence[Tensor | QuantizedWeight], dtype: torch.dtype, activations: Activations
    ) -> PackedLinear:
        return self._packer.parts(parts, dtype, activations)

    def embed(self, ids: Tensor, table: PackedLinear, scale: float | None, own: Tensor | None = None) -> Tensor:
        assert isinstance(table, CpuLinear | CpuParts)
        y = self._sink.new(ids.shape[0], table.in_features, dtype=table.dtype)
        factor = 1.0 if scale is None else torch.tensor(scale, dtype=table.dtype).item()
        step = Step(ids=ids.data_ptr(), own=_pointer(own))
        self._sink.emit(embed_op(ids, table, factor, y), table.dtype, step)
        return y

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float
    ) -> tuple[Tensor, Tensor]:
        columns = x.shape[-1]
        y = self._sink.new(*x.shape, dtype=x.dtype)
        total = x if residual is None else self._sink.new(*x.shape, dtype=x.dtype)
        op = Op(
            code=OpCode.RMS_NORM,
            rows=x.numel() // columns,
            x=x.data_ptr(),
            w=weight.data_ptr(),
            y=y.data_ptr(),
            columns_in=columns,
            norm=NormArgs(_pointer(residual), total.data_ptr(), eps, offset),
        )
        self._sink.emit(op, x.dtype)
        return y, total

    def linear(self, x: Tensor, weight: PackedLinear) -> Tensor:
        return self._linear(x, weight, self._sink.new(x.shape[0], weight.out_features, dtype=x.dtype))

    def adapter_linear(
        self, x: Tensor, weight: PackedLinear, inputs: Sequence[OwnInput], adapters: AdapterStep
    ) -> Tensor:
        y = self._sink.new(x.shape[0], weight.out_features, dtype=x.dtype)
        step = Step()
        fill_adapters(step, adapters)
        for op in linear_ops(x, weight, y, Turned.NEVER):
            self._sink.emit(op, x.dtype, step)
        for each in inputs:
            self._turned_linear(x, weight, y, each, step)
        return y

    def _turned_linear(self, x: Tensor, weight: PackedLinear, y: Tensor, outputs: OwnInput, step: Step) -> None:
        """Compute some columns of y [T, out] of x [T, in], turned: by way of a buffer where these cut a panel."""
        turned = self._sink.new(*x.shape, dtype=x.dtype)
        turn = Op(
            code=OpCode.OWN_INPUT,
            rows=x.shape[0],
            x=x.data_ptr(),
            y=turned.data_ptr(),
            columns_in=x.shape[1],
            own=OwnArgs(outputs.place),
        )
        wanted = slice(outputs.start, outputs.stop)
        whole, window = whole_panels(weight, wanted), y[:, wanted]
        ops = [turn]
        if whole == wanted:
            ops += linear_ops(turned, weight, window, Turned.ALWAYS, wanted)
        else:
            wide = self._sink.new(x.shape[0], whole.stop - whole.start, dtype=y.dtype)
            columns = wide[:, wanted.start - whole.start : wanted.stop - whole.start]
            ops += [*linear_ops(turned, weight, wide, Turned.ALWAYS, whole), columns_op(columns, window)]
        for op in ops:
            self._sink.emit(op, x.dtype, step)

    def logits(self, x: Tensor, weight: PackedLinear, room: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        y = self._sink.new(rows, weight.out_features, dtype=torch.float32) if room is None else room[:rows]
        return self._linear(x, weight, y)

    def _linear(self, x: Tensor, weight: PackedLinear, y: Tensor) -> Tensor:
        for op in linear_ops(x, weight, y):
            self._sink.emit(op, x.dtype)
        return y

    def add_bias_(self, y: Tensor, bias: Tensor) -> Tensor:
        op = Op(code=OpCode.BIAS, rows=y.shape[0], w=bias.data_ptr(), y=y.data_ptr(), columns_out=y.shape[1])
        self._sink.emit(op, y.dtype)
        return y

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        y = self._sink.new(rows.shape[0], x.shape[1], dtype=x.dtype)
        op = Op(code=OpCode.GATHER, rows=rows.shape[0], x=x.data_ptr(), y=y.data_ptr(), columns_in=x.shape[1])
        self._sink.emit(op, x.dtype, Step(rows=rows.data_ptr()))
        return y

    def adapter_add_(
        self, y: Tensor, x: Tensor, layer: int, site: int, adapters: AdapterStep, residual: Tensor | None = None
    ) -> Tensor:
        op = Op(
            code=OpCode.ADAPTER,
            rows=x.shape[0],
            x=x.data_ptr(),
            y=y.data_ptr(),
            columns_in=x.shape[1],
            columns_out=y.shape[1],
            adapter=AdapterArgs(layer, site, False, _pointer(residual)),
        )
        step = Step()
        fill_adapters(step, adapters, self.batch_invariant)
        self._sink.emit(op, x.dtype, step)
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
        op = Op(
            code=OpCode.OWN_NORM,
            rows=ALL_TOKENS if rows is None else LOGIT_ROWS,
            x=r.data_ptr(),
            y=y.data_ptr(),
            columns_in=r.shape[1],
            own=OwnArgs(place, eps, offset),
        )
        step = Step(tokens=y.shape[0], logit_rows=y.shape[0], rows=_pointer(rows))
        fill_adapters(step, adapters)
        self._sink.emit(op, r.dtype, step)
        return y

    def adapter_embed_(self, y: Tensor, ids: Tensor, place: int, adapters: AdapterStep) -> Tensor:
        op = Op(code=OpCode.OWN_EMBED, rows=ids.shape[0], y=y.data_ptr(), columns_out=y.shape[1], own=OwnArgs(place))
        step = Step(ids=ids.data_ptr())
        fill_adapters(step, adapters)
        self._sink.emit(op, y.dtype, step)
        return y

    def adapter_head_(self, logits: Tensor, x: Tensor, place: int, adapters: AdapterStep) -> Tensor:
        rows, columns = logits.shape
        where = {"rows": rows, "x": x.data_ptr(), "y": logits.data_ptr(), "columns_in": x.shape[1]}
        step = Step()
        fill_adapters(step, adapters)
        self._sink.emit(Op(code=OpCode.OWN_HEAD, **where, own=OwnArgs(place, ldy=columns)), x.dtype, step)
        added = AdapterArgs(adapters.table.num_layers, TableSite.HEAD, to_float=True)
        self._sink.emit(Op(code=OpCode.ADAPTER, **where, columns_out=columns, adapter=added), x.dtype, step)
        return logits

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
        if cos.shape[-1] > params.head_dim:
            raise ValueError(f"{cos.shape[-1]} elements of a head are to be rotated, but it has {params.head_dim}")
        q = self._sink.new(qkv.shape[0], params.num_heads, params.head_dim, dtype=qkv.dtype)
        op = Op(
            code=OpCode.ROPE,
            rows=qkv.shape[0],
            x=qkv.data_ptr(),
            y=q.data_ptr(),
            rope=RopeArgs(
                cache=_cached(layer),
                q_norm=None if norm is None else norm.q.data_ptr(),
                k_norm=None if norm is None else norm.k.data_ptr(),
                eps=0.0 if norm is None else norm.eps,
                offset=0.0 if norm is None else norm.offset,
                heads=params.num_heads,
                kv_heads=params.num_kv_heads,
                dim=params.head_dim,
                rotary=cos.shape[1],
                kind=self._sink.rope_kind(cos),
                place=-1 if norm is None else norm.place,
            ),
        )
        step = Step()
        if adapters is not None:
            fill_adapters(step, adapters)
        step.cos[0], step.sin[0] = cos.data_ptr(), sin.data_ptr()
        step.store_index[layer.group] = store_index.data_ptr()
        self._sink.emit(op, qkv.dtype, step)
        return q

    def attention(self, q: Tensor, layer: KVLayer, meta: AttentionMeta, params: AttentionParams) -> Tensor:
        y = self._sink.new(q.shape[0], params.num_heads * params.head_dim, dtype=q.dtype)
        op = Op(
            code=OpCode.ATTENTION,
            rows=q.shape[0],
            x=q.data_ptr(),
            y=y.data_ptr(),
            attention=AttentionArgs(
                cache=_cached(layer),
                scale=params.scale,
                softcap=params.softcap or 0.0,
                heads=params.num_heads,
                kv_heads=params.num_kv_heads,
                dim=params.head_dim,
                window=params.window or 0,
            ),
        )
        step = Step()
        fill_attention(step, meta)
        self._sink.emit(op, q.dtype, step)
        return y

    def act_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; there are: {', '.join(ACTIVATIONS)}")
        y = self._sink.new(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype)
        op = Op(
            code=OpCode.ACT_MUL,
            rows=gate_up.shape[0],
            x=gate_up.data_ptr(),
            y=y.data_ptr(),
            columns_out=y.shape[1],
            act_mul=ActMulArgs(ACTIVATIONS[activation]),
        )
        self._sink.emit(op, gate_up.dtype)
        return y

    def argmax(self, logits: Tensor) -> Tensor:
        ids = torch.empty(logits.shape[0], dtype=torch.int64)
        self._sample(logits, ids)
        return ids

    def sample(
        self,
        logits: Tensor,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        uniform: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        ids = torch.empty(logits.shape[0], dtype=torch.int64)
        logprobs = torch.empty(logits.shape[0], dtype=torch.float32)
        draws = torch.tensor(list(zip(temperature, top_k, top_p, min_p, uniform, strict=True)), dtype=torch.float64)
        if draws.shape[0] != logits.shape[0]:
            raise ValueError(f"{logits.shape[0]} rows of logits and {draws.shape[0]} of sampling parameters")
        self._sample(logits, ids, draws, logprobs)
        return ids, logprobs

    def _sample(self, logits: Tensor, ids: Tensor, draws: Tensor | None = None, logprobs: Tensor | None = None) -> None:
        logits = logits.contiguous()
        op = sample_op(logits)
        op.sample.logprobs = _pointer(logprobs)
        step = Step(draws=None if draws is None else draws.data_ptr(), drawn=ids.data_ptr())
        self._sink.emit(op, torch.float32, step)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _cached(layer: KVLayer) -> CachedLayer:
    return CachedLayer(layer.k.data_ptr(), layer.v.data_ptr(), layer.k.stride(0), layer.group)
