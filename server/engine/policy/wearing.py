"""What each token of a sequence wears: all of its mix, or what of it acts at the token's position. Integers only.

Where an adapter acts is settled by the prompt when the sequence is bound, so neither chunks nor preemption move it:

    prompt      a  b  c  d  e  <ask> f  g        mix: (plain, 1.0), (activated, 1.0), called by <ask>, (edit, 1.0)
    plain       x  x  x  x  x    x   x  x        acts: [0, NEVER)
    activated                    x   x  x        acts: [5, NEVER)
    edit        x  x                    x        acts: [0, 2) and, with tiles of their own (unit 1), [7, 8)

What an adapter puts in front of the prompt are tokens of the sequence as others are, with ids -1, -2, ...: positions,
pages and chunks count them. That adapter itself acts nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

from loraplex.adapters.front import Front
from loraplex.adapters.positions import Span
from loraplex.adapters.version import AdapterVersion
from loraplex.server.engine.policy.prefix_cache import Turns

NEVER = 1 << 62
"""The start of an adapter whose invocation is not in the prompt, and the end of what acts on all that follows."""

ALWAYS = (Span(0, NEVER),)

Worn = TypeVar("Worn")

Acts = Sequence[Sequence[Span]]
"""Where each entry of a mix acts: ascending, and apart."""


class MixEntry(NamedTuple):
    """An adapter of a mix with the tiles of one of its units, and the weight that they count with."""

    digest: str
    weight: float
    unit: int = 0


def invoked_at(prompt: Sequence[int], invocation: Sequence[int]) -> int:
    """Find the position from which an adapter with this invocation acts: its last occurrence in `prompt`.

    0 for an adapter without one, NEVER where it is not there: such a prompt is the base's, as in PEFT.
    """
    size = len(invocation)
    for start in range(len(prompt) - size, -1, -1) if size else ():
        if prompt[start] == invocation[0] and tuple(prompt[start : start + size]) == tuple(invocation):
            return start
    return NEVER if size else 0


def acts_of(version: AdapterVersion, prompt: Sequence[int], num_front: int = 0) -> tuple[Span, ...]:
    """List where an adapter acts in a sequence with this prompt, which `num_front` virtual tokens stand before.

    It acts on these, too, unless the prompt says where.
    """
    info = version.info
    if info.front is not None:
        return ()
    if info.positions is not None:
        spans = info.positions.spans(len(prompt))
        return tuple(Span(span.first + num_front, span.end + num_front, span.unit) for span in spans)
    start = invoked_at(prompt, info.invocation)
    if start == NEVER:
        return ()
    return (Span(start + num_front, NEVER),) if info.invocation else ALWAYS


def worn_at(mix: Sequence[Worn], acts: Acts, position: int) -> tuple[Worn, ...]:
    """Choose the entries of `mix` that act at `position`, in their order."""
    return tuple(
        entry
        for entry, spans in zip(mix, acts, strict=True)
        if any(span.first <= position < span.end for span in spans)
    )


def worn_between(
    mix: Sequence[Worn], acts: Acts, first: int, end: int
) -> tuple[tuple[Worn, ...], tuple[tuple[int, tuple[Worn, ...]], ...]]:
    """Return what the last of the tokens [first, end) wears, and (count, what) of those before that wear others."""
    found: list[tuple[int, tuple[Worn, ...]]] = []
    for start, stop in pairwise((first, *(cut for cut in _cuts(acts) if first < cut < end), end)):
        worn, count = worn_at(mix, acts, start), stop - start
        if found and found[-1][1] == worn:
            count += found.pop()[0]
        found.append((count, worn))
    *earlier, (_, last) = found
    return last, tuple(earlier)


def front_of(versions: Iterable[AdapterVersion]) -> tuple[int, Front] | None:
    """Find the one of a request's adapters that puts something in front of the prompt, and what."""
    found = ((index, version.info.front) for index, version in enumerate(versions))
    return next(((index, front) for index, front in found if front is not None), None)


def turns_of(mix: Sequence[MixEntry], acts: Acts) -> Turns:
    """Say for the prefix cache where another of the entries acts than before, and what acts from there on."""
    cuts = (cut for cut in _cuts(acts) if 0 < cut < NEVER)
    return tuple((cut, json.dumps([cut, worn_at(mix, acts, cut)]).encode()) for cut in cuts)


def _cuts(acts: Acts) -> list[int]:
    """List the positions at which something begins or ceases to act, ascending."""
    return sorted({cut for spans in acts for span in spans for cut in (span.first, span.end)})
