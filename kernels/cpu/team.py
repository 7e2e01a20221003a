"""The threads that run ops, and the instruction set they run them in."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from loraplex.kernels.constants import ComputeType
from loraplex.kernels.cpu import abi
from loraplex.kernels.cpu.abi import Op, Step, Steps
from loraplex.kernels.ops import BackendUnavailable

_TYPES = {torch.bfloat16: ComputeType.BF16, torch.float32: ComputeType.FP32}


class Team:
    """Runs ops; as what a CpuBackend emits its ops to, it runs each of them at once."""

    def __init__(self, isa: str | None = None, threads: int | None = None) -> None:
        """isa: one of abi.ISAS; the default is LORAPLEX_ISA or the best this CPU has. threads: torch's by default.

        Raises BackendUnavailable when the library is missing or the CPU lacks what was asked for.
        """
        try:
            self._isa, self.isa = abi.pick_isa(isa)
        except (abi.LibraryMissing, ValueError) as error:
            raise BackendUnavailable(str(error)) from None
        self.threads = threads or torch.get_num_threads()
        lib = abi.library()
        self._run, self._await, self._end = lib.loraplex_run, lib.loraplex_await, lib.loraplex_end

    def run(self, ops: ctypes.Array[Op], step: Step, dtype: torch.dtype, steps: Steps | None = None) -> int:
        """Run the ops in order on all threads, once or for as many of `steps` as come about.

        Returns how many steps those were when the last is done. Raises ValueError for a dtype without kernels.
        """
        if dtype not in _TYPES:
            raise ValueError(f"the CPU backend computes in bfloat16 or float32, not {dtype}")
        following = None if steps is None else ctypes.byref(steps)
        done: int = self._run(self._isa, ops, len(ops), ctypes.byref(step), _TYPES[dtype], self.threads, following)
        return done

    def await_step(self, followed: ctypes.c_int32, seen: int) -> int:
        """Wait until a run of steps in another thread has set `followed` other than `seen`. Returns it."""
        now: int = self._await(ctypes.byref(followed), seen)
        return now

    def end_waits(self, followed: ctypes.c_int32) -> None:
        """Set `followed` to -1 and wake whoever awaits it."""
        self._end(ctypes.byref(followed))

    def emit(self, op: Op, dtype: torch.dtype, step: Step | None = None) -> None:
        """Run one op now."""
        self.run((Op * 1)(op), step or Step(), dtype)

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Allocate memory for a result."""
        return torch.empty(*shape, dtype=dtype)

    def rope_kind(self, cos: Tensor) -> int:
        """Index these cosines in the step's table: alone there is one."""
        return 0
