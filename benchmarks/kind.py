"""What kind of CPU figures are of: those of different kinds never stand in one table."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loraplex.benchmarks.provenance import cpu_lines

SETS = {
    "amx": "AMX",
    "avx512bf16": "AVX-512 BF16",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "neonbf16": "NEON BF16",
    "neon": "NEON",
}
"""The kernels' instruction sets as people call them; others as the kernels do."""

_ZEN = {  # family and first model: AMD's order of models is not that of their ages
    23: {0x00: 1, 0x30: 2},
    25: {0x00: 3, 0x10: 4, 0x20: 3, 0x60: 4},
    26: {0x00: 5},
}
_INTEL = {
    **dict.fromkeys((0x3C, 0x3F, 0x45, 0x46), "Haswell"),
    **dict.fromkeys((0x3D, 0x47, 0x4F, 0x56), "Broadwell"),
    **dict.fromkeys((0x4E, 0x5E, 0x55), "Skylake"),  # 0x55: Cascade Lake and Cooper Lake, too
    **dict.fromkeys((0x8E, 0x9E), "Kaby Lake"),
    **dict.fromkeys((0x6A, 0x6C, 0x7D, 0x7E), "Ice Lake"),
    **dict.fromkeys((0x8C, 0x8D), "Tiger Lake"),
    **dict.fromkeys((0x97, 0x9A), "Alder Lake"),
    **dict.fromkeys((0xB7, 0xBA, 0xBF), "Raptor Lake"),
    **{0x8F: "Sapphire Rapids", 0xCF: "Emerald Rapids", 0xAD: "Granite Rapids"},
}
_ARM = {"0xd0c": "N1", "0xd40": "V1", "0xd49": "N2", "0xd4f": "V2", "0xd84": "V3", "0xd8e": "N3"}


@dataclass(frozen=True)
class Kind:
    """CPUs that one set of figures speaks for."""

    machine: str  # x86, arm64
    kernels: str  # the instruction set that the kernels run, one of abi.ISAS
    family: str  # AMD Zen 4
    cores: int

    @classmethod
    def here(cls) -> Kind:
        """Of this process: its cores, and the kernels that LORAPLEX_ISA or the CPU picks. Raises what pick_isa does."""
        from loraplex.kernels.cpu import abi

        found = platform.machine()
        machine = {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm64"}.get(found, found)
        return cls(machine, abi.pick_isa()[1], family(cpu_lines()), len(os.sched_getaffinity(0)))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Kind:
        """What as_json made."""
        return cls(**content)

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    @property
    def slug(self) -> str:
        """x86-avx2-amd-zen4-2c: a file's name."""
        joined = re.sub(r" (\d+)$", r"\1", self.family)
        parts = f"{self.machine} {self.kernels} {joined} {self.cores}c"
        return re.sub(r"[^a-z0-9]+", "-", parts.lower())

    def __str__(self) -> str:
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{self.family}, {SETS.get(self.kernels, self.kernels)}, {cores}"


def family(lines: Mapping[str, str]) -> str:
    """Of what /proc/cpuinfo says of a CPU; by its numbers where it is none of those known here."""
    vendor, implementer = lines.get("vendor_id", ""), lines.get("CPU implementer")
    if implementer is not None:
        part = lines.get("CPU part", "?")
        return f"Neoverse {_ARM[part]}" if part in _ARM else f"ARM {implementer} part {part}"
    try:
        number, model = int(lines["cpu family"]), int(lines["model"])
    except (KeyError, ValueError):
        return "unknown"
    if vendor == "AuthenticAMD" and number in _ZEN:
        starts = _ZEN[number]
        return f"AMD Zen {starts[max(start for start in starts if start <= model)]}"
    if vendor == "GenuineIntel" and number == 6 and model in _INTEL:
        return f"Intel {_INTEL[model]}"
    maker = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}.get(vendor, vendor)
    return f"{maker} family {number} model {model}"
