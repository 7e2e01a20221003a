"""The kernels on arm64: cross-compiled with setup.py's flags and run under qemu-user against scalar code in double."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.kernel_builds import COMPILER, KERNELS, LOADING, WIDE, arm64_isas, compile_arm64

EMULATOR = ("qemu-aarch64", "qemu-aarch64-static")
SOURCES = {
    KERNELS / "library.cpp": ["-O2", "-fopenmp"],
    LOADING / "packing.cpp": ["-O3"],
    LOADING / "hashing.cpp": ["-O3"],
    Path(__file__).parent / "arm64" / "check.cpp": ["-O1", f"-I{KERNELS}"],
}


@pytest.fixture(scope="module")
def checks(arm64_kernels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The commands that run arm64/check.cpp: with the kernels as they are built, and with WIDE."""
    emulator = next((path for name in EMULATOR if (path := shutil.which(name))), None)
    if emulator is None:
        pytest.skip("qemu-aarch64 is missing: apt install qemu-user")
    folder = tmp_path_factory.mktemp("check")
    objects = [compile_arm64(folder, source, source.stem, flags) for source, flags in SOURCES.items()]
    commands = {}
    for isa, generic in {**dict.fromkeys(arm64_isas(), "generic"), WIDE: WIDE}.items():
        program = folder / generic
        kernels = [arm64_kernels[generic], *(arm64_kernels[name] for name in arm64_isas() if name != "generic")]
        if not program.exists():
            link = [COMPILER, "-static", "-fopenmp", *kernels, *objects, "-o", program]
            subprocess.run(link, capture_output=True, check=True)
        commands[isa] = [emulator, str(program), "generic" if isa == WIDE else isa]
    return commands


@pytest.mark.parametrize("isa", [*arm64_isas(), WIDE])
@pytest.mark.parametrize("name", ["linear", "adapter", "attention", "rms_norm", "rope", "act_mul", "hash"])
def test_kernels_on_arm64(checks: dict[str, list[str]], name: str, isa: str) -> None:
    result = subprocess.run([*checks[isa], name], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
