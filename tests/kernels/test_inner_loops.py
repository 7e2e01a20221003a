"""The machine code of the CPU kernels, for every instruction set: what loops that multiply are made of.

A sum that finds no register is kept on the stack, where each multiply-add waits for the one before it: that made the
kernels three times slower on AVX2 once, and no result shows it. This needs no CPU of that kind, only a
disassembler.
"""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from loraplex.kernels.cpu import abi
from tests.support.inner_loops import STACK, inner_loops, straight_runs
from tests.support.kernel_builds import arm64_isas

MULTIPLY = re.compile(r"vfmadd\d+ps|vdpbf16ps|vpdpbusd|v?pmaddwd|mulps|fmla|bfdot")
INTEGERS = re.compile(r"vpdpbusd|v?pmaddwd")
DIVIDE = re.compile(r"v?divps|fdiv")
VECTOR = re.compile(r"%[xyz]mm|\b[qdv]\d")


@dataclass(frozen=True)
class Tile:
    """The tile of most rows at a linear of bf16, and what its loop is allowed beside its multiply-adds."""

    rows: int
    registers: int  # of columns
    halves: int  # of a pair that are multiplied one after the other: 1 where the CPU multiplies pairs
    each: int = 1  # instructions to a multiply-add: SSE2 copies, multiplies and adds
    mostly: float = 0.25  # share of multiply-adds from which on a loop is about them

    @property
    def multiplies(self) -> int:
        return self.rows * self.registers * self.halves

    @property
    def most(self) -> int:
        """Instructions: x is broadcast, columns are loaded, halves widened by two more; and ten for the loop itself."""
        columns = self.registers * (1 if self.halves == 1 else 3)
        return self.multiplies * self.each + self.halves * (self.rows + columns) + 10


TILES = {
    "amx": Tile(6, 4, 1),  # of adapters and attention; linears: test_matrix_tiles
    "avx512bf16": Tile(6, 4, 1),
    "avx512": Tile(5, 4, 2),
    "avx2": Tile(6, 2, 2),
    "generic": Tile(3, 2, 2, each=3, mostly=0.2),
}
BYTES = {
    "amx": Tile(6, 4, 1),
    "avx512bf16": Tile(6, 4, 1),
    "avx512": Tile(5, 4, 2, each=2),
    "avx2": Tile(5, 2, 2, each=2),
    "generic": Tile(4, 2, 2, each=3),
}
"""The tile of most rows at a linear whose codes and inputs take 8 bits; halves: of a word's bytes."""

NIBBLES = {
    "amx": ("vpdpbusd", 6 * 4 * 8),
    "avx512bf16": ("vpdpbusd", 6 * 4 * 8),
    "avx512": ("vpmaddubsw", 6 * 4 * 8),
    "avx2": ("vpmaddubsw", 8 * 8),
}
"""Of 4-bit codes and inputs in bytes: the instruction, and how often a unit has it in the largest tile."""

EXACT = {
    "amx": (("vfmadd231ps", 6 * 2 * 8),),  # of bf16 by tiles: matrix_units.h
    "avx512bf16": (("vdpbf16ps", 6 * 4 * 4), ("vfmadd231ps", 6 * 2 * 8)),
    "avx512": (("vfmadd231ps", 6 * 2 * 8),),
    "avx2": (("vfmadd231ps", 4 * 2 * 8),),
}
"""Of exact inputs: instructions, and how often a word has them in the largest tile. Its loops are those of
test_sums_stay_in_registers; what comes once for 32 inputs, when sums are scaled, may wait for the stack."""

FOR_L2 = "_l2"
"""Ends the name of a set's other build, which runs on Intel's CPUs: the same loops, other hints to fetch."""

WORDS = 8
"""Words of a unit, which are multiplied without a jump: lines are fetched in a loop of their own before them."""

MATRIX = {(2, 2): 4, (2, 1): 3, (1, 4): 5, (1, 3): 4, (1, 2): 3, (1, 1): 2}
"""By tiles of rows and of columns that AMX multiplies in one loop: how many tiles are loaded for it."""

ARM_TILES = {"neonbf16": Tile(6, 4, 1), "generic": Tile(5, 4, 2)}


def _builds(isas: Mapping[str, object]) -> list[str]:
    """The builds of sets: portable code and AMX have one, others have two."""
    return [f"{isa}{end}" for isa in isas for end in ("", FOR_L2) if not end or isa not in ("generic", "amx")]


