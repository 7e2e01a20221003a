"""A forward pass recorded once and run by one C call per step.

30 layers x 13 ops called one by one spend more time in Python than a small model spends in kernels. To record, a
CpuBackend emits its ops to Notes, and the model runs through it once with tensors of the largest step. What changes
from step to step (tokens, tables, adapters, angles) the kernels read from the Step record.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.kernels.constants import ALL_TOKENS, LOGIT_ROWS, MAX_GROUPS, MAX_ROPES, OpCode
from loraplex.kernels.cpu.abi import Op, Step, Steps
from loraplex.kernels.cpu.op_records import fill_adapters, fill_attention, linear_ops, sample_op
from loraplex.kernels.cpu.team import Team
from loraplex.kernels.ops import Backend, DecodeSteps, StepInputs


class Notes:
    """Takes the ops that a CpuBackend emits; their results are workspace.

    A result's memory is taken again once the model has dropped the tensor: the program runs in the order it was
    recorded in, so whoever gets it next writes after the last reader.
    """

    def __init__(self, cosines: Sequence[Tensor]) -> None:
        """cosines: the stand-ins for the step's cosines, one per rotary kind, in the step's order."""
        if len(cosines) > MAX_ROPES:
            raise ValueError(f"{len(cosines)} rotary kinds; the CPU backend has room for {MAX_ROPES}")
        self.noted: list[Op] = []
        self.workspace: list[Tensor] = []
        self._cosines = {id(tensor): index for index, tensor in enumerate(cosines)}
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._rows = ALL_TOKENS

    def emit(self, op: Op, dtype: torch.dtype, step: Step | None = None) -> None:
        """Note one op, which from then on is run by the program alone."""
        if op.code == OpCode.GATHER:
            self._rows = LOGIT_ROWS  # what follows works on the taken rows alone
        op.rows = self._rows
        self.noted.append(op)

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Take workspace for a result."""
        count = torch.Size(shape).numel()
        free = self._free.setdefault((count, dtype), [])
        if not free:
            free.append(torch.zeros(count, dtype=dtype))
            self.workspace.append(free[0])
        buffer = free.pop()
        result = buffer.view(shape)
        weakref.finalize(result, free.append, buffer)
        return result

    def rope_kind(self, cos: Tensor) -> int:
        """Index these cosines in the step's table."""
        return self._cosines[id(cos)]


@dataclass(frozen=True)
class CpuRecorder:
    """Watches the model run through `ops`, whose notes become a program."""

    ops: Backend
    notes: Notes
    team: Team
    dtype: torch.dtype
    batch_invariant: bool

    def program(self) -> CpuProgram:
        """Make a program of what was noted so far."""
        return CpuProgram(self.team, self.notes, self.dtype, self.batch_invariant)


class CpuProgram:
    """The recorded ops and their workspace."""

    def __init__(self, team: Team, notes: Notes, dtype: torch.dtype, batch_invariant: bool) -> None:
        self._team = team
        self._workspace = notes.workspace
        self._ops = (Op * len(notes.noted))(*notes.noted)
        self._decode_ops = self._ops  # see _with_draw()
        self._drawn_from: tuple[int, int, int] | None = None
        self._dtype = dtype
        self._batch_invariant = batch_invariant

    def run(self, inputs: StepInputs) -> None:
        self._team.run(self._ops, self._step(inputs), self._dtype)

    def decode(self, inputs: StepInputs, steps: DecodeSteps) -> int:
        step, rows = self._step(inputs), inputs.logit_rows.shape[0]
        step.tokens = step.seqs = rows
        step.draws, step.drawn = None if steps.draws is None else steps.draws.data_ptr(), steps.drawn.buffer_info()[0]
        following = Steps(
            most=steps.most,
            num_stops=steps.stops.shape[0],
            stops=steps.stops.data_ptr(),
            logits=steps.logits.data_ptr(),
            vocab=steps.logits.shape[1],
            halt=ctypes.addressof(steps.halt),
            followed=None if steps.followed is None else ctypes.addressof(steps.followed),
        )
        for index, (cos, _) in enumerate(inputs.rotations):
            following.turns[index] = cos.shape[1]
        return self._team.run(self._with_draw(steps, rows), step, self._dtype, following)

    def await_step(self, followed: ctypes.c_int32, seen: int) -> int:
        return self._team.await_step(followed, seen)

    def end_waits(self, followed: ctypes.c_int32) -> None:
        self._team.end_waits(followed)

    def _with_draw(self, steps: DecodeSteps, rows: int) -> ctypes.Array[Op]:
        """Take the ops with those of the head and the draw behind them: the last ones, where these are the same."""
        drawn_from = (rows, steps.logits.data_ptr(), id(steps.head))
        if self._drawn_from != drawn_from:
            logits = steps.logits[:rows]
            last = [*linear_ops(steps.hidden[:rows], steps.head, logits), sample_op(logits)]
            self._decode_ops = (Op * (len(self._ops) + len(last)))(*self._ops, *last)
            self._drawn_from = drawn_from
        return self._decode_ops

    def _step(self, inputs: StepInputs) -> Step:
        ids, rows, attention = inputs.ids, inputs.logit_rows, inputs.attention
        if len(attention.groups) > MAX_GROUPS:
            raise ValueError(f"{len(attention.groups)} KV groups; the CPU backend has room for {MAX_GROUPS}")
        step = Step(tokens=ids.shape[0], logit_rows=rows.shape[0], ids=ids.data_ptr(), rows=rows.data_ptr())
        step.own = None if inputs.own is None else inputs.own.data_ptr()
        fill_attention(step, attention)
        for index, (cos, sin) in enumerate(inputs.rotations):
            step.cos[index], step.sin[index] = cos.data_ptr(), sin.data_ptr()
        if inputs.adapters is not None:
            fill_adapters(step, inputs.adapters, self._batch_invariant)
        return step
