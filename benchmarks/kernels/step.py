"""One decode step of SmolLM2-135M: its time, the least it could take, where it goes, and what Python adds.

    python -m loraplex.benchmarks.kernels.step [--profile]

Random weights in bf16, 256 tokens of context a row, and for every row an adapter of its own (rank 16, all linears), put
into the arena by the server's own code. The least time is the sum over ops of max(bytes / bandwidth, flops / peak),
bytes being all that an op reads and writes: weights, tiles, keys and values, and its rows of activations.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.adapters.pages import PagePool
from loraplex.adapters.residency import Residency
from loraplex.adapters.tiles import BaseLayout, LowRank, pack
from loraplex.benchmarks.kernels.machine import Limits, Others, limits, measure
from loraplex.kernels.cpu.abi import Op, OpCode, Step
from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.metadata import (
    BLOCK_SIZE,
    AdapterSegments,
    AttentionMeta,
    KVGroup,
    Projection,
    Site,
)
from loraplex.server.engine.arena import Demand, allocate_arena, kv_layers, plan_memory
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.inputs import ForwardBatch
from loraplex.server.models.recorded import RecordedDecoder, record
from loraplex.server.models.rotary import RopeConfig
from loraplex.server.models.weights import LayerWeights, Linear, ModelWeights, weights_bytes

DTYPE = torch.bfloat16
CONTEXT, RANK = 256, 16
ROWS = (1, 8, 16, 32)

SMOLLM2 = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position=8192,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    activation="silu",
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    norm_offset=0.0,
    sandwich_norm=False,
    embed_scale=None,
    attn_scale=0.125,
    attn_softcap=None,
    final_softcap=None,
    windows=(None,) * 30,
    ropes=(RopeConfig("default", 100000.0, 64, 8192),),
    rope_of_layer=(0,) * 30,
    fused_checkpoint=False,
)


class TimedBackend(CpuBackend):
    """Keeps what it was asked to run last, and the seconds spent inside the C++ library."""

    inside = 0.0
    calls = 0
    last: tuple[ctypes.Array[Op], Step] | None = None

    def run(self, ops: ctypes.Array[Op], step: Step, dtype: torch.dtype) -> None:
        self.last = ops, step
        self.calls += 1
        start = time.perf_counter()
        super().run(ops, step, dtype)
        self.inside += time.perf_counter() - start


@dataclass(frozen=True)
class Model:
    """SmolLM2 recorded for decode, and adapters ad0, ad1, ... in its arena."""

    ops: TimedBackend
    decoder: RecordedDecoder
    residency: Residency
    arena: Tensor
    first_kv_page: int


def make_model(adapters: int = max(ROWS), config: ModelConfig = SMOLLM2) -> Model:
    ops = TimedBackend()
    demand = Demand(max_model_len=CONTEXT + BLOCK_SIZE, max_num_seqs=max(ROWS), token_budget=max(ROWS))
    plan = plan_memory(config, DTYPE, 2 << 30, weights_bytes(config, DTYPE), demand, 4 << 30)
    arena = allocate_arena(plan, ops.device)
    layout = BaseLayout("smollm2", config.num_layers, config.projections(), plan.page_bytes, DTYPE)
    pool = PagePool(plan.num_pages)
    residency = Residency(arena, pool, layout)
    for index in range(adapters):
        if not residency.load(f"ad{index}", pack(_random_adapter(config, index), layout)):
            raise RuntimeError(f"adapter {index} has no room in {plan}")
    pages = pool.alloc(pool.num_free, "kv") or []
    arena[min(pages) : min(pages) + max(ROWS) * _blocks()].fill_(0)  # touched, so that reading them reads memory
    layers = kv_layers(arena, config, DTYPE, plan.groups)
    decoder = record(Decoder(config, _random_weights(config, ops), ops, layers, arena), max(ROWS), max(ROWS))
    assert isinstance(decoder, RecordedDecoder)
    return Model(ops, decoder, residency, arena, min(pages))


def _blocks() -> int:
    return -(-CONTEXT // BLOCK_SIZE)


def _random_adapter(config: ModelConfig, seed: int) -> list[LowRank]:
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(DTYPE)

    def matrix(rows: int, columns: int) -> Tensor:
        return noise[: rows * columns].view(rows, columns)

    return [
        LowRank(layer, p, matrix(RANK, p.in_features), matrix(p.out_features, RANK), 1.0)
        for layer in range(config.num_layers)
        for p in config.projections()
    ]


def _random_weights(config: ModelConfig, ops: CpuBackend) -> ModelWeights:
    generator = torch.Generator().manual_seed(0)

    def linear(site: Site) -> Linear:
        parts = [p for p in config.projections() if p.site is site]
        n_in, n_out = parts[0].in_features, sum(p.out_features for p in parts)
        weight = torch.randn(n_out, n_in, generator=generator).mul_(n_in**-0.5).to(DTYPE)
        return Linear(ops.pack_linear(weight), None)

    norm = torch.ones(config.hidden_size, dtype=DTYPE)
    layers = [
        LayerWeights(
            attention_norm=norm.clone(),
            qkv=linear(Site.QKV),
            q_norm=None,
            k_norm=None,
            o=linear(Site.O),
            attention_out_norm=None,
            mlp_norm=norm.clone(),
            gate_up=linear(Site.GATE_UP),
            down=linear(Site.DOWN),
            mlp_out_norm=None,
        )
        for _ in range(config.num_layers)
    ]
    table = torch.randn(config.vocab_size, config.hidden_size, generator=generator).to(DTYPE)
    embedding = ops.pack_linear(table)
    return ModelWeights(embedding, tuple(layers), norm, embedding, DTYPE)


def make_batch(model: Model, rows: int, adapters: bool) -> ForwardBatch:
    """Decode rows at CONTEXT tokens; row i wears ad<i>."""
    table = torch.arange(rows * _blocks(), dtype=torch.int32).view(rows, -1) + model.first_kv_page
    last = CONTEXT - 1
    store = table[:, last // BLOCK_SIZE].long() * BLOCK_SIZE + last % BLOCK_SIZE
    bounds = torch.arange(rows + 1, dtype=torch.int32)
    slots = [model.residency.slot_of(f"ad{i}") or 0 for i in range(rows)]
    segments = AdapterSegments(
        indptr=bounds,
        mix_ptr=bounds,
        mix_slot=torch.tensor(slots, dtype=torch.int32),
        mix_weight=torch.ones(rows),
        bounds=tuple(range(rows + 1)),
        mixes=tuple(((slot, 1.0),) for slot in slots),
        num_decode_segments=rows,
    )
    return ForwardBatch(
        input_ids=torch.arange(rows) * 7,
        positions=torch.full((rows,), last),
        rope_lens=(CONTEXT,) * rows,
        attention=AttentionMeta(
            query_ptr=bounds,
            kv_lens=torch.full((rows,), CONTEXT, dtype=torch.int32),
            query_bounds=tuple(range(rows + 1)),
            kv_lens_host=(CONTEXT,) * rows,
            is_decode=(True,) * rows,
            groups=(KVGroup(table, store),),
        ),
        adapters=segments if adapters else None,
        tiles=model.residency.table,
        logit_rows=torch.arange(rows),
    )


# ---- the least time of an op ------------------------------------------------------------------------------------


def work(op: Op, rows: int, adapters: bool, config: ModelConfig = SMOLLM2) -> tuple[float, float]:
    """(bytes, flops) of one op for `rows` decode rows of distinct adapters."""
    size, n_in, n_out = 2, op.columns_in, op.columns_out
    if op.code == OpCode.LINEAR:
        return size * n_in * n_out + rows * (size * n_in + (4 if op.i0 else size) * n_out), 2 * rows * n_in * n_out
    if op.code == OpCode.ADAPTER:
        elements = sum(RANK * (p.in_features + p.out_features) for p in _projections(config, op.i1)) if adapters else 0
        return rows * (size * elements + (size * (n_in + 2 * n_out) if adapters else 0)), 2 * rows * elements
    if op.code == OpCode.ATTENTION:
        width = config.num_heads * config.head_dim
        cache = 2 * CONTEXT * config.num_kv_heads * config.head_dim
        return rows * size * (cache + 2 * width), 4 * rows * CONTEXT * width
    columns = {
        OpCode.EMBED: 2 * n_out,
        OpCode.GATHER: 2 * n_in,
        OpCode.RMS_NORM: (4 if op.aux else 2) * n_in,
        OpCode.ACT_MUL: 3 * n_out,
        OpCode.ROPE: 2 * (op.i0 + 2 * op.i1) * op.i2,
    }[OpCode(op.code)]
    return size * rows * columns, 0.0


def _projections(config: ModelConfig, site: int) -> list[Projection]:
    return [p for p in config.projections() if p.site == site]


def kind(op: Op) -> str:
    """Ops of one name do the same work."""
    name = OpCode(op.code).name.lower()
    if op.code == OpCode.LINEAR:
        return f"linear {op.columns_in}->{op.columns_out}"
    return f"adapter {Site(op.i1).name.lower()}" if op.code == OpCode.ADAPTER else name


# ---- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepResult:
    rows: int
    adapters: bool
    seconds: float
    least: float
    machine: Limits  # as they were meanwhile
    outside: float  # seconds a step spends in Python around the C++ calls
    calls: int

    @property
    def ratio(self) -> float:
        return self.seconds / self.least


def _step(model: Model, batch: ForwardBatch) -> None:
    model.decoder.logits(model.decoder.forward(batch))


def _recorded(model: Model, batch: ForwardBatch) -> tuple[list[Op], Step, Op]:
    """The pass' ops, its Step record, and the op of the logits."""
    hidden = model.decoder.forward(batch)
    assert model.ops.last is not None
    ops, step = model.ops.last
    model.decoder.logits(hidden)
    head = model.ops.last[0][0]
    return list(ops), step, head