def _check(functions: Mapping[str, list[list[str]]], isa: str, tile: Tile) -> None:
    """Loops about multiplying have no vector on the stack; the linears have the tile's, as dense as it promises.

    Loops about them are tiles, dot products, ranks and softmax's exponentials. Others (norms with the ends of rows in
    them, drawing tokens) may have to copy through memory, and those that divide wait for that.
    """
    loops = [
        (name, code, sum(bool(MULTIPLY.match(line)) for line in code))
        for name, found in functions.items()
        if f"{len(isa)}{isa}" in name
        for code in found
        if not any(DIVIDE.match(line) for line in code)
    ]
    mostly = [(name, code, count) for name, code, count in loops if count >= tile.mostly * len(code)]
    assert len({name for name, *_ in mostly}) >= 3, "the disassembly was not understood"
    for name, code, _ in mostly:
        assert not [line for line in code if STACK.search(line) and VECTOR.search(line)], "\n".join([name, *code])
    tiles = [code for name, code, count in mostly if "add_rows" in name and count == tile.multiplies]
    assert tiles, f"no loop of {tile.multiplies} multiply-adds"
    for code in tiles:
        assert len(code) <= tile.most, "\n".join(code)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the library has these on x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is missing: apt install binutils")
@pytest.mark.parametrize("isa", _builds(TILES))
def test_sums_stay_in_registers(isa: str) -> None:
    _check(inner_loops(Path(abi.library()._name)), isa, TILES[isa.removesuffix(FOR_L2)])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the library has these on x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is missing: apt install binutils")
@pytest.mark.parametrize("isa", _builds(BYTES))
def test_products_of_bytes_are_as_dense_as_their_tile_promises(isa: str) -> None:
    tile = BYTES[isa.removesuffix(FOR_L2)]
    runs = [
        run
        for name, found in straight_runs(Path(abi.library()._name)).items()
        if f"{len(isa)}{isa}" in name and "add_stretch" in name
        for run in found
        if sum(bool(INTEGERS.match(line)) for line in run) == tile.multiplies * WORDS
    ]
    assert runs, f"no {tile.multiplies * WORDS} multiply-adds one after the other"
    for run in runs:
        last = max(place for place, line in enumerate(run) if INTEGERS.match(line))
        assert not [line for line in run[:last] if STACK.search(line) and VECTOR.search(line)], "\n".join(run)
        assert last <= tile.most * WORDS, "\n".join(run)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the library has these on x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is missing: apt install binutils")
@pytest.mark.parametrize("isa", _builds(NIBBLES))
def test_products_of_nibbles_stay_in_registers(isa: str) -> None:
    instruction, most = NIBBLES[isa.removesuffix(FOR_L2)]
    runs = _runs(isa, "nibble_tile", instruction)
    assert max(count for _, count in runs) == most, f"no tile of {most} {instruction}"
    for run, count in runs:
        if count:  # behind the last product a group's sums are scaled, once in 32 inputs
            last = max(place for place, line in enumerate(run) if instruction in line)
            assert not [line for line in run[:last] if STACK.search(line) and VECTOR.search(line)], "\n".join(run)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the library has these on x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is missing: apt install binutils")
@pytest.mark.parametrize("isa", _builds(EXACT))
def test_products_of_exact_inputs_stay_in_registers(isa: str) -> None:
    for instruction, most in EXACT[isa.removesuffix(FOR_L2)]:
        runs = _runs(isa, "exact_tile", instruction)
        assert max(count for _, count in runs) == most, f"no tile of {most} {instruction}"
        for run, count in runs:
            if count == most:
                assert not [line for line in run if STACK.search(line) and VECTOR.search(line)], "\n".join(run)


def _runs(isa: str, kernel: str, instruction: str) -> list[tuple[list[str], int]]:
    """Straight runs of code in `kernel`, and how often each has `instruction`."""
    return [
        (run, sum(line.startswith(instruction) for line in run))
        for name, found in straight_runs(Path(abi.library()._name)).items()
        if f"{len(isa)}{isa}" in name and kernel in name
        for run in found
    ]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the library has these on x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is missing: apt install binutils")
@pytest.mark.parametrize("shape", MATRIX, ids=str)
def test_matrix_tiles_are_multiplied_in_registers(shape: tuple[int, int]) -> None:
    """Each pass of the loop loads what its products need and no sums, and has few instructions beside."""
    rows, columns = shape
    runs = [
        run
        for name, found in straight_runs(Path(abi.library()._name)).items()
        if f"3amxL14multiply_tilesILi{rows}ELi{columns}E" in name
        for run in found
        if any(line.startswith("tdpbf16ps") for line in run)
    ]
    assert len(runs) == 1, "one loop"
    counts = {name: sum(line.startswith(name) for line in runs[0]) for name in ("tdpbf16ps", "tileloadd", "tilestored")}
    assert counts == {"tdpbf16ps": rows * columns, "tileloadd": MATRIX[shape], "tilestored": 0}
    assert not [line for line in runs[0] if STACK.search(line)], runs[0]
    assert len(runs[0]) <= rows * columns + MATRIX[shape] + 14, runs[0]


@pytest.mark.parametrize("isa", arm64_isas())
def test_sums_stay_in_registers_on_arm64(arm64_kernels: dict[str, Path], isa: str) -> None:
    _check(inner_loops(arm64_kernels[isa], "aarch64-linux-gnu-objdump"), isa, ARM_TILES[isa])
