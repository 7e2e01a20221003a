"""SmolLM2-135M with random bf16 weights, recorded for decode, and adapters of rank 16 on all its linears.

Made by the server's own code: arena, pages, residency, decoder. What step.py and serving.py measure.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraplex.adapters.image.tiles import BaseLayout, LowRank
from loraplex.adapters.image.writing import pack
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.adapters.tiers.eviction import Reclaimer
from loraplex.adapters.tiers.pages import PagePool
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.kernels.cpu.abi import Op, Step, Steps
from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.cpu.team import Team
from loraplex.kernels.ops import PackedLinear
from loraplex.kernels.records import AdapterSegments, KVGroup
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.step.arena import allocate_arena, kv_layers
from loraplex.server.engine.step.memory import plan_memory
from loraplex.server.engine.step.scratch import Demand
from loraplex.server.models.config import ModelConfig, Site
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.inputs import ForwardBatch
from loraplex.server.models.quantizing import SCHEMES, Quantizer
from loraplex.server.models.recorded import RecordedDecoder, record
from loraplex.server.models.rotary import RopeConfig
from loraplex.server.models.weight_sizes import weights_bytes
from loraplex.server.models.weights import LayerWeights, Linear, ModelWeights, default_activations

DTYPE = torch.bfloat16
CONTEXT, RANK = 256, 16  # tokens in the cache of every row, rank of every adapter
ROWS = (1, 8, 16, 32)
MODEL_LEN = 2 * CONTEXT

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


class TimedTeam(Team):
    """Keeps what it was asked to run last, and the seconds spent inside the C++ library."""

    inside = 0.0
    calls = 0
    last: tuple[ctypes.Array[Op], Step] | None = None

    def run(self, ops: ctypes.Array[Op], step: Step, dtype: torch.dtype, steps: Steps | None = None) -> int:
        self.last = ops, step
        self.calls += 1
        start = time.perf_counter()
        done = super().run(ops, step, dtype, steps)
        self.inside += time.perf_counter() - start
        return done


@dataclass(frozen=True)
class Model:
    """SmolLM2 recorded for decode, and adapters ad0, ad1, ... in its arena; the rest of the arena is `kv`'s.

    In `kv`, key -1 - i is row i of make_batch.
    """

    config: ModelConfig
    ops: CpuBackend
    team: TimedTeam  # of `ops`
    decoder: RecordedDecoder
    residency: DeviceTier
    kv: KVCache
    arena: Tensor

    def touch(self, key: int) -> None:
        """Write a sequence's pages, so that reading them reads memory."""
        for table in self.kv.tables(key):
            self.arena[list(table)] = 0


def make_model(adapters: int = max(ROWS), config: ModelConfig = SMOLLM2, quantize: str | None = None) -> Model:
    """Make it; quantize: a word of SCHEMES for its weights, None leaves them in bf16."""
    team = TimedTeam()
    ops = CpuBackend(team=team)
    demand = Demand(max_model_len=MODEL_LEN, max_num_seqs=max(ROWS), token_budget=max(ROWS))
    plan = plan_memory(config, DTYPE, 2 << 30, weights_bytes(config, DTYPE), demand, 4 << 30)
    arena = allocate_arena(plan, ops.device)
    layout = BaseLayout("smollm2", config.num_layers, config.projections(), plan.page_bytes, DTYPE, config.blocks())
    pool, reclaimer = PagePool(plan.num_pages), Reclaimer()
    residency = DeviceTier(arena, pool, layout, reclaimer=reclaimer)
    for index in range(adapters):
        if not residency.load(f"ad{index}", pack(_random_adapter(config, index), layout)):
            raise RuntimeError(f"adapter {index} has no room in {plan}")
        residency.pin(f"ad{index}")
    layers = kv_layers(arena, config, DTYPE, plan.groups)
    decoder = record(Decoder(config, _random_weights(config, ops, quantize), ops, layers, arena), max(ROWS), max(ROWS))
    assert isinstance(decoder, RecordedDecoder)
    model = Model(config, ops, team, decoder, residency, KVCache(pool, plan.groups, BLOCK_SIZE, reclaimer), arena)
    for row in range(max(ROWS)):
        if not model.kv.grow(-1 - row, 0, CONTEXT):
            raise RuntimeError(f"row {row} has no room in {plan}")
        model.touch(-1 - row)
    return model


def _random_adapter(config: ModelConfig, seed: int) -> list[LowRank]:
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(DTYPE)

    def matrix(rows: int, columns: int) -> Tensor:
        return noise[: rows * columns].view(rows, columns)

    return [
        LowRank(layer, p, matrix(RANK, p.in_features), matrix(p.out_features, RANK), 1.0)
        for layer in range(config.num_layers)
        for p in config.projections()
    ]


def _random_weights(config: ModelConfig, ops: CpuBackend, quantize: str | None) -> ModelWeights:
    generator = torch.Generator().manual_seed(0)
    linears, tables = (SCHEMES[quantize].linears, SCHEMES[quantize].tables) if quantize else (None, None)

    def packed(weight: Tensor, quantizer: Quantizer | None) -> PackedLinear:
        if quantizer is None:
            return ops.pack_linear(weight)
        activations = default_activations([quantizer.format(weight.shape[1])], ops.device, ops.isa)
        return ops.pack_parts([quantizer.quantize(weight)], DTYPE, activations)

    def linear(site: Site) -> Linear:
        parts = [p for p in config.projections() if p.site == site]
        n_in, n_out = parts[0].in_features, sum(p.out_features for p in parts)
        weight = torch.randn(n_out, n_in, generator=generator).mul_(n_in**-0.5).to(DTYPE)
        return Linear(packed(weight, linears), None)

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
    embedding = packed(table, tables)
    return ModelWeights(embedding, tuple(layers), norm, embedding, DTYPE)


def make_batch(model: Model, rows: int, adapters: bool) -> ForwardBatch:
    """Decode rows at CONTEXT tokens; row i wears ad<i>."""
    table = torch.tensor([list(model.kv.tables(-1 - row)[0]) for row in range(rows)], dtype=torch.int32)
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
    blank = ForwardBatch.blank(
        model.residency.table,
        1,
        sequences=rows,
        length=CONTEXT,
        is_decode=True,
        adapters=segments if adapters else None,
    )
    return replace(
        blank,
        input_ids=torch.arange(rows) * 7,
        attention=replace(blank.attention, groups=(KVGroup(table, store),)),
        logit_rows=torch.arange(rows),
    )
