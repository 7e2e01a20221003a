"""The kernels on arm64: cross-compiled with setup.py's flags and run under qemu-user against scalar code in double."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support.kernel_builds import COMPILER, KERNELS, arm64_isas, compile_arm64

EMULATOR = ("qemu-aarch64", "qemu-aarch64-static")
SOURCES = {
    KERNELS / "library.cpp": ["-O2", "-fopenmp"],
    KERNELS / "packing.cpp": ["-O3"],
    KERNELS / "hashing.cpp": ["-O3"],
    Path(__file__).parent / "arm64" / "check.cpp": ["-O1", f"-I{KERNELS}"],
}


@pytest.fixture(scope="module")
def check(arm64_kernels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs arm64/check.cpp."""
    emulator = next((path for name in EMULATOR if (path := shutil.which(name))), None)
    if emulator is None:
        pytest.skip("qemu-aarch64 is missing: apt install qemu-user")
    folder = tmp_path_factory.mktemp("check")
    objects = [compile_arm64(folder, source, source.stem, flags) for source, flags in SOURCES.items()]
    program = folder / "check"
    command = [COMPILER, "-static", "-fopenmp", *arm64_kernels.values(), *objects, "-o", program]
    subprocess.run(command, capture_output=True, check=True)
    return [emulator, str(program)]


@pytest.mark.parametrize("isa", arm64_isas())
@pytest.mark.parametrize("name", ["linear", "adapter", "attention", "rms_norm", "rope", "act_mul", "hash"])
def test_kernels_on_arm64(check: list[str], name: str, isa: str) -> None:
    result = subprocess.run([*check, name, isa], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
