"""What a step is given, and what comes of it: plain records that policy hands to a worker and gets back.

Nothing in them leads back into policy. Block tables and token lists are those that policy keeps, as they are: policy
changes them between steps only, and a worker reads them until its step is over.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from loraplex.adapters.front import Front
from loraplex.server.engine.request import Constraint, SamplingParams, TokenScores

Mix = tuple[tuple[int, float], ...]
"""((slot, weight), ...) of a row's adapters, in the order of their digests; () for the base."""


@dataclass(frozen=True, eq=False)
class SamplingState:
    """What one sequence's tokens are drawn with: made once, when its request comes."""

    params: SamplingParams
    prompt: Sequence[int] | NDArray[np.int64]
    output: Sequence[int]  # generated so far: it grows between steps
    constraint: Constraint | None


class Want(NamedTuple):
    """Hidden states of a row's tokens that are wanted for the prompt's own sake."""

    tokens: range  # of the row, counted from 0
    following: Sequence[int] | None  # scores are wanted: the token after each of them; None: their sum is
    top: int = 0  # likeliest tokens beside each score


class RowFront(NamedTuple):
    """Of what an adapter puts in front of the prompt, the tokens [first, end) that a row needs."""

    slot: int  # the adapter's
    front: Front
    first: int
    end: int


class Row(NamedTuple):
    """One sequence's part of a step.

    A tuple with names: a frozen dataclass of ten fields takes 1.5 us to make and this 0.45, 64 times a step.
    """

    key: int  # of the sequence, never used for another
    start: int  # position of the first of `tokens`
    tokens: Sequence[int]  # to be computed
    known: int  # tokens of the sequence, prompt and generated: the position of the next one
    tables: tuple[array[int], ...]  # per KV group the page of each block, FREED where no query sees it any more
    mix: Mix
    is_decode: bool
    draws: int  # tokens drawn after the row's last: 0 for a chunk of a prompt, else 1
    sampling: SamplingState | None  # None: nothing is drawn
    want: Want | None
    earlier: tuple[tuple[int, Mix], ...] = ()
    """(count, mix) of the row's first tokens, where these wear other than `mix`, which the others wear."""
    front: RowFront | None = None
    """Embeddings of the row's first tokens, whose ids are below 0; or keys and values to be stored before the row's."""


@dataclass(frozen=True)
class StepInput:
    """One step's rows."""

    rows: tuple[Row, ...]
    steps: int = 1  # of decode rows: further ones may follow the first, each of the tokens that the one before drew
    work: object | None = None  # what the worker does beside the rows: nothing so far

    @property
    def num_tokens(self) -> int:
        """Count the tokens of one step."""
        return sum(len(row.tokens) for row in self.rows)


class Drawn(NamedTuple):
    """A token. Log-probabilities are of the model's own logits, before bias, penalties and temperature."""

    token_id: int | None  # None: the logits are no numbers, but NaN or infinity, and any token would be made up
    logprob: float | None = None  # None where none were asked for
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (id, log-probability), most likely first


class RowResult(NamedTuple):
    """What came of one row."""

    tokens: tuple[Drawn, ...] = ()
    """One for each step that was made. None where one was to be drawn: the grammar's mask was not there in time, and
    the row's last token is to be computed again."""
    scores: TokenScores | None = None  # see Want
    pooled: NDArray[np.float32] | None = None  # [H]: the sum of the wanted hidden states


Prepared = TypeVar("Prepared")

Early = Callable[[Sequence[RowResult]], None]
"""Takes what one step or several of those that follow one another drew, in the rows' order, while others run."""


class Worker(Protocol[Prepared]):
    """What computes steps, one after the other."""

    early: Early | None
    """Called in another thread while run() runs, and never after it; None: run() returns everything."""

    def prepare(self, step: StepInput) -> Prepared:
        """Lay out a step, which has rows, and start on its grammars' masks; the device computes nothing yet."""
        ...

    def run(self, prepared: Prepared) -> Sequence[RowResult]:
        """Compute what prepare() laid out last: a result for each row, in the rows' order.

        Where several steps were allowed, of as many as came about, the same for all rows, but for those of which
        `early` has been told: at least of the last. Raises RuntimeError where `early` raised.
        """
        ...
