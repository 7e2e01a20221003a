"""The fast CPU backend: the ops of kernels/ops.py as C++ kernels (kernels/cpu/*.h), called through ctypes.

Every op is a record (abi.Op) that one C function runs. Called one by one, as here, an op costs some ten microseconds of
Python; program.py records a whole forward pass once and runs it by a single call per step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraplex.kernels.cpu import abi
from loraplex.kernels.cpu.abi import Op, OpCode, Step, Steps
from loraplex.kernels.hugepages import HUGE_PAGE, huge_zeros
from loraplex.kernels.ops import Backend, BackendUnavailable, PackedLinear, Recorder
from loraplex.kernels.records import ALIGN, AdapterSegments, AttentionMeta, AttentionParams, KVLayer, Site, TileTable

REGION = 64 << 20
"""Bytes of huge pages taken at a time for weights; resident only as far as they are written."""

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}

_DTYPES = {torch.bfloat16: 0, torch.float32: 1}


@dataclass(frozen=True)
class CpuLinear:
    """A weight in panels of 64 output columns (linear.h): the only copy of it in memory."""

    packed: Tensor  # [ceil(out / 16) * 16 * in] compute dtype
    in_features: int
    out_features: int


class CpuBackend(Backend):
    """bf16 and fp32. Bits of a row never depend on the rows beside it, nor on the number of threads."""

    name = "cpu"

    def __init__(self, isa: str | None = None, threads: int | None = None, batch_invariant: bool = False) -> None:
        """isa: one of abi.ISAS; the default is LORAPLEX_ISA or the best this CPU has. threads: torch's by default.

        batch_invariant: adapters of decode rows take the prefill kernel too, whose sums are in another order (one
        element in thousands is then rounded the other way), so that a preempted answer is recomputed to the bit.

        Raises BackendUnavailable when the library is missing or the CPU lacks what was asked for.
        """
        try:
            self._isa, self.isa = abi.pick_isa(isa)
        except (abi.LibraryMissing, ValueError) as error:
            raise BackendUnavailable(str(error)) from None
        self.device = torch.device("cpu")
        self.threads = threads or torch.get_num_threads()
        self.batch_invariant = batch_invariant
        self._run = abi.library().loraplex_run
        self._region = torch.empty(0, dtype=torch.uint8)  # what the next weights are packed into

    def run(self, ops: ctypes.Array[Op], step: Step, dtype: torch.dtype, steps: Steps | None = None) -> int:
        """Run the ops in order on the team of threads, once or for as many of `steps` as come about.

        Returns how many steps those were when the last is done.
        """
        following = None if steps is None else ctypes.byref(steps)
        done: int = self._run(self._isa, ops, len(ops), ctypes.byref(step), _code(dtype), self.threads, following)
        return done

    def emit(self, op: Op, dtype: torch.dtype, step: Step | None = None) -> None:
        """Run one op now. The recorder's version only notes it."""
        self.run((Op * 1)(op), step or Step(), dtype)

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory for a result."""
        return torch.empty(*shape, dtype=dtype)

    def recorder(self, dtype: torch.dtype, cosines: Sequence[Tensor]) -> Recorder | None:
        from loraplex.kernels.cpu.program import CpuRecorder  # a subclass of this class

        return CpuRecorder(self, dtype, cosines)

    def _take(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 for a weight, one behind the other: huge pages of their own would cost it 1 MiB on average."""
        nbytes = -(-nbytes // ALIGN) * ALIGN
        if nbytes > self._region.numel():
            self._region = huge_zeros(max(nbytes, REGION))
        taken, self._region = self._region[:nbytes], self._region[nbytes:]
        return taken

    def packed_bytes(self, shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> int:
        total = used = room = 0
        for out, columns in shapes:
            nbytes = -(-(-(-out // 16) * 16 * columns * dtype.itemsize) // ALIGN) * ALIGN
            if nbytes > room:  # as _take: what is left of a region is never written
                total += -(-used // HUGE_PAGE) * HUGE_PAGE
                used, room = 0, max(nbytes, REGION)
            used, room = used + nbytes, room - nbytes
        return total + -(-used // HUGE_PAGE) * HUGE_PAGE

    def pack_linear(self, weight: Tensor) -> PackedLinear:
        out, columns = weight.shape
        if columns % 2:
            raise ValueError(f"a weight of {columns} input features; the CPU backend packs them in pairs")
        packed = self._take(-(-out // 16) * 16 * columns * weight.element_size()).view(weight.dtype)
        op = Op(
            code=OpCode.PACK,
            x=weight.contiguous().data_ptr(),
            y=packed.data_ptr(),
            columns_in=columns,
            columns_out=out,
        )
        CpuBackend.emit(self, op, weight.dtype)
        return CpuLinear(packed, columns, out)

    def embed(self, ids: Tensor, table: PackedLinear, scale: float | None) -> Tensor:
        assert isinstance(table, CpuLinear)
        dtype = table.packed.dtype
        y = self.new(ids.shape[0], table.in_features, dtype=dtype)
        op = Op(
            code=OpCode.EMBED,
            rows=ids.shape[0],
            w=table.packed.data_ptr(),
            y=y.data_ptr(),
            columns_in=table.out_features,
            columns_out=table.in_features,
            f0=1.0 if scale is None else torch.tensor(scale, dtype=dtype).item(),
        )
        self.emit(op, dtype, Step(ids=ids.data_ptr()))
        return y

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float
    ) -> tuple[Tensor, Tensor]:
        columns = x.shape[-1]
        y = self.new(*x.shape, dtype=x.dtype)
        op = Op(
            code=OpCode.RMS_NORM,
            rows=x.numel() // columns,
            x=x.data_ptr(),
            w=weight.data_ptr(),
            y=y.data_ptr(),
            columns_in=columns,
            f0=eps,
            f1=offset,
        )
        if residual is None:
            self.emit(op, x.dtype)
            return y, x
        total = self.new(*x.shape, dtype=x.dtype)
        op.aux, op.z = residual.data_ptr(), total.data_ptr()
        self.emit(op, x.dtype)
        return y, total

    def linear(self, x: Tensor, weight: PackedLinear) -> Tensor:
        return self._linear(x, weight, self.new(x.shape[0], weight.out_features, dtype=x.dtype))

    def logits(self, x: Tensor, weight: PackedLinear, room: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        y = self.new(rows, weight.out_features, dtype=torch.float32) if room is None else room[:rows]
        return self._linear(x, weight, y)

    def _linear(self, x: Tensor, weight: PackedLinear, y: Tensor) -> Tensor:
        self.emit(linear_op(x, weight, y), x.dtype)
        return y

    def add_bias_(self, y: Tensor, bias: Tensor) -> Tensor:
        op = Op(code=OpCode.BIAS, rows=y.shape[0], w=bias.data_ptr(), y=y.data_ptr(), columns_out=y.shape[1])
        self.emit(op, y.dtype)
        return y

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        y = self.new(rows.shape[0], x.shape[1], dtype=x.dtype)
        op = Op(code=OpCode.GATHER, rows=rows.shape[0], x=x.data_ptr(), y=y.data_ptr(), columns_in=x.shape[1])
        self.emit(op, x.dtype, Step(rows=rows.data_ptr()))
        return y

    def adapter_add_(
        self, y: Tensor, x: Tensor, arena: Tensor, table: TileTable, layer: int, site: Site, segments: AdapterSegments
    ) -> Tensor:
        op = Op(
            code=OpCode.ADAPTER,
            rows=x.shape[0],
            x=x.data_ptr(),
            y=y.data_ptr(),
            columns_in=x.shape[1],
            columns_out=y.shape[1],
            i0=layer,
            i1=site,
        )
        step = Step()
        adapter_step(step, arena, table, self.roles(segments))
        self.emit(op, x.dtype, step)
        return y

    def roles(self, segments: AdapterSegments) -> AdapterSegments:
        """The segments with the kernel that each is computed by: batch-invariant, that of prefill for all."""
        return replace(segments, num_decode_segments=0) if self.batch_invariant else segments

    def rope_store_kv(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        layer: KVLayer,
        store_index: Tensor,
        params: AttentionParams,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        norm_eps: float,
        norm_offset: float,
    ) -> Tensor:
        if cos.shape[-1] > params.head_dim:
            raise ValueError(f"{cos.shape[-1]} elements of a head are to be rotated, but it has {params.head_dim}")
        q = self.new(qkv.shape[0], params.num_heads, params.head_dim, dtype=qkv.dtype)
        op = Op(
            code=OpCode.ROPE,
            rows=qkv.shape[0],
            x=qkv.data_ptr(),
            w=None if q_norm is None else q_norm.data_ptr(),
            aux=None if k_norm is None else k_norm.data_ptr(),
            y=q.data_ptr(),
            z=layer.k.data_ptr(),
            aux2=layer.v.data_ptr(),
            page=layer.k.stride(0),
            f0=norm_eps,
            f1=norm_offset,
            i0=params.num_heads,
            i1=params.num_kv_heads,
            i2=params.head_dim,
            i3=cos.shape[1],
            i4=layer.group,
            i5=self.rope_kind(cos),
        )
        step = Step()
        step.cos[0], step.sin[0] = cos.data_ptr(), sin.data_ptr()
        step.store_index[layer.group] = store_index.data_ptr()
        self.emit(op, qkv.dtype, step)
        return q

    def rope_kind(self, cos: Tensor) -> int:
        """Index of these cosines in the step's table; alone there is one."""
        return 0

    def attention(self, q: Tensor, layer: KVLayer, meta: AttentionMeta, params: AttentionParams) -> Tensor:
        y = self.new(q.shape[0], params.num_heads * params.head_dim, dtype=q.dtype)
        op = Op(
            code=OpCode.ATTENTION,
            rows=q.shape[0],
            x=q.data_ptr(),
            w=layer.k.data_ptr(),
            aux=layer.v.data_ptr(),
            y=y.data_ptr(),
            page=layer.k.stride(0),
            f0=params.scale,
            f1=params.softcap or 0.0,
            i0=params.num_heads,
            i1=params.num_kv_heads,
            i2=params.head_dim,
            i3=params.window or 0,
            i4=layer.group,
        )
        step = Step()
        attention_step(step, meta)
        self.emit(op, q.dtype, step)
        return y

    def act_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; there are: {', '.join(ACTIVATIONS)}")
        y = self.new(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype)
        op = Op(
            code=OpCode.ACT_MUL,
            rows=gate_up.shape[0],
            x=gate_up.data_ptr(),
            y=y.data_ptr(),
            columns_out=y.shape[1],
            i0=ACTIVATIONS[activation],
        )
        self.emit(op, gate_up.dtype)
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
        op.z = None if logprobs is None else logprobs.data_ptr()
        step = Step(draws=None if draws is None else draws.data_ptr(), drawn=ids.data_ptr())
        self.emit(op, torch.float32, step)


def linear_op(x: Tensor, weight: PackedLinear, y: Tensor) -> Op:
    """x [T, in] -> y [T, out] in x's dtype, or in fp32."""
    assert isinstance(weight, CpuLinear), f"{type(weight).__name__} was packed by another backend"
    return Op(
        code=OpCode.LINEAR,
        rows=x.shape[0],
        x=x.data_ptr(),
        w=weight.packed.data_ptr(),
        y=y.data_ptr(),
        columns_in=weight.in_features,
        columns_out=weight.out_features,
        i0=int(y.dtype == torch.float32 and x.dtype != torch.float32),
    )


def sample_op(logits: Tensor) -> Op:
    """From logits [N, V] fp32 to the step's `drawn`."""
    return Op(code=OpCode.SAMPLE, rows=logits.shape[0], x=logits.data_ptr(), columns_in=logits.shape[1])


def attention_step(step: Step, meta: AttentionMeta) -> None:
    """Fill in the sequences and their page tables."""
    step.seqs = len(meta.kv_lens_host)
    step.query_ptr, step.kv_lens = meta.query_ptr.data_ptr(), meta.kv_lens.data_ptr()
    for index, group in enumerate(meta.groups):
        step.block_table[index] = group.block_table.data_ptr()
        step.max_blocks[index] = group.block_table.shape[1]
        step.store_index[index] = group.store_index.data_ptr()


def adapter_step(step: Step, arena: Tensor, table: TileTable, segments: AdapterSegments) -> None:
    """Fill in the adapters."""
    step.segments, step.decode_segments = len(segments.mixes), segments.num_decode_segments
    step.num_layers = table.ranges.shape[1]
    step.indptr, step.mix_ptr = segments.indptr.data_ptr(), segments.mix_ptr.data_ptr()
    step.mix_slot, step.mix_weight = segments.mix_slot.data_ptr(), segments.mix_weight.data_ptr()
    step.ranges, step.tiles, step.arena = table.ranges.data_ptr(), table.tiles.data_ptr(), arena.data_ptr()


def _code(dtype: torch.dtype) -> int:
    if dtype not in _DTYPES:
        raise ValueError(f"the CPU backend computes in bfloat16 or float32, not {dtype}")
    return _DTYPES[dtype]
