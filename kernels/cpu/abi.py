"""The C side as Python sees it: the structs of records.h and the shared library built by setup.py."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from functools import cache
from pathlib import Path

from loraplex.kernels.constants import C_CONSTANTS, MAX_GROUPS, MAX_ROPES

_Pointer = ctypes.c_void_p
_Int, _Float = ctypes.c_int32, ctypes.c_float


class Step(ctypes.Structure):
    """`struct Step` of records.h: what changes from step to step."""

    _fields_ = [
        ("tokens", ctypes.c_int32),
        ("seqs", ctypes.c_int32),
        ("segments", ctypes.c_int32),
        ("decode_segments", ctypes.c_int32),
        ("logit_rows", ctypes.c_int32),
        ("num_layers", ctypes.c_int32),
        ("num_sites", ctypes.c_int32),
        ("ids", _Pointer),
        ("own", _Pointer),
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
        ("own_ranges", _Pointer),
        ("own_places", ctypes.c_int32),
        ("own_worn", ctypes.c_int32),
        ("draws", _Pointer),
        ("drawn", _Pointer),
        ("ranks", _Pointer),  # scratch of the library, all three
        ("partials", _Pointer),
        ("prepared", _Pointer),
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
        ("followed", _Pointer),
        ("turns", ctypes.c_int64 * MAX_ROPES),
    ]


class EmbedArgs(ctypes.Structure):
    _fields_ = [("scale", _Float), ("quantised", _Int)]


class NormArgs(ctypes.Structure):
    _fields_ = [("residual", _Pointer), ("total", _Pointer), ("eps", _Float), ("offset", _Float)]


class LinearArgs(ctypes.Structure):
    _fields_ = [("to_float", _Int), ("turned", _Int), ("ldy", ctypes.c_int64)]


class Quantised(ctypes.Structure):
    """`struct Quantised` of records.h: a quantised weight in panels."""

    _fields_ = [
        ("data", _Pointer),
        ("codebook", _Pointer),
        ("order", _Pointer),
        *((name, ctypes.c_int64) for name in ("columns_in", "columns_out", "panel_bytes", "block_bytes")),
        *((name, _Int) for name in ("bits", "zero", "e4m3")),
        *((name, _Int) for name in ("unit", "units", "block_units", "group_units", "span")),
        *((name, _Int) for name in ("scale", "offset", "shared", "rounded")),
    ]


class QuantisedSource(ctypes.Structure):
    """`struct QuantisedSource` of records.h: codes and numbers, as they are to be packed."""

    _fields_ = [(name, _Pointer) for name in ("codes", "scale", "shared_scale", "offset", "shared_offset")]


class AdapterArgs(ctypes.Structure):
    _fields_ = [("layer", _Int), ("site", _Int), ("to_float", _Int), ("residual", _Pointer)]


class OwnArgs(ctypes.Structure):
    _fields_ = [("place", _Int), ("eps", _Float), ("offset", _Float), ("ldy", ctypes.c_int64)]


class CachedLayer(ctypes.Structure):
    _fields_ = [("k", _Pointer), ("v", _Pointer), ("page", ctypes.c_int64), ("group", _Int)]


class RopeArgs(ctypes.Structure):
    _fields_ = [
        ("cache", CachedLayer),
        ("q_norm", _Pointer),
        ("k_norm", _Pointer),
        ("eps", _Float),
        ("offset", _Float),
        *((name, _Int) for name in ("heads", "kv_heads", "dim", "rotary", "kind", "place")),
    ]


class AttentionArgs(ctypes.Structure):
    _fields_ = [
        ("cache", CachedLayer),
        ("scale", _Float),
        ("softcap", _Float),
        *((name, _Int) for name in ("heads", "kv_heads", "dim", "window")),
    ]


class ActMulArgs(ctypes.Structure):
    _fields_ = [("activation", _Int)]


class SampleArgs(ctypes.Structure):
    _fields_ = [("logprobs", _Pointer)]


class _Args(ctypes.Union):
    _fields_ = [
        ("embed", EmbedArgs),
        ("norm", NormArgs),
        ("linear", LinearArgs),
        ("adapter", AdapterArgs),
        ("own", OwnArgs),
        ("rope", RopeArgs),
        ("attention", AttentionArgs),
        ("act_mul", ActMulArgs),
        ("sample", SampleArgs),
    ]


class Op(ctypes.Structure):
    """`struct Op` of records.h: one op, constant over a recorded program.

    rows: a count, ALL_TOKENS or LOGIT_ROWS of the step.
    """

    _anonymous_ = ("args",)
    _fields_ = [
        ("code", _Int),
        ("rows", _Int),
        ("x", _Pointer),
        ("w", _Pointer),
        ("y", _Pointer),
        ("columns_in", ctypes.c_int64),
        ("columns_out", ctypes.c_int64),
        ("args", _Args),
    ]


RECORDS = (Op, Step, Steps, Quantised)
"""Whose bytes both sides must agree on, in the order of loraplex_sizes of library.cpp."""

ISAS = ("amx", "avx512bf16", "avx512", "avx2", "neonbf16", "generic")


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
    _check_version(lib, path.name)
    lib.loraplex_await.argtypes = [_Pointer, number]
    lib.loraplex_await.restype = number
    lib.loraplex_end.argtypes = [_Pointer]
    lib.loraplex_end.restype = None
    return lib


def _check_version(lib: ctypes.CDLL, name: str) -> None:
    """Raise LibraryMissing where the library `name` was built from other constants or records than ours."""
    if not hasattr(lib, "loraplex_sizes"):
        raise LibraryMissing(f"{name} was built from another version; install again")
    lib.loraplex_constants.restype = ctypes.c_char_p
    lib.loraplex_sizes.restype = ctypes.POINTER(ctypes.c_int)
    if lib.loraplex_constants().decode() != C_CONSTANTS:
        raise LibraryMissing(f"{name} was built from another version (another kernels/constants.py); install again")
    for record, size in zip(RECORDS, lib.loraplex_sizes()[: len(RECORDS)], strict=True):
        if size != ctypes.sizeof(record):
            raise LibraryMissing(
                f"{name} was built from another version ({record.__name__} has {size} bytes in the library, "
                f"{ctypes.sizeof(record)} here); install again"
            )


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
