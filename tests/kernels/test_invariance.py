"""Bits of a row never depend on the rows beside it, on how a prefill is cut into chunks, nor on the number of threads.

The oracle is the row computed alone by one thread. Over every instruction set of the CPU backend; what the results are
worth is asked elsewhere.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from loraplex.adapters.image.tiles import BaseLayout, LowRank, OutputScale, Part
from loraplex.adapters.image.writing import pack
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.adapters.tiers.pages import PagePool
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.kernels.cpu import abi
from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.quantized import Activations
from loraplex.kernels.records import (
    AdapterSegments,
    AdapterStep,
    AttentionMeta,
    AttentionParams,
    KVGroup,
    KVLayer,
    Projection,
    element_bytes,
)
from tests.support.quantized import FORMATS, random_weight

ISAS = [isa for isa in abi.ISAS if abi.library().loraplex_isa(isa.encode()) >= 0]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HIDDEN = (576, 640, 896, 4096)

pytestmark = [pytest.mark.parametrize("isa", ISAS), pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)]


def teams(isa: str) -> list[CpuBackend]:
    return [CpuBackend(isa, threads) for threads in (1, 2, 3)]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_linear(isa: str, dtype: torch.dtype, hidden: int) -> None:
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn(80, hidden, generator=generator).to(dtype)
    w = torch.randn(328, hidden, generator=generator).to(dtype)  # five panels and half a vector
    single, *others = teams(isa)
    packed = single.pack_linear(w)
    alone = torch.cat([single.linear(row, packed) for row in x.split(1)])
    logits = torch.cat([single.logits(row, packed) for row in x.split(1)])
    assert len({tuple(row) for row in alone.tolist()}) == len(x)
    for ops in (single, *others):
        for rows in (1, 2, 3, 5, 6, 7, 8, 16, 17, 31, 32, 33, 37, 48, 64, 65, 80):
            assert torch.equal(ops.linear(x[:rows], packed), alone[:rows]), f"{rows} rows, {ops.team.threads} threads"
        assert torch.equal(ops.logits(x, packed), logits)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("activations", Activations)
def test_quantised_linear(isa: str, dtype: torch.dtype, name: str, activations: Activations) -> None:
    weight = random_weight(name, 328, 768)
    x = torch.randn(150, 768, generator=torch.Generator().manual_seed(4)).to(dtype)
    single, *others = teams(isa)
    packed = single.pack_parts([weight], dtype, activations)
    alone = torch.cat([single.linear(row, packed) for row in x.split(1)])
    assert len({tuple(row) for row in alone.tolist()}) == len(x)
    for ops in (single, *others):
        for rows in (1, 2, 3, 5, 6, 8, 9, 16, 31, 37, 80, 150):
            assert torch.equal(ops.linear(x[:rows], packed), alone[:rows]), f"{rows} rows, {ops.team.threads} threads"


# ---- adapters -------------------------------------------------------------------------------------------------------

RANKS = (16, 8, 33, 1, 256)
SCALED = len(RANKS)
"""Index of the adapter with a scale."""

Segment = tuple[int, tuple[tuple[int, float], ...]]  # tokens, mix


class _Adapters:
    """One adapter of each of RANKS on a site of two projections, then one that scales the second of them too."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        outs = (hidden, 136)
        self.width = sum(outs)
        projections = tuple(
            Projection(name, 0, hidden, start, out, False)
            for name, start, out in zip("qk", (0, hidden), outs, strict=True)
        )
        page = -(-hidden * element_bytes(dtype) * 40 // 64) * 64  # several to an adapter: B is cut
        layout = BaseLayout("base", 1, projections, page, dtype)
        generator = torch.Generator().manual_seed(hidden)
        images = []
        for index, rank in enumerate((*RANKS, 4)):
            parts: list[Part] = [
                LowRank(
                    0,
                    p,
                    torch.randn(rank, hidden, generator=generator) * hidden**-0.5,
                    torch.randn(p.out_features, rank, generator=generator),
                    1.0,
                )
                for p in projections
            ]
            if index == SCALED:
                parts.append(OutputScale(0, projections[1], torch.randn(outs[1], generator=generator)))
            images.append(pack(parts, layout))
        pages = sum(len(image.pages) for image in images)
        self.arena = torch.zeros(pages, page, dtype=torch.uint8)
        residency = DeviceTier(self.arena, PagePool(pages), layout)
        self.slots = []
        for index, image in enumerate(images):
            assert residency.load(str(index), image)
            slot = residency.slot_of(str(index))
            assert slot is not None
            self.slots.append(slot)
        self.table = residency.table

    def one(self, index: int) -> tuple[tuple[int, float], ...]:
        return ((self.slots[index], 1.0),)

    def add(self, ops: CpuBackend, y: Tensor, x: Tensor, segments: list[Segment], decode: int) -> Tensor:
        bounds, mixes = [0], []
        for tokens, mix in segments:
            bounds.append(bounds[-1] + tokens)
            mixes.append(mix)
        ends = [0]
        for mix in mixes:
            ends.append(ends[-1] + len(mix))
        meta = AdapterSegments(
            indptr=torch.tensor(bounds, dtype=torch.int32),
            mix_ptr=torch.tensor(ends, dtype=torch.int32),
            mix_slot=torch.tensor([slot for mix in mixes for slot, _ in mix], dtype=torch.int32),
            mix_weight=torch.tensor([weight for mix in mixes for _, weight in mix]),
            bounds=tuple(bounds),
            mixes=tuple(mixes),
            num_decode_segments=decode,
        )
        return ops.adapter_add_(y.clone(), x, 0, 0, AdapterStep(self.arena, self.table, meta))


@pytest.mark.parametrize("hidden", HIDDEN)
def test_decode_rows_of_adapters(isa: str, dtype: torch.dtype, hidden: int) -> None:
    """Rows of all ranks, of one adapter together, and of a mix; then in another order."""
    adapters = _Adapters(hidden, dtype)
    mix = ((adapters.slots[1], 0.5), (adapters.slots[4], -1.25), (adapters.slots[SCALED], 0.75))
    segments = [(3, adapters.one(0)), *((1, adapters.one(index)) for index in range(1, SCALED + 1)), (2, mix)]
    wearing = [mix for tokens, mix in segments for _ in range(tokens)]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(wearing) + 1, hidden, generator=generator).to(dtype)  # the last wears none
    y = torch.randn(len(wearing) + 1, adapters.width, generator=generator).to(dtype)
    single = CpuBackend(isa, 1)
    rows = [
        adapters.add(single, y[i : i + 1], x[i : i + 1], [(1, worn)] if worn else [], bool(worn))
        for i, worn in enumerate([*wearing, ()])
    ]
    alone = torch.cat(rows)
    assert not torch.equal(alone, y)
    back = list(range(len(wearing)))[::-1]
    for ops in teams(isa):
        assert torch.equal(adapters.add(ops, y, x, segments, len(segments)), alone)
        found = adapters.add(ops, y[back], x[back], [(1, wearing[i]) for i in back], len(back))
        assert torch.equal(found, alone[back])


