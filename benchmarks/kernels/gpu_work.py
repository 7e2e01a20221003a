"""The shapes the GPU kernels are compiled for and measured at: one layer of known models, a step each of both kinds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from loraplex.kernels.constants import ALIGN, BLOCK_SIZE, TILE_RANKS, Own, TileKind
from loraplex.kernels.ops import Backend
from loraplex.kernels.quantized import Activations, GroupScales, QuantizedWeight, WeightFormat
from loraplex.kernels.records import (
    AdapterSegments,
    AdapterStep,
    AttentionMeta,
    AttentionParams,
    KVGroup,
    KVLayer,
    OwnInput,
    OwnPlaces,
    OwnTable,
    QKNorm,
    TileTable,
    element_bytes,
)
from loraplex.server.models.config import Site


@dataclass(frozen=True)
class Shape:
    """What of a model the kernels' variants depend on."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str = "silu"
    offset: float = 0.0  # of norm weights
    qk_norm: bool = False
    bias: bool = False
    window: int | None = None
    softcap: float | None = None

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def sites(self) -> dict[Site, tuple[int, tuple[int, ...]]]:
        """(in_features, out_features of each projection) per site."""
        return {
            Site.QKV: (self.hidden, (self.heads * self.head_dim, *(self.kv_heads * self.head_dim,) * 2)),
            Site.O: (self.heads * self.head_dim, (self.hidden,)),
            Site.GATE_UP: (self.hidden, (self.inner, self.inner)),
            Site.DOWN: (self.inner, (self.hidden,)),
        }


PERIOD = 262_147
"""Numbers drawn before they come again: a prime, so that no two rows of a tensor and no two tiles are alike."""

SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 9, 3, 64)
LLAMA3 = Shape("Llama-3.1-8B", 4096, 14336, 32, 8, 128)
SHAPES = (
    SMOLLM2,
    LLAMA3,
    Shape("Qwen2.5-0.5B", 896, 4864, 14, 2, 64, bias=True),
    Shape("Qwen3-0.6B", 1024, 3072, 16, 8, 128, qk_norm=True),
    Shape("Gemma-2-2B", 2304, 9216, 8, 4, 256, "gelu_tanh", 1.0, window=4096, softcap=50.0),
    Shape("Gemma-3-270M", 640, 2048, 4, 1, 256, "gelu_tanh", 1.0, qk_norm=True, window=512),
    Shape("Phi-3-mini", 3072, 8192, 32, 32, 96, window=2047),
)


@dataclass(frozen=True)
class Work:
    """The tensors of one layer's ops in one step. Equal seeds make equal work on any backend."""

    shape: Shape
    dtype: torch.dtype
    table: TileTable
    arena: Tensor
    segments: AdapterSegments
    meta: AttentionMeta
    kv: KVLayer
    tokens: int
    inputs: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # made once: a repeated run is the ops alone


