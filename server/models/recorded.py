"""A decoder whose forward pass is recorded once and run by one call per step, where the backend can do that."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loraplex.kernels.constants import Own
from loraplex.kernels.ops import DecodeSteps, Program, StepInputs
from loraplex.kernels.records import AdapterSegments, OwnPlaces, OwnTable
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.inputs import ForwardBatch, HeadRows, no_tiles


def record(decoder: Decoder, max_tokens: int, max_rows: int) -> Decoder | RecordedDecoder:
    """Record `decoder` for steps of up to max_tokens tokens and max_rows logit rows.

    Returns `decoder` itself where the backend runs its ops one by one.
    """
    none = torch.zeros(1, dtype=torch.int32)  # only shapes, and that there are segments, are looked at while recording
    tiles = no_tiles(decoder.config)
    own = torch.zeros(1, OwnPlaces(decoder.config.num_layers).count, 2, dtype=torch.int32)
    stand_in = ForwardBatch.blank(
        replace(tiles, own=OwnTable(own, own, {0: Own.NORM | Own.EMBED | Own.INPUT})),
        decoder.num_kv_groups,
        tokens=max_tokens,
        logit_rows=max_rows,
        adapters=AdapterSegments(none, none, none, torch.zeros(1), (0, 1), (((0, 1.0),),), 0),
    )
    rotations = decoder.rotations(stand_in)
    recorder = decoder.ops.recorder(decoder.weights.dtype, [cos for cos, _ in rotations])
    if recorder is None:
        return decoder
    twin = Decoder(decoder.config, decoder.weights, recorder.ops, decoder.kv_layers, decoder.arena)
    return RecordedDecoder(decoder, twin.hidden(stand_in, rotations), recorder.program())


class RecordedDecoder:
    """Run a recorded Decoder's steps, with the calls and results of that Decoder.

    forward() returns workspace, whose values hold until the next step.
    """

    def __init__(self, decoder: Decoder, hidden: Tensor, program: Program) -> None:
        """hidden [max_rows, H]: where `program` leaves its result."""
        self.config = decoder.config
        self.ops = decoder.ops
        self._decoder = decoder
        self._hidden = hidden
        self._program = program

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Compute the final hidden states [L, H], normed, of the tokens in batch.logit_rows."""
        self._program.run(self._inputs(batch))
        return self._hidden[: batch.logit_rows.shape[0]]

    @property
    def follows_up(self) -> bool:
        """Tell whether decode() may be called: its draws are from logits as the head leaves them, without a cap."""
        return self.config.final_softcap is None

    def decode(
        self,
        batch: ForwardBatch,
        room: Tensor,
        drawn: array[int],
        draws: Tensor | None,
        stops: Tensor,
        halt: ctypes.c_int32,
        followed: ctypes.c_int32 | None = None,
    ) -> int:
        """Run up to batch.steps steps of decode rows, each of the tokens that the step before drew (see DecodeSteps).

        room [L or more, vocab] fp32 and drawn [batch.steps * L] are filled in. Returns how many steps were done.
        """
        head = self._decoder.weights.head
        steps = DecodeSteps(batch.steps, self._hidden, head, room, drawn, draws, stops, halt, followed)
        return self._program.decode(self._inputs(batch), steps)

    def await_step(self, followed: ctypes.c_int32, seen: int) -> int:
        """Wait until a decode() in another thread has set `followed` other than `seen`. Returns it."""
        return self._program.await_step(followed, seen)

    def end_waits(self, followed: ctypes.c_int32) -> None:
        """Set `followed` to -1 and wake whoever awaits a step of a decode() that is over, or has failed."""
        self._program.end_waits(followed)

    def store(self, rows: Tensor, places: Sequence[Tensor]) -> None:
        """Write keys and values as Decoder.store does."""
        self._decoder.store(rows, places)

    def logits(self, hidden: Tensor, room: Tensor | None = None, own: HeadRows | None = None) -> Tensor:
        """Compute logits as Decoder.logits does."""
        return self._decoder.logits(hidden, room, own)

    def _inputs(self, batch: ForwardBatch) -> StepInputs:
        return StepInputs(
            batch.input_ids,
            batch.logit_rows,
            self._decoder.rotations(batch),
            batch.attention,
            self._decoder.adapters(batch),
            batch.own,
        )