@pytest.mark.parametrize("hidden", HIDDEN)
def test_prefill_rows_of_adapters(isa: str, dtype: torch.dtype, hidden: int) -> None:
    """70 tokens in one chunk, in chunks of any size, beside decode rows and another adapter's chunk."""
    adapters = _Adapters(hidden, dtype)
    tokens = 70
    scaled = ((adapters.slots[2], 0.75), (adapters.slots[SCALED], -0.5))
    mixes = [adapters.one(4), ((adapters.slots[2], 0.75), (adapters.slots[1], 1.0)), adapters.one(SCALED), scaled]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    y = torch.randn(tokens, adapters.width, generator=generator).to(dtype)
    single, *others = teams(isa)
    for mix in mixes:
        alone = torch.cat(
            [adapters.add(single, y[i : i + 1], x[i : i + 1], [(1, mix)], 0) for i in range(0, tokens, 7)]
        )
        for ops in (single, *others):
            whole = adapters.add(ops, y, x, [(tokens, mix)], 0)
            assert torch.equal(whole[::7], alone)
            cuts = [0, 1, 6, 19, 64, tokens]
            chunks = [adapters.add(ops, y[a:b], x[a:b], [(b - a, mix)], 0) for a, b in pairwise(cuts)]
            assert torch.equal(torch.cat(chunks), whole)
            beside = [(1, adapters.one(1)), (9, adapters.one(3)), (tokens - 10, mix)]
            assert torch.equal(adapters.add(ops, y, x, beside, 1)[10:], whole[10:])


