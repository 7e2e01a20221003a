"""The tensors of a step against the same built token by token in plain Python."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.front import Front
from loraplex.adapters.positions import Positions
from loraplex.kernels.records import TileTable
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.kv_groups import GroupSpec
from loraplex.server.engine.policy.plan import StepPlan
from loraplex.server.engine.policy.rows import RowFront
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.step.batch import Kept, build_batch
from loraplex.server.models.inputs import ForwardBatch
from tests.support.scheduling import Requests, draws, make_scheduler

CPU = torch.device("cpu")
GROUPS = (GroupSpec((0, 1), None), GroupSpec((2,), 6))
ADAPTERS = ("a", "b", "c", "d")
EMPTY = torch.zeros(0, dtype=torch.int32)
TILES = TileTable(EMPTY, EMPTY, EMPTY, EMPTY)


Rows = list[tuple[Sequence, int]]  # with the tokens it has in the step


INVOCATION = (7, 8)
"""Of the adapter "c": prompts are 1, 2, 3, ..."""

BEFORE = INVOCATION[0] - 1

FIRST = Positions(3, 0)
"""Of the adapter "d"."""


def worn(seq: Sequence, position: int) -> list[tuple[str, float]]:
    """What of its mix acts at a position."""
    called = seq.num_prompt > INVOCATION[1] - 1
    late = position < BEFORE or not called
    idle = {"digest-c"} if late else set()
    idle |= {"digest-d"} if position >= min(FIRST.first, seq.num_prompt) else set()
    return [(digest, weight) for digest, weight in seq.mix if digest not in idle]


def wears(seq: Sequence, count: int) -> bool:
    """Whether some of its next tokens wear an adapter."""
    return any(worn(seq, seq.num_computed + at) for at in range(count))


def rows_by_hand(plan: StepPlan, slot_of: dict[str, int]) -> Rows:
    """In the order of the batch, from what the scheduler knows."""

    def mix(row: tuple[Sequence, int]) -> list[tuple[int, float]]:
        """Of the row's last token."""
        seq, count = row
        return [(slot_of[digest], weight) for digest, weight in worn(seq, seq.num_computed + count - 1)]

    planned = [(seq, len(row.tokens)) for seq, row in zip(plan.seqs, plan.step.rows, strict=True)]
    rows: Rows = []
    for wearing in (True, False):
        for decode in (True, False):
            bucket = [row for row in planned if wears(*row) == wearing and row[0].is_decode == decode]
            rows += sorted(bucket, key=mix)
    return rows


