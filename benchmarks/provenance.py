"""Where figures come from: the machine, the versions, the commit. A figure without these cannot be repeated."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

PACKAGES = ("loraplex", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Provenance:
    """Of one run of benchmarks."""

    cpu: str
    cpus: int
    instructions: str  # the best that the kernels know here
    memory_bytes: int
    system: str
    python: str
    versions: dict[str, str]
    commit: str  # "unknown" outside of a checkout; ends in "+" where files differ from it
    committed: str  # when, in UTC and ISO 8601; "" outside of a checkout

    @classmethod
    def here(cls) -> Provenance:
        return cls(
            cpu=_cpu(),
            cpus=os.cpu_count() or 1,
            instructions=_instructions(),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            versions={name: version for name in PACKAGES if (version := _version(name))},
            commit=commit(),
            committed=committed(),
        )

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def commit(folder: Path = Path(__file__).resolve().parent) -> str:
    """Of the checkout that `folder` is in."""
    try:
        found = _git(folder, "rev-parse", "--short=12", "HEAD")
        return found + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def committed(folder: Path = Path(__file__).resolve().parent) -> str:
    """When the commit was made that commit() names."""
    try:
        seconds = int(_git(folder, "show", "--no-patch", "--format=%ct", "HEAD"))
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # a server that is loaded from elsewhere needs no torch


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def cpu_lines() -> dict[str, str]:
    """What /proc/cpuinfo says of the first CPU; nothing where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu() -> str:
    return cpu_lines().get("model name") or platform.processor() or platform.machine()


def _instructions() -> str:
    lines = cpu_lines()
    flags = lines.get("flags", lines.get("Features", "")).split()
    names = {
        "amx_bf16": "AMX",
        "avx512_bf16": "AVX-512 BF16",
        "avx512f": "AVX-512",
        "avx2": "AVX2",
        "bf16": "NEON BF16",
        "asimd": "NEON",
    }
    return next((name for flag, name in names.items() if flag in flags), "portable")
