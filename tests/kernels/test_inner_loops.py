"""The machine code of the CPU kernels, for every instruction set: what loops that multiply are made of.

A sum that finds no register is kept on the stack, where each multiply-add waits for the one before it to be stored: that
made the kernels three times slower on AVX2 once, and no result shows it. This needs no CPU of that kind, only a disassembler.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from loraplex.kernels.cpu import abi
from support.kernel_builds import arm64_isas

MULTIPLY = {"x86": re.compile(r"^vfmadd\d+ps|^vdpbf16ps|^mulps"), "arm": re.compile(r"^fmla|^bfdot")}
VECTOR = {"x86": re.compile(r"%[xyz]mm"), "arm": re.compile(r"\b[qdv]\d")}
STACK = {"x86": ("(%rsp", "(%rbp"), "arm": ("[sp", "[x29")}
FRAME = {"x86": "mov    %rsp,%rbp", "arm": "mov\tx29, sp"}
"""Without it the second register of STACK is one like others."""
JUMP = re.compile(r"^(?:j\w+|b\.\w+|b|cbn?z\s+\w+,|tbn?z\s+\w+,\s*#\d+,)\s+([0-9a-f]+) <")
MOSTLY = 0.25
"""Share of multiply-adds in a loop from which on it is about them: tiles, dot products, ranks, the exponentials of softmax.
Others (norms with the ends of rows in them, drawing tokens) may have to copy through memory."""
MOSTLY_SSE2 = 0.2
"""There a multiply-add is two instructions and often a copy: the tile's loop has 12 in 57."""


@dataclass(frozen=True)
class Tile:
    """The tile of most rows at a linear of bf16: what stands beside its multiply-adds in a pass of the loop."""

    rows: int
    registers: int  # of columns
    halves: int  # of a pair that are multiplied one after the other: 1 where the CPU multiplies pairs

    @property
    def multiplies(self) -> int:
        return self.rows * self.registers * self.halves

    @property
    def others(self) -> int:
        """x is broadcast, columns are loaded, halves widened (with a load of its own, at most); and the loop itself."""
        return self.halves * (self.rows + self.registers * (1 if self.halves == 1 else 2)) + LOOP


LOOP = 8
TILES = {
    "avx512bf16": Tile(6, 4, 1),
    "avx512": Tile(5, 4, 2),
    "avx2": Tile(5, 2, 2),
    "neonbf16": Tile(6, 4, 1),
    "arm generic": Tile(5, 4, 2),
    "generic": Tile(3, 2, 2),
}


@dataclass(frozen=True)
class Loop:
    function: str
    code: tuple[str, ...]
    cpu: str
    stack: tuple[str, ...]  # how operands on the stack begin

    @property
    def multiplies(self) -> int:
        return sum(bool(MULTIPLY[self.cpu].search(line)) for line in self.code)

    @property
    def on_stack(self) -> list[str]:
        vectors = (line for line in self.code if VECTOR[self.cpu].search(line))
        return [line for line in vectors if any(operand in line for operand in self.stack)]


def _functions(listing: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Each function's name and its instructions by address."""
    for part in re.split(r"\n(?=[0-9a-f]{8,} <)", listing):
        head, _, body = part.partition("\n")
        if named := re.match(r"[0-9a-f]+ <(.+)>:$", head):
            lines = (re.match(r"\s*([0-9a-f]+):\t(.+)", line) for line in body.splitlines())
            yield named[1], [(int(line[1], 16), line[2].strip()) for line in lines if line]


def _inner_loops(code: list[tuple[int, str]]) -> Iterator[tuple[str, ...]]:
    """What lies between a jump back and its target, where no other such stretch lies inside."""
    index = {address: i for i, (address, _) in enumerate(code)}
    jumps = ((i, JUMP.search(text)) for i, (_, text) in enumerate(code))
    spans = {
        (index[target], i) for i, jump in jumps if jump and (target := int(jump[1], 16)) in index and index[target] <= i
    }
    for first, last in spans:
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            yield tuple(text for _, text in code[first : last + 1])


@cache
def _loops(path: Path, cpu: str, isa: str) -> tuple[Loop, ...]:
    """The inner loops of one instruction set's namespace that multiply."""
    tool = (
        "objdump" if cpu == "x86" or shutil.which("aarch64-linux-gnu-objdump") is None else "aarch64-linux-gnu-objdump"
    )
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is missing: apt install binutils")
    command = [tool, "-d", "--no-show-raw-insn", "-C", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = (
        Loop(name, code, cpu, STACK[cpu] if any(FRAME[cpu] in text for _, text in body) else STACK[cpu][:1])
        for name, body in _functions(listing)
        if re.search(rf"\b{isa}::", name)
        for code in _inner_loops(body)
    )
    return tuple(loop for loop in found if loop.multiplies)


def _here(isa: str) -> tuple[Loop, ...]:
    library = abi.library()
    return _loops(Path(library._name), "x86", isa)


def _check(loops: tuple[Loop, ...], tile: Tile, fused: bool = True) -> None:
    share = MOSTLY if fused else MOSTLY_SSE2
    mostly = [loop for loop in loops if loop.multiplies >= share * len(loop.code)]
    assert len({loop.function for loop in mostly}) >= 3, "the disassembly was not understood"
    spilled = [f"{loop.function}\n  " + "\n  ".join(loop.on_stack) for loop in mostly if loop.on_stack]
    assert not spilled, "\n".join(spilled)
    tiles = [loop for loop in mostly if "add_rows<" in loop.function and loop.multiplies == tile.multiplies]
    assert tiles, f"no loop of {tile.multiplies} multiply-adds"
    for loop in tiles:
        most = tile.multiplies * (1 if fused else 3) + tile.others
        assert len(loop.code) <= most, "\n".join(loop.code)


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "generic"])
def test_sums_stay_in_registers(isa: str) -> None:
    _check(_here(isa), TILES[isa], fused=isa != "generic")


@pytest.mark.parametrize("isa", arm64_isas())
def test_sums_stay_in_registers_on_arm64(arm64_kernels: dict[str, Path], isa: str) -> None:
    _check(_loops(arm64_kernels[isa], "arm", isa), TILES["arm generic" if isa == "generic" else isa])
