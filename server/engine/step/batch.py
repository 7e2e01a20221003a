"""StepPlan -> ForwardBatch: rows put in the order the ops want, tables laid out, all integers moved at once.

rows    | adapter decode, equal mixes adjacent | adapter prefill, alike | base decode | base prefill |
segments|   s0   |   s1   |        s2          |   s3   |      s4       |  none: base tokens cost nothing

Plain lists and two tensors that are cut up: a step has streamed all weights through the caches, so that each library
function used here is read from memory anew; with a tensor and some NumPy for each array it took twice as long.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListLike
from itertools import accumulate, groupby

import torch
from torch import Tensor

from loraplex.kernels.records import AdapterSegments, AttentionMeta, KVGroup, TileTable
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.plan import PlanEntry, StepPlan
from loraplex.server.models.inputs import ForwardBatch

Mix = tuple[tuple[int, float], ...]  # ((slot, weight), ...), in the order of the adapters' digests

Shape = tuple[int, ...]

ALIGN = 16
"""Bytes at which every tensor starts: what a GPU kernel is compiled for depends on it."""


class Kept:
    """On the CPU the tensors of the last batch, for the next one where all its arrays have the same sizes.

    A decode step mostly has those of the one before it: it then costs a copy, and no call of torch.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[list[Shape], array[int], list[Tensor]]] = {}

    def tensors(self, values: array[int], shapes: list[Shape], cut: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Tensors of these shapes that hold `values`: the last ones of this type, or what `cut` makes."""
        last = self._last.get(values.typecode)
        if last is not None and last[0] == shapes:
            last[1][:] = values
            return last[2]
        made = cut()
        self._last[values.typecode] = shapes, values, made
        return made


def build_batch(
    plan: StepPlan,
    kv: KVCache,
    tiles: TileTable,
    slot_of: Callable[[str], int | None],
    device: torch.device,
    kept: Kept | None = None,
    steps: int = 1,
) -> ForwardBatch:
    """The tensors of one step, or of several of decode rows, whose tokens after the first are not known yet.

    The plan's sequences have their pages and their adapters are on the device.

    With `kept` a batch holds until the next one is built.

    logit_rows is in the order of the plan's sampling entries, whatever the order of the rows; behind them come the
    entries' prompt_rows, in the plan's order too.
    """
    mixes = [_mix(entry, slot_of) for entry in plan.entries]
    # Stable, so equal mixes keep the plan's order. Digests would sort as well as slots; slots are shorter.
    order = sorted(range(len(mixes)), key=lambda i: (not mixes[i], not plan.entries[i].is_decode, mixes[i]))
    entries = [plan.entries[i] for i in order]
    bounds = (0, *accumulate(entry.num_tokens for entry in entries))
    start_of = dict(zip(order, bounds, strict=False))  # of the plan's entries
    logit_rows = [start_of[i] + entry.num_tokens - 1 for i, entry in enumerate(plan.entries) if entry.samples]
    logit_rows += [start_of[i] + row for i, entry in enumerate(plan.entries) for row in entry.prompt_rows]
    ahead = range(steps)
    kv_lens = tuple(entry.seq.num_computed + entry.num_tokens + step for step in ahead for entry in entries)
    tables = [kv.tables(entry.seq.number) for entry in entries]
    most = max(len(table[0]) for table in tables)  # a sequence's tables are of one length in all groups

    longs, ints = _Packer("q", torch.int64), _Packer("i", torch.int32)
    ids = _input_ids(entries)
    longs.add(ids + [0] * (len(ids) * (steps - 1)))
    longs.add(position for step in ahead for position in _positions(entries, step))
    longs.add(logit_rows)
    ints.add(bounds)
    ints.add(kv_lens)
    for group in range(len(kv.groups)):
        own = [table[group] for table in tables]
        longs.add(index for step in ahead for index in _store_index(entries, own, kv.block_size, step))
        pages = (page for table in tables for page in (*table[group], *(-1,) * (most - len(table[group]))))
        ints.add(pages, (len(entries), most))
    segments = _Segments([(entry, mixes[i]) for entry, i in zip(entries, order, strict=True)])
    segments.pack(ints)
    input_ids, positions, logits, *stores = longs.tensors(device, kept)
    query_ptr, lens, *rest = ints.tensors(device, kept)
    return ForwardBatch(
        input_ids=input_ids,
        positions=positions,
        rope_lens=tuple(entry.seq.num_tokens + step for step in ahead for entry in entries),
        attention=AttentionMeta(
            query_ptr=query_ptr,
            kv_lens=lens,
            query_bounds=bounds if steps == 1 else tuple(range(len(kv_lens) + 1)),
            kv_lens_host=kv_lens,
            is_decode=tuple(entry.is_decode for entry in entries) * steps,
            groups=tuple(KVGroup(table, store) for table, store in zip(rest, stores, strict=False)),
        ),
        adapters=segments.unpack(rest[len(stores) :]),
        tiles=tiles,
        logit_rows=logits,
        steps=steps,
    )


class _Packer:
    """Arrays of one type in one buffer, which becomes one tensor on the device."""

    def __init__(self, code: str, dtype: torch.dtype) -> None:
        self._values = array(code)
        self._dtype = dtype
        self._sizes: list[int] = []  # of an array, of the padding behind it, and so on
        self._shapes: list[Shape] = []

    def add(self, values: Iterable[int], shape: Shape | None = None) -> None:
        start, each = len(self._values), ALIGN // self._values.itemsize
        self._values.extend(values)
        count = len(self._values) - start
        padding = -count % each
        self._values.extend((0,) * padding)
        self._sizes += (count, padding)
        self._shapes.append(shape or (count,))

    def tensors(self, device: torch.device, kept: Kept | None) -> list[Tensor]:
        """In the order in which they were added; they share memory."""
        if kept is not None and device.type == "cpu":
            return kept.tensors(self._values, self._shapes, lambda: self._cut(device))
        return self._cut(device)

    def _cut(self, device: torch.device) -> list[Tensor]:
        packed = torch.frombuffer(self._values, dtype=self._dtype)
        if device.type != "cpu":
            packed = packed.to(device)
        parts = packed.split_with_sizes(self._sizes)[::2]
        return [part if len(shape) == 1 else part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class _Segments:
    """Neighbours of equal mix and role; base rows come last and have none."""

    def __init__(self, rows: ListLike[tuple[PlanEntry, Mix]]) -> None:
        bounds, mixes, decode = [0], [], 0
        for (is_decode, mix), members in groupby(rows, key=lambda row: (row[0].is_decode, row[1])):
            if not mix:
                break
            bounds.append(bounds[-1] + sum(entry.num_tokens for entry, _ in members))
            mixes.append(mix)
            decode += is_decode
        self._bounds, self._mixes, self._decode = tuple(bounds), tuple(mixes), decode

    def pack(self, ints: _Packer) -> None:
        if self._mixes:
            ints.add(self._bounds)
            ints.add(accumulate((len(mix) for mix in self._mixes), initial=0))
            ints.add(slot for mix in self._mixes for slot, _ in mix)
            weights = array("f", (weight for mix in self._mixes for _, weight in mix))
            ints.add(memoryview(weights).cast("B").cast("i"))

    def unpack(self, tensors: ListLike[Tensor]) -> AdapterSegments | None:
        """None when nobody wears an adapter."""
        if not self._mixes:
            return None
        indptr, mix_ptr, mix_slot, weights = tensors
        return AdapterSegments(
            indptr=indptr,
            mix_ptr=mix_ptr,
            mix_slot=mix_slot,
            mix_weight=weights.view(torch.float32),
            bounds=self._bounds,
            mixes=self._mixes,
            num_decode_segments=self._decode,
        )


def _mix(entry: PlanEntry, slot_of: Callable[[str], int | None]) -> Mix:
    mix = []
    for digest, weight in entry.seq.mix:
        slot = slot_of(digest)
        assert slot is not None, f"{entry.seq!r} is planned, but its adapter {digest[:12]} is not on the device"
        mix.append((slot, weight))
    return tuple(mix)


def _input_ids(entries: ListLike[PlanEntry]) -> list[int]:
    ids: list[int] = []
    for entry in entries:
        start = entry.seq.num_computed
        ids += entry.seq.tokens[start : start + entry.num_tokens]
    assert len(ids) == sum(entry.num_tokens for entry in entries)
    return ids


def _positions(entries: ListLike[PlanEntry], step: int) -> list[int]:
    positions: list[int] = []
    for entry in entries:
        start = entry.seq.num_computed + step
        positions += range(start, start + entry.num_tokens)
    return positions


def _store_index(entries: ListLike[PlanEntry], tables: ListLike[array[int]], block_size: int, step: int) -> list[int]:
    """Of each token page * block_size + offset."""
    index: list[int] = []
    for entry, table in zip(entries, tables, strict=True):
        position = entry.seq.num_computed + step
        end = position + entry.num_tokens
        while position < end:
            block, offset = divmod(position, block_size)
            page, count = table[block], min(block_size - offset, end - position)
            assert page >= 0, f"{entry.seq!r} has no page for token {position}"
            index += range(page * block_size + offset, page * block_size + offset + count)
            position += count
    return index
