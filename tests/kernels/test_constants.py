"""What setup.py writes for C++ of kernels/constants.py, read by a C++ compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from loraplex.kernels import constants


@pytest.mark.parametrize(
    ("cpp", "python"),
    [
        ("kBlockSize", constants.BLOCK_SIZE),
        ("kAllTokens", constants.ALL_TOKENS),
        ("(int)TileKind::kScale", constants.TileKind.SCALE),
        ("(int)OpCode::kRmsNorm", constants.OpCode.RMS_NORM),
        ("(int)Activation::kGeluTanh", constants.Activation.GELU_TANH),
    ],
)
def test_cpp_has_the_numbers_of_python(tmp_path: Path, cpp: str, python: int) -> None:
    (tmp_path / "constants.h").write_text(constants.C_HEADER, encoding="utf-8")
    source = tmp_path / "numbers.cpp"
    source.write_text(f'#include "constants.h"\nstatic_assert({cpp} == {int(python)});\n', encoding="utf-8")
    command = ["g++", "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
