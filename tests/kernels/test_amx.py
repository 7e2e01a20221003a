"""What is AMX's own: tiles that rows and inputs do not fill, and a unit that is given back.

That its rows keep their bits is asked with all instruction sets' (test_invariance.py), what its loops are made of in
test_inner_loops.py, on any CPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from loraplex.kernels.cpu import abi
from loraplex.kernels.cpu.backend import CpuBackend

pytestmark = pytest.mark.skipif(
    abi.library().loraplex_isa(b"amx") < 0, reason="this CPU has no AMX with bf16, or Linux does not lend it"
)

DTYPE = torch.bfloat16
TILES = 3 << 17
"""Bits of XINUSE: the shape of tiles, and what is in them."""

XINUSE = r"""
#include <immintrin.h>
extern "C" unsigned long long in_use() { return _xgetbv(1); }
"""


@pytest.mark.parametrize("inputs", [2, 30, 32, 34, 62, 100])
def test_any_number_of_inputs(inputs: int) -> None:
    """Each row as fp64 has it, the same alone and among others, in tiles of 12, 15 and 16 rows."""
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(90, inputs, generator=generator).to(DTYPE)
    w = torch.randn(120, inputs, generator=generator).to(DTYPE)
    exact = x.double() @ w.double().T
    single, double = CpuBackend("amx", 1), CpuBackend("amx", 2)
    packed = single.pack_linear(w)
    found = single.logits(x, packed)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    for rows in (1, 15, 16, 17, 36, 90):
        assert torch.equal(single.logits(x[:rows], packed), found[:rows])
        assert torch.equal(double.logits(x[:rows], packed), found[:rows])
    assert torch.equal(torch.cat([single.logits(row, packed) for row in x.split(1)]), found)


def test_what_lies_beside_a_row_does_not_matter() -> None:
    """Rows that are no numbers share tiles with those that are."""
    x, w = torch.randn(40, 64).to(DTYPE), torch.randn(64, 64).to(DTYPE)
    ops = CpuBackend("amx", 1)
    packed = ops.pack_linear(w)
    expected = ops.logits(x, packed)
    x[::2] = torch.nan
    assert torch.equal(ops.logits(x, packed)[1::2], expected[1::2])


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")
def test_the_unit_is_given_back(tmp_path: Path) -> None:
    """Tiles that a thread goes on holding are 8 KB to save whenever Linux takes its core."""
    library = tmp_path / "xinuse.so"
    command = ["g++", "-x", "c++", "-O1", "-mxsave", "-shared", "-fPIC", "-", "-o", str(library)]
    subprocess.run(command, input=XINUSE, text=True, check=True)
    in_use = ctypes.CDLL(str(library)).in_use
    in_use.restype = ctypes.c_ulonglong
    ops = CpuBackend("amx", 1)
    packed = ops.pack_linear(torch.randn(64, 34).to(DTYPE))
    for rows in (1, 40, 90):
        ops.linear(torch.randn(rows, 34).to(DTYPE), packed)
        assert not in_use() & TILES
