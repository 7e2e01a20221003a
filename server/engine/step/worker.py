"""One step on the device: batch, forward, logits in bounded slices, sampling."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from loraplex.adapters.tiers.device import DeviceTier
from loraplex.server.engine.policy.rows import Early, Row, RowResult, SamplingState, StepInput, Want
from loraplex.server.engine.request import TokenScores
from loraplex.server.engine.step.batch import Kept, build_batch
from loraplex.server.engine.step.following import FollowedSteps
from loraplex.server.engine.step.fronts import Fill, embeddings, fills
from loraplex.server.engine.step.logit_changes import MaskBits
from loraplex.server.engine.step.masks import WAIT_SECONDS, Mask, MaskPool
from loraplex.server.engine.step.sampler import draws_ahead, sample
from loraplex.server.engine.step.scores import score
from loraplex.server.engine.step.scratch import logit_rows
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.graphs import GraphedDecoder
from loraplex.server.models.inputs import ForwardBatch, HeadRows
from loraplex.server.models.recorded import RecordedDecoder

CHUNK = RowResult()
"""Of a row that draws nothing and of which nothing is wanted."""


@dataclass(frozen=True)
class PreparedStep:
    """A step whose tensors are laid out."""

    step: StepInput
    batch: ForwardBatch
    drawing: list[Row]  # the step's rows that draw, in its order
    masks: list[Mask | None]  # of these
    stops: Tensor | None = None  # where it is one call with the draw in it, or several steps: what ends them
    draws: Tensor | None = None  # and DecodeSteps.draws
    fills: tuple[Fill, ...] = ()  # what is stored before it


class LocalWorker:
    """Computes steps in this process; the masks of grammars are computed beside the forward pass."""

    def __init__(
        self,
        decoder: Decoder | RecordedDecoder | GraphedDecoder,
        residency: DeviceTier,
        block_size: int,
        device: torch.device,
        halt: ctypes.c_int32 | None = None,
    ) -> None:
        """block_size: tokens of a KV page. halt: other than 0 while somebody waits for the end of the step; those after
        it are not begun then."""
        self._halt = halt if halt is not None else ctypes.c_int32()  # one of 0 is false
        self._decoder = decoder
        self._residency = residency
        self._block_size = block_size
        self._device = device
        self._slice = logit_rows(decoder.config.vocab_size)
        self.masks = MaskPool()
        self.early: Early | None = None
        self._watching = ThreadPoolExecutor(1, "steps")
        self._kept = Kept()
        # For a slice's logits on the CPU: memory that is taken anew costs as much as the product, 15 ms for 64 rows
        self._room = torch.empty(self._slice, decoder.config.vocab_size) if device.type == "cpu" else None

    @torch.inference_mode()
    def prepare(self, step: StepInput) -> PreparedStep:
        """Lay out the tensors of `step` and begin its masks. What was prepared before holds no longer."""
        draws_too = self._draws_too(step.rows)
        steps = step.steps if draws_too else 1
        own = partial(embeddings, residency=self._residency)
        batch = build_batch(step, self._residency.table, self._block_size, self._device, self._kept, steps, own)
        drawing = [row for row in step.rows if row.draws]
        states = [row.sampling for row in drawing if row.sampling is not None]
        masks = self.masks.begin([(state.constraint, state.output) for state in states])
        if not draws_too:
            stored = fills(step.rows, self._block_size, self._residency)
            return PreparedStep(step, batch, drawing, masks, fills=stored)
        stops = torch.from_numpy(np.unique(np.concatenate([state.params.stops for state in states])))
        return PreparedStep(step, batch, drawing, masks, stops, draws_ahead(drawing, steps))

    @torch.inference_mode()
    def run(self, prepared: PreparedStep) -> list[RowResult]:
        """A result for each row; see Worker.run."""
        if prepared.stops is not None:
            return self._decode(prepared.batch, prepared.draws, prepared.stops)
        for fill in prepared.fills:
            self._decoder.store(fill.rows, fill.places)
        hidden = self._decoder.forward(prepared.batch)  # [L, H]
        rows = prepared.drawing
        masks, late = _taken(prepared.masks)
        drawn: list[RowResult] = []
        for start in range(0, len(rows), self._slice):  # a vocabulary of 256k costs 1 MB a row
            end = min(start + self._slice, len(rows))
            logits = self._decoder.logits(hidden[start:end], self._room, self._head(rows[start:end]))
            vocab = self._decoder.config.vocab_size
            tokens = sample(logits, rows[start:end], masks[start:end], self._decoder.ops, vocab)
            drawn += [RowResult((token,)) for token in tokens]
        for place in late:
            drawn[place] = CHUNK
        if len(drawn) == len(prepared.step.rows) == hidden.shape[0]:
            return drawn
        return self._with_prompts(prepared.step.rows, drawn, hidden[len(rows) :])

    def _draws_too(self, rows: Sequence[Row]) -> bool:
        """Tell whether all are decode rows that the recorded pass can draw for: one call instead of three."""
        return (
            isinstance(self._decoder, RecordedDecoder)
            and self._decoder.follows_up
            and len(rows) <= self._slice
            and all(row.is_decode and row.draws and _is_plain(row.sampling) for row in rows)
            and self._head(rows) is None
        )

    def _decode(self, batch: ForwardBatch, draws: Tensor | None, stops: Tensor) -> list[RowResult]:
        """Run steps of decode rows in one call; `early` is told of those that others follow."""
        decoder, room = self._decoder, self._room
        assert isinstance(decoder, RecordedDecoder), "see _draws_too()"
        assert room is not None, "passes are recorded on the CPU"
        steps = FollowedSteps(batch.logit_rows.shape[0], batch.steps)
        if batch.steps > 1 and self.early is not None:
            steps.watch(self._watching, decoder.await_step, self.early)
        try:
            done = decoder.decode(batch, room, steps.drawn, draws, stops, self._halt, steps.followed)
        finally:  # also where it came to nothing: the thread that watches would wait for ever, and the process for it
            decoder.end_waits(steps.followed)
        return steps.end(done)

    def _with_prompts(self, rows: Sequence[Row], drawn: Sequence[RowResult], hidden: Tensor) -> list[RowResult]:
        """The results of all rows. drawn: of those that draw; hidden [sum of wanted tokens, H]: of those that want."""
        results: list[RowResult] = []
        found, start = iter(drawn), 0
        for row in rows:
            result = next(found) if row.draws else CHUNK
            if row.want is not None:
                end = start + len(row.want.tokens)
                result = self._read(row, row.want, hidden[start:end], result)
                start = end
            results.append(result)
        return results

    def _head(self, rows: Sequence[Row]) -> HeadRows | None:
        """Find what adapters of these rows do to the head."""
        if not any(row.mix for row in rows):
            return None
        mixes = [row.mix for row in rows]
        return HeadRows.of(mixes, self._residency.table, self._decoder.config.vocab_size, self._device)

    def _read(self, row: Row, want: Want, hidden: Tensor, result: RowResult) -> RowResult:
        """`result` with what is wanted of hidden [n, H], of prompt tokens: their sum, or scores of the next ones."""
        if want.following is None:
            return result._replace(pooled=hidden.float().sum(0).cpu().numpy())
        scores = []
        for start in range(0, hidden.shape[0], self._slice):
            some = hidden[start : start + self._slice]
            logits = self._decoder.logits(some, self._room, self._head([row] * some.shape[0]))
            following = want.following[start : start + logits.shape[0]]
            scores.append(score(logits, following, want.top, self._decoder.ops))
        return result._replace(scores=TokenScores.join(scores))


def _is_plain(state: SamplingState | None) -> bool:
    """Tell whether a row draws from the logits as they are, and only the token is wanted."""
    if state is None or state.constraint is not None:
        return False
    return state.params.logprobs is None and not state.params.changes_logits(len(state.output))


def _taken(begun: Sequence[Mask | None]) -> tuple[list[MaskBits | None], list[int]]:
    """The masks, and the places of those that are not there in time."""
    masks: list[MaskBits | None] = [None] * len(begun)
    late: list[int] = []
    if any(begun):
        until = time.monotonic() + WAIT_SECONDS
        for place, mask in enumerate(begun):
            if mask is not None:
                masks[place] = bits = mask.take(until)
                late += [place] if bits is None else []
    return masks, late
