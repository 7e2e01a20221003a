"""A sequence's part of a step: its next missing tokens as a Row, and what is wanted of them."""

from __future__ import annotations

from array import array

from loraplex.server.engine.policy.rows import Row, RowFront, Want
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.policy.wearing import worn_between


def row_of(seq: Sequence, count: int, tables: tuple[array[int], ...]) -> Row:
    """Make the next `count` missing tokens of `seq` a row of a step."""
    start, known = seq.num_computed, len(seq.tokens)
    draws = start + count == known
    mix, earlier = worn_between(seq.slots, seq.acts, start, start + count) if seq.acts else (seq.slots, ())
    return Row(
        seq.number,
        start,
        seq.tokens[start : start + count],
        known,
        tables,
        mix,
        known - 1 == start >= seq.num_prompt,
        int(draws),
        seq.sampling if draws else None,
        None if seq.output else _want(seq, start, count, draws),
        earlier,
        None if seq.front is None else _front_of_row(seq, start, count),
    )


def _front_of_row(seq: Sequence, start: int, count: int) -> RowFront | None:
    """Return what the row of `count` tokens from `start` on needs of the front."""
    assert seq.front is not None
    index, front = seq.front
    slot, end = seq.slots[index][0], seq.num_front
    if front.stored:
        return RowFront(slot, front, seq.filled, end) if seq.filled is not None and start == end else None
    return RowFront(slot, front, start, min(start + count, end)) if start < end else None


def _want(seq: Sequence, start: int, count: int, draws: bool) -> Want | None:
    """Return what is wanted of the hidden states of `count` prompt tokens from `start` on."""
    pooling, top = seq.request.pooling, seq.request.params.prompt_logprobs
    virtual = min(count, max(0, seq.num_front - start))
    if pooling == "mean":
        return Want(range(virtual, count), None) if virtual < count else None
    if pooling == "last":
        return Want(range(count - 1, count), None) if draws else None
    scored = min(count, seq.num_prompt - 1 - start) if top is not None else 0  # the last one's next is drawn
    if scored <= virtual or top is None:
        return None
    return Want(range(virtual, scored), seq.tokens[start + 1 + virtual : start + 1 + scored], top)