@torch.inference_mode()
def measure_step(model: Model, rows: int, adapters: bool, machine: Limits, seconds: float = 1.0) -> StepResult:
    batch = make_batch(model, rows, adapters)
    (taken,), machine = measure([lambda: _step(model, batch)], machine, seconds)
    ops, _, head = _recorded(model, batch)
    least = sum(machine.seconds(*work(op, rows, adapters)) for op in (*ops, head))
    return StepResult(rows, adapters, taken, least, machine, *_outside(model, batch))


def _outside(model: Model, batch: ForwardBatch, steps: int = 10) -> tuple[float, int]:
    """(median seconds outside the library, calls into it) of a step."""
    samples = []
    for _ in range(steps):
        model.ops.inside, model.ops.calls = 0.0, 0
        start = time.perf_counter()
        _step(model, batch)
        samples.append(time.perf_counter() - start - model.ops.inside)
    return sorted(samples)[steps // 2], model.ops.calls


@dataclass(frozen=True)
class KindResult:
    """All ops of one kind in a step, run by themselves with cold caches."""

    name: str
    count: int
    seconds: float
    least: float
    nbytes: float
    flops: float


@torch.inference_mode()
def profile(model: Model, rows: int, adapters: bool, machine: Limits, seconds: float = 0.25) -> list[KindResult]:
    """Each kind of op as a program of its own. Their sum is the step's time but for what ops find in caches."""
    batch = make_batch(model, rows, adapters)
    ops, step, head = _recorded(model, batch)
    keep = torch.empty(rows * RANK * 64)  # scratch of the shrink: the step's own is gone
    step.ranks = keep.data_ptr()
    model.decoder.forward(batch)
    y = torch.empty(rows, SMOLLM2.vocab_size)
    head.y = y.data_ptr()
    kinds: dict[str, list[Op]] = {}
    for op in (*ops, head):
        if op.code != OpCode.ADAPTER or adapters:
            kinds.setdefault(kind(op), []).append(op)
    results = []
    for name, members in kinds.items():
        program = (Op * len(members))(*members)

        def run(program: ctypes.Array[Op] = program) -> None:
            CpuBackend.run(model.ops, program, step, DTYPE)

        nbytes, flops = (len(members) * each for each in work(members[0], rows, adapters))
        (taken,), now = measure([run], machine, seconds)
        least = len(members) * now.seconds(nbytes / len(members), flops / len(members))
        results.append(KindResult(name, len(members), taken, least, nbytes, flops))
    return results


def format_profile(rows: int, adapters: bool, step: StepResult, kinds: Sequence[KindResult]) -> str:
    head = f"{rows} rows, {f'{rows} adapters r={RANK}' if adapters else 'base'}: step {step.seconds * 1e3:.2f} ms"
    least = f"least {step.least * 1e3:.2f} ms at {step.machine.read / 1e9:.0f} GB/s, ratio {step.ratio:.2f}"
    lines = [f"{head}, {least}; {step.calls} calls, {step.outside * 1e6:.0f} us in Python"]
    if not kinds:
        return lines[0]
    lines.append(f"  {'op':22}{'count':>6}{'ms':>9}{'least':>9}{'ratio':>8}{'GB/s':>8}{'GFLOP/s':>9}{'lost ms':>9}")
    lines += [
        f"  {k.name:22}{k.count:6}{k.seconds * 1e3:9.3f}{k.least * 1e3:9.3f}{k.seconds / k.least:8.2f}"
        f"{k.nbytes / k.seconds / 1e9:8.1f}{k.flops / k.seconds / 1e9:9.0f}{(k.seconds - k.least) * 1e3:9.3f}"
        for k in sorted(kinds, key=lambda k: k.least - k.seconds)
    ]
    total = sum(k.seconds for k in kinds)
    lines.append(f"  {'sum':22}{'':6}{total * 1e3:9.3f}{sum(k.least for k in kinds) * 1e3:9.3f}")
    return "\n".join(lines)


def main() -> None:
    machine = limits()
    print(machine)
    model = make_model()
    for rows in ROWS:
        for adapters in (False, True):
            others = Others.watch()
            result = measure_step(model, rows, adapters, machine)
            kinds = profile(model, rows, adapters, machine) if "--profile" in sys.argv else []
            print(format_profile(rows, adapters, result, kinds), f"(others took {others.read():.0%} of the CPUs)\n")


if __name__ == "__main__":
    main()
