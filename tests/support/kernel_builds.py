"""The CPU kernels compiled for arm64, with the flags of setup.py, on whatever machine the tests run."""

from __future__ import annotations

import ast
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from loraplex.kernels.constants import C_HEADER
from loraplex.kernels.cpu import abi

KERNELS = Path(abi.__file__).parent
SETUP = Path(__file__).parents[2] / "setup.py"
LOADING = SETUP.parent / "adapters" / "image"
COMPILER = "aarch64-linux-gnu-g++"


@cache
def setting(name: str) -> Any:
    """What is assigned to `name` in setup.py, which builds as soon as it is imported."""
    for node in ast.parse(SETUP.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py assigns nothing to {name}")


def arm64_isas() -> dict[str, list[str]]:
    """The instruction sets of an arm64 build and the flags of each."""
    return {"generic": [], **setting("ARM")}


def missing_compiler() -> str | None:
    """Why nothing can be compiled for arm64 here, if so."""
    return None if shutil.which(COMPILER) else f"{COMPILER} is missing: apt install g++-aarch64-linux-gnu"


def compile_arm64(folder: Path, source: Path, name: str, flags: list[str]) -> Path:
    """Compile one source file to `folder`/`name`.o; AssertionError with the compiler's words if it says anything."""
    output, include = folder / f"{name}.o", folder / f"{name} include"  # of its own: several are compiled at once
    include.mkdir()
    (include / "constants.h").write_text(C_HEADER, encoding="utf-8")
    command = [COMPILER, *setting("FLAGS"), *flags, f"-I{include}", "-c", str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    return output


WIDE = "generic of 16 lanes"
"""The portable code with AVX-512's vectors and tiles: what it computes can be seen anywhere, how fast it is nowhere."""


def compile_arm64_kernels(folder: Path) -> dict[str, Path]:
    """kernels.cpp as an object file for each instruction set, and WIDE."""
    builds = {isa: [f"-DLORAPLEX_ISA={isa}", *flags] for isa, flags in arm64_isas().items()}
    builds[WIDE] = ["-DLORAPLEX_ISA=generic", "-DLORAPLEX_LANES=16"]

    def compile_one(name: str) -> Path:
        return compile_arm64(folder, KERNELS / "kernels.cpp", name, [*setting("KERNELS"), *builds[name]])

    setting("FLAGS"), setting("KERNELS")  # kept before threads ask: Python 3.11's parser fails in several at once

    with ThreadPoolExecutor() as pool:
        return dict(zip(builds, pool.map(compile_one, builds), strict=True))