def make_work(
    ops: Backend, shape: Shape, dtype: torch.dtype, decode: int, prefill: tuple[int, ...], rank: int = 16, kv: int = 64
) -> Work:
    """`decode` rows and prefill chunks of the given lengths, each with an adapter of its own on every projection.

    kv: tokens in the cache before the step, of each sequence.
    """
    device = ops.device
    generator = torch.Generator().manual_seed(0)
    counts = [*(1 for _ in range(decode)), *prefill]
    lens = [kv + n for n in counts]
    bounds = [0]
    for n in counts:
        bounds.append(bounds[-1] + n)
    arena, table = _adapters(shape, dtype, len(counts), rank, generator)
    segments = AdapterSegments(
        indptr=torch.tensor(bounds, dtype=torch.int32, device=device),
        mix_ptr=torch.arange(len(counts) + 1, dtype=torch.int32, device=device),
        mix_slot=torch.arange(len(counts), dtype=torch.int32, device=device),
        mix_weight=torch.ones(len(counts), device=device),
        bounds=tuple(bounds),
        mixes=tuple(((slot, 1.0),) for slot in range(len(counts))),
        num_decode_segments=decode,
    )
    blocks = -(-max(lens) // BLOCK_SIZE)
    blocks_of = torch.randperm(len(counts) * blocks, generator=generator).view(len(counts), blocks).int()
    page = 2 * shape.kv_heads * BLOCK_SIZE * shape.head_dim
    pages = _normal(len(counts) * blocks * page, generator).to(dtype).to(device)
    planes = pages.view(-1, 2, shape.kv_heads, BLOCK_SIZE, shape.head_dim)
    places = [
        int(blocks_of[i, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        for i, n in enumerate(counts)
        for position in range(lens[i] - n, lens[i])
    ]
    meta = AttentionMeta(
        query_ptr=segments.indptr,
        kv_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        query_bounds=tuple(bounds),
        kv_lens_host=tuple(lens),
        is_decode=tuple(i < decode for i in range(len(counts))),
        groups=(KVGroup(blocks_of.to(device), torch.tensor(places, device=device)),),
    )
    on_device = TileTable(table.ranges.to(device), table.tiles.to(device), table.ranges_host, table.tiles_host)
    kv_layer = KVLayer(planes[:, 0], planes[:, 1], 0)
    return Work(shape, dtype, on_device, arena.to(device), segments, meta, kv_layer, bounds[-1])


def _adapters(
    shape: Shape, dtype: torch.dtype, slots: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, TileTable]:
    """Adapters of one layer, tile behind tile: [1, bytes] uint8 and the table, on the CPU."""
    ranges = torch.zeros(slots, 1, len(Site), 2, dtype=torch.int32)
    rows: list[tuple[int, ...]] = []
    strips: list[Tensor] = []
    end = 0

    def put(n: int, columns: int) -> int:
        nonlocal end
        length = -(-n * columns * element_bytes(dtype) // ALIGN) * ALIGN // element_bytes(dtype)
        strips.append((_normal(length, generator) / columns**0.5).to(dtype))
        begin, end = end, end + length * element_bytes(dtype) // ALIGN
        return begin

    for slot in range(slots):
        for site, (n_in, outs) in shape.sites().items():
            first, start = len(rows), 0
            for out in outs:
                for at in range(0, rank, TILE_RANKS):
                    n = min(TILE_RANKS, rank - at)
                    rows.append((put(n, n_in), put(n, out), n, start, out, TileKind.LOW_RANK, 0, n_in))
                start += out
            ranges[slot, 0, site] = torch.tensor([first, len(rows)])
    tiles = torch.tensor(rows, dtype=torch.int32)
    return torch.cat(strips).view(torch.uint8).unsqueeze(0), TileTable(ranges, tiles, ranges, tiles)


def fill_cache(ops: Backend, work: Work) -> None:
    """Store the tokens before the step as `ops` stores them: where their elements lie in a page is its own affair.

    Without it the cache holds numbers that mean different keys and values to different backends.
    """
    shape, counts = work.shape, [stop - start for start, stop in pairwise(work.meta.query_bounds)]
    group = work.meta.groups[0]
    places = [
        int(blocks[position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        for blocks, kv_len, count in zip(group.block_table.tolist(), work.meta.kv_lens_host, counts, strict=True)
        for position in range(kv_len - count)
    ]
    qkv = _randn(ops, work, len(places), shape.qkv, seed=4)
    cos = torch.ones(len(places), shape.head_dim, device=ops.device)
    params = AttentionParams(shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5, None, None)
    index = torch.tensor(places, device=ops.device)
    ops.rope_store_kv(qkv, cos, torch.zeros_like(cos), work.kv, index, params, None)


def run_adapters(ops: Backend, work: Work) -> list[Tensor]:
    """adapter_add_ at the four sites: the new outputs."""
    outputs = []
    for site, (n_in, outs) in work.shape.sites().items():
        x, y = _randn(ops, work, work.tokens, n_in), _randn(ops, work, work.tokens, sum(outs), seed=10 + site)
        outputs.append(ops.adapter_add_(y, x, 0, site, AdapterStep(work.arena, work.table, work.segments)))
    return outputs


def run_blocks(ops: Backend, work: Work) -> list[Tensor]:
    """adapter_add_ as it is at a block, beside a residual, at the one site that is as wide: the new outputs."""
    n_in, outs = work.shape.sites()[Site.O]
    x, y = _randn(ops, work, work.tokens, n_in), _randn(ops, work, work.tokens, sum(outs), seed=20)
    residual = _randn(ops, work, work.tokens, n_in, seed=21)
    return [ops.adapter_add_(y, x, 0, Site.O, AdapterStep(work.arena, work.table, work.segments), residual)]


def run_attention(ops: Backend, work: Work) -> list[Tensor]:
    """rope_store_kv and attention, without a window and with the model's."""
    shape, tokens = work.shape, work.tokens
    qkv = _randn(ops, work, tokens, shape.qkv)
    angles = _randn(ops, work, tokens, shape.head_dim, seed=2).float()
    weight = _randn(ops, work, shape.head_dim)
    norm = QKNorm(weight, weight, 1e-6, shape.offset) if shape.qk_norm else None
    store = work.meta.groups[0].store_index
    outputs = []
    for window in dict.fromkeys((None, shape.window)):
        params = AttentionParams(
            shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5, window, shape.softcap
        )
        q = ops.rope_store_kv(qkv, angles.cos(), angles.sin(), work.kv, store, params, norm)
        outputs += [q, ops.attention(q, work.kv, work.meta, params)]
    return outputs


def run_rowwise(ops: Backend, work: Work) -> list[Tensor]:
    """Norms, activation, bias and gathering of rows."""
    shape, tokens = work.shape, work.tokens
    x, residual = _randn(ops, work, tokens, shape.hidden), _randn(ops, work, tokens, shape.hidden, seed=1)
    weight = _randn(ops, work, shape.hidden, seed=2)
    rows = torch.arange(tokens - 1, -1, -1, device=ops.device)
    outputs = [
        *ops.rms_norm(x, weight, 1e-6, None, shape.offset),
        *ops.rms_norm(x, weight, 1e-6, residual, shape.offset),
        ops.act_mul(_randn(ops, work, tokens, 2 * shape.inner), shape.activation),
        ops.take_rows(x, rows),
        ops.embed(rows, ops.pack_linear(x), 2.0 if shape.offset else None),
        ops.embed(rows - tokens, ops.pack_linear(_randn(ops, work, 64, shape.hidden)), None, residual),
    ]
    if shape.bias:
        outputs.append(
            ops.add_bias_(_randn(ops, work, tokens, shape.qkv, seed=20), _randn(ops, work, shape.qkv, seed=3))
        )
    return outputs


def run_own(ops: Backend, work: Work) -> list[Tensor]:
    """Norms, rows of the embedding and of the head that adapters have of their own: the first A of each stands in.

    And low-rank changes of both tables: those of q, k and v stand in.
    """
    shape, places, slots = work.shape, OwnPlaces(1), len(work.segments.mixes)
    ranges = torch.zeros(slots, places.count, 2, dtype=torch.int32)
    ranges[:, :, 0] = work.table.ranges_host[:, 0, Site.QKV, :1]
    ranges[:, :, 1] = ranges[:, :, 0] + 1
    own = OwnTable(ranges.to(ops.device), ranges, dict.fromkeys(range(slots), Own.NORM | Own.EMBED | Own.HEAD))
    linears = work.table.ranges_host[:, :1, Site.QKV : Site.QKV + 1].expand(-1, 2, len(Site), -1).contiguous()
    table = replace(work.table, ranges=linears.to(ops.device), ranges_host=linears, own=own)
    step = AdapterStep(work.arena, table, work.segments)
    x = _randn(ops, work, work.tokens, shape.hidden)
    rows = torch.arange(work.tokens - 1, -1, -1, device=ops.device)
    first = table.tiles_host.clone()
    first[0] = torch.tensor([int(first[0, 0]), -1, 1, 0, 1, TileKind.OWN, 0, shape.head_dim])
    own = replace(
        own, ranges=torch.tensor([0, 1], dtype=torch.int32, device=ops.device).expand(ranges.shape).contiguous()
    )
    own = replace(own, ranges_host=own.ranges.cpu())
    of_heads = replace(step, table=replace(table, tiles=first.to(ops.device), tiles_host=first, own=own))
    rows_of_logits = replace(step, segments=replace(work.segments, num_decode_segments=slots))
    logits = torch.zeros(work.tokens, shape.qkv, device=ops.device)
    params = AttentionParams(shape.heads, shape.kv_heads, shape.head_dim, 1.0, None, None)
    q, k = _randn(ops, work, 2, shape.head_dim)
    norm = QKNorm(q, k, 1e-6, shape.offset, 0)
    qkv, cos = _randn(ops, work, work.tokens, shape.qkv), torch.ones(work.tokens, shape.head_dim, device=ops.device)
    return [
        ops.adapter_norm_(x.clone(), x, 1e-6, shape.offset, 0, step),
        ops.adapter_norm_(x.clone(), x, 1e-6, shape.offset, 0, step, rows),
        ops.adapter_embed_(x.clone(), rows % TILE_RANKS, places.embed, step),
        ops.adapter_head_(logits, x, places.head, rows_of_logits),
        ops.rope_store_kv(
            qkv, cos, torch.zeros_like(cos), work.kv, work.meta.groups[0].store_index, params, norm, of_heads
        ),
    ]


def run_turned(ops: Backend, work: Work) -> list[Tensor]:
    """The base linear after attention, its input turned by blocks of 32: the first A of each adapter stands in."""
    (n_in, (n_out,)), places, slots = work.shape.sites()[Site.O], OwnPlaces(1), len(work.segments.mixes)
    ranges = torch.zeros(slots, places.count, 2, dtype=torch.int32)
    ranges[:, places.input(0, 0)] = torch.tensor([0, 1])
    tiles = work.table.tiles_host.clone()
    tiles[0] = torch.tensor([int(tiles[0, 0]), -1, TILE_RANKS, 0, 1, TileKind.TURN, 0, 32])
    own = OwnTable(ranges.to(ops.device), ranges, dict.fromkeys(range(slots), Own.INPUT))
    table = replace(work.table, tiles=tiles.to(ops.device), tiles_host=tiles, own=own)
    weight = ops.pack_linear(_randn(ops, work, n_out, n_in, seed=30))
    inputs = (OwnInput(places.input(0, 0), 0, n_out),)
    step = AdapterStep(work.arena, table, work.segments)
    return [ops.adapter_linear(_randn(ops, work, work.tokens, n_in), weight, inputs, step)]


def run_linears(ops: Backend, work: Work) -> list[Tensor]:
    """The base linears of the four sites, and logits."""
    outputs = []
    for n_in, outs in work.shape.sites().values():
        weight = ops.pack_linear(_randn(ops, work, sum(outs), n_in, seed=30))
        outputs.append(ops.linear(_randn(ops, work, work.tokens, n_in), weight))
    return [*outputs, ops.logits(_randn(ops, work, work.tokens, n_in), weight)]


FORMATS = (
    WeightFormat("nf4", bits=4, group=64, codebook=tuple(i / 8 - 1 for i in range(16))),
    WeightFormat("Q4_K", bits=4, group=32, scale_bits=8, has_offset=True),
    WeightFormat("Q6_K", bits=6, group=16, zero=32, scale_bits=8),
    WeightFormat("Q8_0", bits=8, group=32, scale_bits=16),
    WeightFormat("int8", bits=8, group=None),
)
"""One of each kind of code, scale and offset."""


def run_quantized(ops: Backend, work: Work) -> list[Tensor]:
    """The base linear after attention in every format, logits, and rows of it as a table."""
    (n_in, (n_out,)), outputs = work.shape.sites()[Site.O], []
    x, ids = _randn(ops, work, work.tokens, n_in), torch.arange(work.tokens, device=ops.device)
    for form in FORMATS:
        weight = ops.pack_parts([_codes(ops, form, n_out, n_in)], work.dtype, Activations.EXACT)
        outputs += [ops.linear(x, weight), ops.logits(x, weight), ops.embed(ids, weight, None)]
    return [*outputs, ops.embed(ids, weight, 2.0)]


def _codes(ops: Backend, form: WeightFormat, out: int, columns: int) -> QuantizedWeight:
    """A weight of zeros: what compiles and moves is the same."""
    signed = form.bits == 8

    def numbers() -> GroupScales:
        shape = (out, form.groups(columns))
        if form.scale_bits == 8:
            span = 256 // (form.group or 256)
            shared = torch.zeros(out, shape[1] // span, dtype=torch.float16, device=ops.device)
            return GroupScales(shared, torch.zeros(shape, dtype=torch.int8, device=ops.device), span)
        kind = torch.float16 if form.scale_bits == 16 else torch.float32
        return GroupScales(torch.zeros(shape, dtype=kind, device=ops.device))

    codes = torch.zeros(out, columns, dtype=torch.int8 if signed else torch.uint8, device=ops.device)
    return QuantizedWeight(form, codes, numbers(), numbers() if form.has_offset else None)


def run_sampling(ops: Backend, work: Work) -> list[Tensor]:
    """argmax and sample of a row of logits for every token."""
    logits = _randn(ops, work, work.tokens, 5000).float() * 4
    kinds = [(0.0, 0, 1.0, 0.0, 0.5), (1.0, 0, 1.0, 0.0, 0.2), (0.7, 40, 0.9, 0.0, 0.6), (1.3, 0, 0.8, 0.05, 0.99)]
    columns = zip(*(kinds[i % len(kinds)] for i in range(work.tokens)), strict=True)
    temperature, top_k, top_p, min_p, uniform = (list(column) for column in columns)
    return [ops.argmax(logits), *ops.sample(logits, temperature, [int(k) for k in top_k], top_p, min_p, uniform)]


def run_all(ops: Backend, work: Work) -> list[Tensor]:
    """Every op but the base linears, which are a library's unless batch invariance is asked for."""
    rows = [*run_attention(ops, work), *run_rowwise(ops, work), *run_own(ops, work), *run_turned(ops, work)]
    return [*run_adapters(ops, work), *run_blocks(ops, work), *rows]


def _randn(ops: Backend, work: Work, *shape: int, seed: int = 0) -> Tensor:
    if (*shape, seed) not in work.inputs:
        drawn = _normal(math.prod(shape), torch.Generator().manual_seed(seed)).view(shape)
        work.inputs[*shape, seed] = drawn.to(ops.device, work.dtype)
    return work.inputs[*shape, seed]


def _normal(count: int, generator: torch.Generator) -> Tensor:
    """[count] fp32. Long ones repeat themselves: drawing the weights of Phi-3-mini would take longer than all ops."""
    drawn = torch.randn(min(count, PERIOD), generator=generator)
    return drawn if count <= PERIOD else drawn.repeat(-(-count // PERIOD))[:count]
