"""StepInput -> ForwardBatch: rows put in the order the ops want, tables laid out, all integers moved at once.

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
from loraplex.server.engine.policy.rows import Mix, Row, RowFront, StepInput
from loraplex.server.models.inputs import ForwardBatch

Shape = tuple[int, ...]

OwnEmbeddings = Callable[[ListLike[RowFront]], Tensor]
"""Makes the embeddings [E, H] of the virtual tokens of several rows, one after the other."""

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
    step: StepInput,
    tiles: TileTable,
    block_size: int,
    device: torch.device,
    kept: Kept | None = None,
    steps: int = 1,
    own: OwnEmbeddings | None = None,
) -> ForwardBatch:
    """The tensors of one step, or of several of decode rows, whose tokens after the first are not known yet.

    With `kept` a batch holds until the next one is built. own: where virtual tokens' embeddings come from.

    logit_rows is in the order of the step's rows that draw, whatever the order in the batch; behind them come the
    hidden states that rows want, in the step's order too.
    """
    # Stable, so equal mixes keep the step's order. Digests would sort as well as slots; slots are shorter.
    order = sorted(range(len(step.rows)), key=lambda i: _place(step.rows[i]))
    rows = [step.rows[i] for i in order]
    bounds = (0, *accumulate(len(row.tokens) for row in rows))
    start_of = dict(zip(order, bounds, strict=False))  # of the step's rows
    logit_rows = [start_of[i] + len(row.tokens) - 1 for i, row in enumerate(step.rows) if row.draws]
    logit_rows += [
        start_of[i] + at for i, row in enumerate(step.rows) if row.want is not None for at in row.want.tokens
    ]
    ahead = range(steps)
    kv_lens = tuple(row.start + len(row.tokens) + later for later in ahead for row in rows)
    tables = [row.tables for row in rows]
    most = max(len(table[0]) for table in tables)  # a sequence's tables are of one length in all groups

    longs, ints = _Packer("q", torch.int64), _Packer("i", torch.int32)
    ids, fronts = _ids(rows)
    longs.add(ids + [0] * (len(ids) * (steps - 1)))
    longs.add(position for later in ahead for position in _positions(rows, later))
    longs.add(logit_rows)
    ints.add(bounds)
    ints.add(kv_lens)
    for group in range(len(tables[0])):
        longs.add(index for later in ahead for index in _store_index(rows, group, block_size, later))
        pages = (page for table in tables for page in (*table[group], *(-1,) * (most - len(table[group]))))
        ints.add(pages, (len(rows), most))
    segments = _Segments(rows)
    segments.pack(ints)
    input_ids, positions, logits, *stores = longs.tensors(device, kept)
    query_ptr, lens, *rest = ints.tensors(device, kept)
    return ForwardBatch(
        input_ids=input_ids,
        positions=positions,
        rope_lens=tuple(row.known + later for later in ahead for row in rows),
        attention=AttentionMeta(
            query_ptr=query_ptr,
            kv_lens=lens,
            query_bounds=bounds if steps == 1 else tuple(range(len(kv_lens) + 1)),
            kv_lens_host=kv_lens,
            is_decode=tuple(row.is_decode for row in rows) * steps,
            groups=tuple(KVGroup(table, store) for table, store in zip(rest, stores, strict=False)),
        ),
        adapters=segments.unpack(rest[len(stores) :]),
        tiles=tiles,
        logit_rows=logits,
        steps=steps,
        own=own(fronts) if fronts and own is not None else None,
    )


def _place(row: Row) -> tuple[bool, bool, Mix]:
    """What rows are sorted by."""
    return not _wears(row), not row.is_decode, row.mix


def _wears(row: Row) -> bool:
    """Whether some of its tokens wear an adapter."""
    return bool(row.mix) or any(mix for _, mix in row.earlier)


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
    """Neighbours of equal mix and role; base rows come last and have none. Some tokens of others wear nothing, too."""

    def __init__(self, rows: ListLike[Row]) -> None:
        bounds, mixes, decode = [0], [], 0
        spans = (span for row in rows if _wears(row) for span in _spans(row))
        for (is_decode, mix), members in groupby(spans, key=lambda span: span[:2]):
            bounds.append(bounds[-1] + sum(count for _, _, count in members))
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


def _spans(row: Row) -> Iterable[tuple[bool, Mix, int]]:
    """(is_decode, mix, tokens) of a row's parts that wear the same, one after the other."""
    left = len(row.tokens)
    for count, mix in row.earlier:
        left -= count
        yield row.is_decode, mix, count
    yield row.is_decode, row.mix, left


def _ids(rows: ListLike[Row]) -> tuple[list[int], list[RowFront]]:
    """Ids of all tokens, those of virtual ones counting down from -1 over the step, and which ones these are."""
    ids: list[int] = []
    fronts: list[RowFront] = []
    virtual = 0
    for row in rows:
        front = row.front
        if front is None or front.front.stored:
            ids += row.tokens
            continue
        count = front.end - front.first
        ids += range(-1 - virtual, -1 - virtual - count, -1)
        ids += row.tokens[count:]
        virtual += count
        fronts.append(front)
    return ids, fronts


def _positions(rows: ListLike[Row], step: int) -> list[int]:
    positions: list[int] = []
    for row in rows:
        start = row.start + step
        positions += range(start, start + len(row.tokens))
    return positions


def _store_index(rows: ListLike[Row], group: int, block_size: int, step: int) -> list[int]:
    """Of each token page * block_size + offset."""
    index: list[int] = []
    for row in rows:
        table, position = row.tables[group], row.start + step
        end = position + len(row.tokens)
        while position < end:
            block, offset = divmod(position, block_size)
            page, count = table[block], min(block_size - offset, end - position)
            assert page >= 0, f"sequence {row.key} has no page for token {position}"
            index += range(page * block_size + offset, page * block_size + offset + count)
            position += count
    return index
