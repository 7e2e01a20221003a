"""Loops of compiled code, as objdump shows them: what is in the innermost ones decides how fast they are."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

STACK = re.compile(r"\(%rsp|-0x[0-9a-f]+\(%rbp\)|\[sp\b|\[x29\b")
"""An operand on the stack, of x86 or arm64. %rbp may be a register like others: rarely with negative offsets."""

_FUNCTION = re.compile(r"^[0-9a-f]+ <([^>]+)>:$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^ *([0-9a-f]+):\s+(\S.*)$", re.MULTILINE)
_JUMP = re.compile(r"^(?:j\w+|b\.?\w*|cbn?z|tbn?z)\s.*?\b([0-9a-f]+) <")


@cache
def inner_loops(library: Path, objdump: str = "objdump") -> Mapping[str, list[list[str]]]:
    """By function, the instructions of each of its loops that has no other inside."""
    return {name: _loops(body) for name, body in _functions(library, objdump).items()}


@cache
def straight_runs(library: Path, objdump: str = "objdump") -> Mapping[str, list[list[str]]]:
    """By function, its instructions from one jump to the next."""
    return {name: _runs(body) for name, body in _functions(library, objdump).items()}


@cache
def _functions(library: Path, objdump: str) -> Mapping[str, str]:
    command = [objdump, "-d", "--no-show-raw-insn", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *parts = _FUNCTION.split(text)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _runs(body: str) -> list[list[str]]:
    runs: list[list[str]] = [[]]
    for _, shown in _INSTRUCTION.findall(body):
        runs[-1].append(shown.strip())
        if _JUMP.match(shown):
            runs.append([])
    return runs


def _loops(body: str) -> list[list[str]]:
    code = [(int(address, 16), shown.strip()) for address, shown in _INSTRUCTION.findall(body)]
    places = {address: place for place, (address, _) in enumerate(code)}
    spans = []
    for place, (_, shown) in enumerate(code):
        jump = _JUMP.match(shown)
        start = places.get(int(jump[1], 16), place + 1) if jump else place + 1
        if start <= place:
            spans.append((start, place))
    inner = [
        (start, end)
        for start, end in spans
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b in spans)
    ]
    return [[shown for _, shown in code[start : end + 1]] for start, end in inner]
