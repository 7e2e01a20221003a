"""The C side as Python sees it: the structs of records.h and the shared library built by setup.py."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from enum import IntEnum
from functools import cache
from pathlib import Path

MAX_GROUPS = 8
MAX_ROPES = 4

_Pointer = ctypes.c_void_p


class OpCode(IntEnum):
    EMBED = 0
    RMS_NORM = 1
    LINEAR = 2
    BIAS = 3
    ADAPTER = 4
    ROPE = 5
    ATTENTION = 6
    ACT_MUL = 7
    GATHER = 8
    SAMPLE = 9
    PACK = 10


class Step(ctypes.Structure):
    """`struct Step` of records.h: what changes from step to step."""

    _fields_ = [
        ("tokens", ctypes.c_int32),
        ("seqs", ctypes.c_int32),
        ("segments", ctypes.c_int32),
        ("decode_segments", ctypes.c_int32),
        ("logit_rows", ctypes.c_int32),
        ("num_layers", ctypes.c_int32),
        ("ids", _Pointer),
        ("rows", _Pointer),
        ("query_ptr", _Pointer),
        ("kv_lens", _Pointer),
        ("block_table", _Pointer * MAX_GROUPS),
        ("store_index", _Pointer * MAX_GROUPS),
        ("max_blocks", ctypes.c_int64 * MAX_GROUPS),
        ("cos", _Pointer * MAX_ROPES),
        ("sin", _Pointer * MAX_ROPES),
        ("indptr", _Pointer),
        ("mix_ptr", _Pointer),
        ("mix_slot", _Pointer),
        ("mix_weight", _Pointer),
        ("ranges", _Pointer),
        ("tiles", _Pointer),
        ("arena", _Pointer),
        ("draws", _Pointer),
        ("drawn", _Pointer),
        ("ranks", _Pointer),  # scratch of the library, both
        ("partials", _Pointer),
    ]


class Steps(ctypes.Structure):
    """`struct Steps` of records.h: decode steps that follow one another."""

    _fields_ = [
        ("most", ctypes.c_int32),
        ("num_stops", ctypes.c_int32),
        ("stops", _Pointer),
        ("logits", _Pointer),
        ("vocab", ctypes.c_int64),
        ("halt", _Pointer),
        ("turns", ctypes.c_int64 * MAX_ROPES),
    ]


class Op(ctypes.Structure):
    """`struct Op` of records.h: one op, constant over a recorded program. `rows`: a count, or one of the two below."""

    _fields_ = [
        ("code", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("x", _Pointer),
        ("w", _Pointer),
        ("y", _Pointer),
        ("z", _Pointer),
        ("aux", _Pointer),
        ("aux2", _Pointer),
        ("columns_in", ctypes.c_int64),
        ("columns_out", ctypes.c_int64),
        ("page", ctypes.c_int64),
        ("f0", ctypes.c_float),
        ("f1", ctypes.c_float),
        ("i0", ctypes.c_int32),
        ("i1", ctypes.c_int32),
        ("i2", ctypes.c_int32),
        ("i3", ctypes.c_int32),
        ("i4", ctypes.c_int32),
        ("i5", ctypes.c_int32),
    ]


ALL_TOKENS = -1
LOGIT_ROWS = -2

ISAS = ("avx512bf16", "avx512", "avx2", "neonbf16", "generic")


class LibraryMissing(RuntimeError):
    """The shared library is not there or is not ours."""


@cache
def library() -> ctypes.CDLL:
    """The kernels, loaded once, after torch: both then use one libgomp and one pool of threads."""
    import torch  # noqa: F401

    path = Path(__file__).with_name("_kernels" + importlib.machinery.EXTENSION_SUFFIXES[0])
    if not path.exists():
        raise LibraryMissing(
            f"{path.name} is missing beside {Path(__file__).name}; install loraplex again (it needs g++)"
        )
    lib = ctypes.CDLL(str(path))
    lib.loraplex_isa.argtypes = [ctypes.c_char_p]
    number = ctypes.c_int
    lib.loraplex_run.argtypes = [number, _Pointer, number, _Pointer, number, number, _Pointer]
    lib.loraplex_run.restype = number
    layout = getattr(lib, "loraplex_layout", int)()
    expected = (len(OpCode) * 1000 + ctypes.sizeof(Op)) * 10000 + ctypes.sizeof(Step) + ctypes.sizeof(Steps)
    if layout != expected:
        raise LibraryMissing(
            f"{path.name} was built from another version (layout {layout}, expected {expected}); install again"
        )
    return lib


def pick_isa(name: str | None = None) -> tuple[int, str]:
    """(index, name) of the instruction set to run: `name`, else LORAPLEX_ISA, else the best this CPU has.

    Raises ValueError for one nobody has or this CPU lacks.
    """
    lib = library()
    name = name or os.environ.get("LORAPLEX_ISA") or None
    if name is not None and name not in ISAS:
        raise ValueError(f"unknown instruction set {name!r}; there are: {', '.join(ISAS)}")
    for candidate in [name] if name else ISAS:
        index = lib.loraplex_isa(candidate.encode())
        if index >= 0:
            return index, candidate
    raise ValueError(f"this CPU cannot run {name!r}")