# ---- attention ------------------------------------------------------------------------------------------------------


class _Cache:
    """One sequence's keys and values of one layer, in pages in reverse order."""

    def __init__(self, params: AttentionParams, length: int, dtype: torch.dtype) -> None:
        self.params = params
        blocks = -(-length // BLOCK_SIZE)
        generator = torch.Generator().manual_seed(3)
        shape = (blocks, params.num_kv_heads, BLOCK_SIZE, params.head_dim)
        k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        self.layer = KVLayer(k, v, 0)
        self.table = torch.arange(blocks, dtype=torch.int32).flip(0)
        self.q = torch.randn(length, params.num_heads, params.head_dim, generator=generator).to(dtype)

    def attend(self, ops: CpuBackend, chunks: list[tuple[int, int]]) -> list[Tensor]:
        """Queries at positions [first, last) per chunk, each as a sequence of its own in one step."""
        bounds = [0]
        for first, last in chunks:
            bounds.append(bounds[-1] + last - first)
        lens = [last for _, last in chunks]
        meta = AttentionMeta(
            query_ptr=torch.tensor(bounds, dtype=torch.int32),
            kv_lens=torch.tensor(lens, dtype=torch.int32),
            query_bounds=tuple(bounds),
            kv_lens_host=tuple(lens),
            is_decode=tuple(last - first == 1 for first, last in chunks),
            groups=(KVGroup(self.table.expand(len(chunks), -1).contiguous(), torch.zeros(0, dtype=torch.int64)),),
        )
        q = torch.cat([self.q[first:last] for first, last in chunks])
        out = ops.attention(q, self.layer, meta, self.params)
        return list(out.split([last - first for first, last in chunks]))


HEADS = [(1, 1, 64), (4, 2, 64), (3, 1, 96), (8, 2, 128), (7, 1, 64), (2, 1, 256)]  # groups of 1, 2, 3, 4, 7


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("window", [None, 21])
def test_attention(isa: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int | None) -> None:
    length = 100
    cache = _Cache(AttentionParams(heads, kv_heads, head_dim, head_dim**-0.5, window, None), length, dtype)
    single, *others = teams(isa)
    alone = torch.cat([cache.attend(single, [(at, at + 1)])[0] for at in range(length)])
    for ops in (single, *others):
        for size in (1, 5, 8, 64, length):
            chunks = [(first, min(first + size, length)) for first in range(0, length, size)]
            assert torch.equal(torch.cat(cache.attend(ops, chunks)), alone), (
                f"chunks of {size}, {ops.team.threads} threads"
            )
        uneven = [(90, 100), (3, 4), (99, 100), (0, 40)]
        for (first, last), found in zip(uneven, cache.attend(ops, uneven), strict=True):
            assert torch.equal(found, alone[first:last])


@pytest.mark.parametrize("window", [None, 700])
def test_attention_whose_ranges_of_keys_are_shared(isa: str, dtype: torch.dtype, window: int | None) -> None:
    """A few long rows are cut at every 512 keys where threads are short of work; on one thread, or among many, not."""
    length = 1300
    cache = _Cache(AttentionParams(3, 1, 64, 0.125, window, None), length, dtype)
    single, *others = teams(isa)
    places = (0, 511, 512, 513, 700, 1023, 1024, 1211, 1212, 1299)
    alone = [cache.attend(single, [(at, at + 1)])[0] for at in places]
    for ops in others:
        for at, expected in zip(places, alone, strict=True):
            assert torch.equal(cache.attend(ops, [(at, at + 1)])[0], expected), f"{at}, {ops.team.threads} threads"
        for found, expected in zip(cache.attend(ops, [(at, at + 1) for at in places[2:]]), alone[2:], strict=True):
            assert torch.equal(found, expected)
        few = [(1290, 1297), (1020, 1028), (600, 601)]  # of the same chunks as a prompt's, whole or in parts
        for (first, last), found in zip(few, cache.attend(ops, few), strict=True):
            assert torch.equal(found, torch.cat([cache.attend(single, [(at, at + 1)])[0] for at in range(first, last)]))
        prompt = cache.attend(ops, [(0, length)])[0]
        for at, expected in zip(places, alone, strict=True):
            assert torch.equal(prompt[at : at + 1], expected)
