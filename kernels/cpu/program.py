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
        self._decode_ops = self._ops  # with those of the head and the draw behind them, set by decode()
        self._dtype = dtype
        self._batch_invariant = batch_invariant

    def run(self, inputs: StepInputs) -> None:
        self._team.run(self._ops, self._step(inputs), self._dtype)

    def decode(self, inputs: StepInputs, steps: DecodeSteps) -> tuple[Tensor, Tensor]:
        step, rows = self._step(inputs), inputs.logit_rows.shape[0]
        step.tokens = step.seqs = rows
        hidden = steps.hidden[:rows]
        logits = torch.empty(rows, steps.head.out_features, dtype=torch.float32)
        drawn = torch.empty(steps.most, rows, dtype=torch.int64)
        step.draws, step.drawn = None if steps.draws is None else steps.draws.data_ptr(), drawn.data_ptr()
        last = [*linear_ops(hidden, steps.head, logits), sample_op(logits)]
        if len(self._decode_ops) != len(self._ops) + len(last):
            self._decode_ops = (Op * (len(self._ops) + len(last)))(*self._ops)
        self._decode_ops[-len(last) :] = last
        following = Steps(
            most=steps.most,
            num_stops=steps.stops.shape[0],
            stops=steps.stops.data_ptr(),
            logits=logits.data_ptr(),
            vocab=logits.shape[1],
            halt=ctypes.addressof(steps.halt),
        )
        for index, (cos, _) in enumerate(inputs.rotations):
            following.turns[index] = cos.shape[1]
        done = self._team.run(self._decode_ops, step, self._dtype, following)
        return drawn[:done], logits

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
