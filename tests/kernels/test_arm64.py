"""The kernels on arm64: cross-compiled with setup.py's flags and run under qemu-user against scalar code in double."""

from __future__ import annotations

import ast
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex.kernels.cpu import abi

KERNELS = Path(abi.__file__).parent
SETUP = Path(__file__).parents[2] / "setup.py"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64", "qemu-aarch64-static")


def flags(name: str) -> list[str]:
    """The list called `name` in setup.py, which builds as soon as it is imported."""
    for node in ast.parse(SETUP.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            value: list[str] = ast.literal_eval(node.value)
            return value
    raise LookupError(f"setup.py has no list {name}")


@pytest.fixture(scope="module")
def emulator() -> str:
    found = next((path for name in EMULATOR if (path := shutil.which(name))), None)
    if shutil.which(COMPILER) is None or found is None:
        pytest.skip(f"{COMPILER} or qemu-aarch64 is missing: apt install g++-aarch64-linux-gnu qemu-user")
    return found


@pytest.fixture(scope="module")
def check(emulator: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs arm64/check.cpp."""
    folder = tmp_path_factory.mktemp("arm64")
    sources = {
        KERNELS / "kernels.cpp": [*flags("KERNELS"), "-DLORAPLEX_ISA=generic"],
        KERNELS / "library.cpp": ["-O2", "-fopenmp"],
        KERNELS / "packing.cpp": ["-O3"],
        KERNELS / "hashing.cpp": ["-O3"],
        Path(__file__).parent / "arm64" / "check.cpp": ["-O1", f"-I{KERNELS}"],
    }

    def compile_one(source: Path) -> str:
        output = folder / f"{source.stem}.o"
        command = [COMPILER, *flags("FLAGS"), *sources[source], "-c", source, "-o", output]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr, result.stderr
        return str(output)

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "check"
    subprocess.run([COMPILER, "-static", "-fopenmp", *objects, "-o", program], capture_output=True, check=True)
    return [emulator, str(program)]


@pytest.mark.parametrize("name", ["linear", "adapter", "attention", "rms_norm", "rope", "act_mul", "hash"])
def test_kernels_on_arm64(check: list[str], name: str) -> None:
    result = subprocess.run([*check, name], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
