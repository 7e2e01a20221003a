"""What each token of a sequence wears: all of its mix, or less of it before an invocation. Integers only.

Where an adapter begins to act is settled by the prompt when the sequence is bound, so neither chunks nor preemption
move it:

    prompt      a  b  c  d  e  <ask> f  g        mix: (plain, 1.0), (activated, 1.0), called by <ask>
    plain       x  x  x  x  x    x   x  x        starts: 0
    activated                    x   x  x        starts: 5

What an adapter puts in front of the prompt are tokens of the sequence as others are, with ids -1, -2, ...: positions,
pages and chunks count them. That adapter itself acts nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

from loraplex.adapters.front import Front
from loraplex.adapters.version import AdapterVersion
from loraplex.server.engine.policy.prefix_cache import Turns

NEVER = 1 << 62
"""The start of an adapter whose invocation is not in the prompt."""

Worn = TypeVar("Worn")


def invoked_at(prompt: Sequence[int], invocation: Sequence[int]) -> int:
    """Find the position from which an adapter with this invocation acts: its last occurrence in `prompt`.

    0 for an adapter without one, NEVER where it is not there: such a prompt is the base's, as in PEFT.
    """
    size = len(invocation)
    for start in range(len(prompt) - size, -1, -1) if size else ():
        if prompt[start] == invocation[0] and tuple(prompt[start : start + size]) == tuple(invocation):
            return start
    return NEVER if size else 0


def worn_at(mix: Sequence[Worn], starts: Sequence[int], position: int) -> tuple[Worn, ...]:
    """Choose the entries of `mix` that act at `position`, in their order."""
    return tuple(entry for entry, start in zip(mix, starts, strict=True) if start <= position)


def worn_between(
    mix: Sequence[Worn], starts: Sequence[int], first: int, end: int
) -> tuple[tuple[Worn, ...], tuple[tuple[int, tuple[Worn, ...]], ...]]:
    """Return what the last of the tokens [first, end) wears, and (count, what) of those before that wear less."""
    cuts = (first, *sorted({start for start in starts if first < start < end}), end)
    *earlier, (_, last) = [(stop - start, worn_at(mix, starts, start)) for start, stop in pairwise(cuts)]
    return last, tuple(earlier)


def front_of(versions: Iterable[AdapterVersion]) -> tuple[int, Front] | None:
    """Find the one of a request's adapters that puts something in front of the prompt, and what."""
    found = ((index, version.info.front) for index, version in enumerate(versions))
    return next(((index, front) for index, front in found if front is not None), None)


def turns_of(mix: Sequence[tuple[str, float]], starts: Sequence[int]) -> Turns:
    """Say for the prefix cache where another of (digest, weight) begins to act, and what acts from there on."""
    cuts = sorted({start for start in starts if 0 < start < NEVER})
    return tuple((cut, json.dumps([cut, worn_at(mix, starts, cut)]).encode()) for cut in cuts)