def check(batch: ForwardBatch, plan: StepPlan, kv: KVCache, slot_of: dict[str, int]) -> None:
    rows = rows_by_hand(plan, slot_of)
    ids, positions, owners, is_last = [], [], [], []
    for number, (seq, count) in enumerate(rows):
        for offset in range(count):
            position = seq.num_computed + offset
            ids.append(seq.tokens[position])
            positions.append(position)
            owners.append(number)
            is_last.append(offset == count - 1)
    assert batch.input_ids.tolist() == ids
    assert batch.positions.tolist() == positions
    assert batch.input_ids.dtype == batch.positions.dtype == torch.int64
    assert batch.rope_lens == tuple(len(seq.tokens) for seq, _ in rows)

    meta = batch.attention
    bounds = [owners.index(row) for row in range(len(rows))] + [len(ids)]
    assert meta.query_bounds == tuple(meta.query_ptr.tolist()) == tuple(bounds)
    lens = [seq.num_computed + count for seq, count in rows]
    assert meta.kv_lens_host == tuple(meta.kv_lens.tolist()) == tuple(lens)
    assert meta.is_decode == tuple(seq.is_decode for seq, _ in rows)
    assert len(meta.groups) == len(kv.groups)
    for index, group in enumerate(meta.groups):
        for row, (seq, _) in enumerate(rows):
            pages = list(kv.tables(seq.number)[index])
            found = group.block_table[row].tolist()
            assert found[: len(pages)] == pages
            assert set(found[len(pages) :]) <= {-1}
        store = [
            kv.tables(rows[row][0].number)[index][position // kv.block_size] * kv.block_size + position % kv.block_size
            for row, position in zip(owners, positions, strict=True)
        ]
        assert group.store_index.tolist() == store
        assert len(set(store)) == len(store), "two tokens in one place"
        assert (group.block_table.dtype, group.store_index.dtype) == (torch.int32, torch.int64)

    last_of = {rows[row][0]: token for token, row in enumerate(owners) if is_last[token]}
    counts = dict(rows)
    drawing = [seq for seq in plan.seqs if counts[seq] == seq.num_missing]  # in the plan's order
    assert batch.logit_rows.tolist() == [last_of[seq] for seq in drawing]
    check_segments(batch, rows, slot_of, owners)


def check_segments(batch: ForwardBatch, rows: Rows, slot_of: dict[str, int], owners: list[int]) -> None:
    wearing = sum(count for seq, count in rows if wears(seq, count))
    if not wearing:
        assert batch.adapters is None
        return
    segments = batch.adapters
    assert segments is not None
    assert segments.bounds[0] == 0
    assert segments.bounds[-1] == wearing
    assert segments.bounds == tuple(segments.indptr.tolist())
    kinds = []
    for s, mix in enumerate(segments.mixes):
        start, stop = segments.bounds[s], segments.bounds[s + 1]
        assert stop > start
        kinds.append((s < segments.num_decode_segments, mix))
        for token in range(start, stop):
            seq, _ = rows[owners[token]]
            acting = worn(seq, int(batch.positions[token]))
            assert mix == tuple((slot_of[digest], weight) for digest, weight in acting)
            assert seq.is_decode == (s < segments.num_decode_segments)
        first, last = segments.mix_ptr[s].item(), segments.mix_ptr[s + 1].item()
        on_device = zip(segments.mix_slot[first:last].tolist(), segments.mix_weight[first:last].tolist(), strict=True)
        assert tuple(on_device) == mix
    assert all(kind != after for kind, after in pairwise(kinds)), "neighbours of equal mix and role are one segment"
    if not any({"digest-c", "digest-d"} & dict(seq.mix).keys() for seq, _ in rows):
        assert len(set(kinds)) == len(kinds), "equal mixes of equal role are one segment"
    assert segments.mix_ptr[-1].item() == len(segments.mix_slot)
    assert segments.indptr.dtype == segments.mix_ptr.dtype == segments.mix_slot.dtype == torch.int32
    assert segments.mix_weight.dtype == torch.float32


REQUEST = st.tuples(
    st.integers(1, 25), st.integers(1, 12), st.lists(st.sampled_from(ADAPTERS), max_size=2, unique=True)
)


@settings(max_examples=60)
@given(st.lists(REQUEST, min_size=1, max_size=10), st.integers(3, 40))
def test_every_step_of_random_histories(wanted: list[tuple[int, int, list[str]]], budget: int) -> None:
    scheduler, placement = make_scheduler(60, groups=GROUPS, token_budget=budget, max_num_seqs=6)
    requests = Requests()
    for name in ADAPTERS:
        positions = FIRST if name == "d" else None
        requests.adapter(name, invocation=INVOCATION if name == "c" else (), positions=positions)
    for index, (prompt, max_tokens, adapters) in enumerate(wanted):
        request = requests.make(prompt, max_tokens, *adapters)
        weighted = tuple((lease, 0.25 * (place + index % 2 + 1)) for place, (lease, _) in enumerate(request.mix))
        request = replace(request, mix=weighted)
        scheduler.add(request)
    kept = Kept()
    while scheduler.num_open:
        plan = scheduler.schedule()
        slot_of = placement.slots
        for each in (None, kept):
            check(build_batch(plan.step, TILES, scheduler.kv.block_size, CPU, each), plan, scheduler.kv, slot_of)
        scheduler.commit(plan, draws(plan.step))


def test_a_step_of_the_same_sizes_makes_no_tensors() -> None:
    scheduler, _ = make_scheduler(60, token_budget=16)
    requests, kept, addresses = Requests(), Kept(), list[int]()
    requests.adapter("a")
    for adapters in ((), ("a",)):
        scheduler.add(requests.make(4, 20, *adapters))
    for _ in range(6):  # blocks of 4: the prompts, the second block, the first token of the third
        plan = scheduler.schedule()
        batch = build_batch(plan.step, TILES, scheduler.kv.block_size, CPU, kept)
        addresses.append(batch.attention.groups[0].block_table.data_ptr())
        scheduler.commit(plan, draws(plan.step))
    assert scheduler.kv.block_size == 4
    assert len(set(addresses[1:5])) == 1
    assert addresses[5] != addresses[4]


def test_an_invocation_cuts_a_chunk_in_two() -> None:
    """Between two of the plain adapter's rows: what is before the invocation wears nothing, or the plain one alone."""
    scheduler, placement = make_scheduler(60, token_budget=60)
    requests = Requests()
    requests.adapter("a")
    requests.adapter("c", invocation=INVOCATION)
    for prompt, adapters in ((10, ("c",)), (5, ("c",)), (3, ("a",)), (9, ("a", "c"))):
        scheduler.add(requests.make(prompt, 9, *adapters))
    batch = build_batch(scheduler.schedule().step, TILES, scheduler.kv.block_size, CPU)
    assert batch.adapters is not None
    a, c = ((placement.slots[f"digest-{name}"], 1.0) for name in "ac")
    assert (a[0], c[0]) == (1, 0)
    # c: 6 tokens before it and 4; a: 3, and 6 of the pair's, then 3. The prompt of 5 tokens has none and is the base's.
    assert batch.adapters.mixes == ((), (c,), (a,), (a, c))
    assert batch.adapters.bounds == (0, 6, 10, 19, 22)


def test_virtual_tokens_point_to_rows_of_the_steps_own() -> None:
    """Two sequences of one adapter and one of another; those whose keys are stored have none in the step."""
    scheduler, placement = make_scheduler(60, token_budget=30)
    requests = Requests()
    requests.adapter("a", front=Front(3, stored=False, width=2))
    requests.adapter("b", front=Front(6, stored=False, width=2))
    requests.adapter("c", front=Front(4, stored=True, width=2))
    for adapters in (("a",), (), ("b",), ("c",), ("a",)):
        scheduler.add(requests.make(2, 9, *adapters))
    asked: list[RowFront] = []

    def own(fronts: ListLike[RowFront]) -> torch.Tensor:
        asked.extend(fronts)
        return torch.arange(24.0).view(12, 2)

    plan = scheduler.schedule()
    batch = build_batch(plan.step, TILES, scheduler.kv.block_size, CPU, own=own)
    assert batch.adapters is None, "nothing is added to a linear"
    assert batch.input_ids.tolist() == [
        *(-1, -2, -3, 1, 2),
        *(1, 2),
        *(-4, -5, -6, -7, -8, -9, 1, 2),
        *(1, 2),
        *(-10, -11, -12, 1, 2),
    ]
    assert batch.positions.tolist() == [*range(5), *range(2), *range(8), 4, 5, *range(5)]
    a, b = placement.slots["digest-a"], placement.slots["digest-b"]
    assert [(front.slot, front.first, front.end) for front in asked] == [(a, 0, 3), (b, 0, 6), (a, 0, 3)]
    assert batch.own is not None
    assert batch.own.shape == (12, 2)
    scheduler.commit(plan, draws(plan.step))
    assert build_batch(scheduler.schedule().step, TILES, scheduler.kv.block_size, CPU, own=own).own is None


def test_an_example_by_hand() -> None:
    scheduler, _ = make_scheduler(60, token_budget=16)
    requests = Requests()
    requests.adapter("a")
    requests.adapter("b")
    for adapters in ((), ("b",), ("a",), ("b",)):
        scheduler.add(requests.make(2, 9, *adapters))
    plan = scheduler.schedule()
    scheduler.commit(plan, draws(plan.step))
    scheduler.add(requests.make(3, 9, "a"))
    scheduler.add(requests.make(30, 9))
    plan = scheduler.schedule()
    batch = build_batch(plan.step, TILES, scheduler.kv.block_size, CPU)
    assert batch.adapters is not None
    # decode: b (two sequences), a; prefill: a (3 tokens). The base's decode row and 9 prompt tokens come after.
    assert batch.adapters.mixes == (((0, 1.0),), ((1, 1.0),), ((1, 1.0),))
    assert batch.adapters.bounds == (0, 2, 3, 6)
    assert batch.adapters.num_decode_segments == 2
    assert batch.attention.query_bounds == (0, 1, 2, 3, 6, 7, 16)
    assert batch.positions.tolist() == [2, 2, 2, 0, 1, 2, 2, *range(9)]
    assert batch.logit_rows.tolist() == [6, 0, 2, 1, 5]  # requests 1 to 5; the sixth has more prompt to come
