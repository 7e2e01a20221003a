"""Runs the tests of tests/kernels over the Triton kernels, in Triton's interpreter.

In processes of their own: triton reads TRITON_INTERPRET when it is imported, and one process cannot compile as well.
Two at once: they wait for nothing but a core.

By default a part of their cases, with CI_FULL=1 all, which takes three times as long. The part has every value of every
parameter and goes through every line and branch of every kernel (coverage says so; what it leaves out of kernels/gpu is
the guards for tensors without elements).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[3]
FULL = os.environ.get("CI_FULL") == "1"

# A shape that takes the interpreter a minute is left out (another has rank 256), and of the longest tests all dtypes
# but one: others ask for every dtype. "float16" is part of "bfloat16".
LEFT_OUT = [
    "576-100-256",
    "test_shapes and float16",
    "test_popularity and (cpu-float16 or cpu-float32)",
    "test_ranks_from_1_to_256 and (cpu-float16 or cpu-float32)",
]
if not FULL:
    # Segments of one row each and one of all rows stay, between which the others are; and the family with a window.
    LEFT_OUT += ["test_popularity and (uniform or zipf or skewed)", "test_graphs and llama"]
ADAPTERS = "tests/kernels/test_adapter_add.py"
PARTS = (  # of about the same length, and the fewest tests in each
    (("--ignore=tests/kernels/gpu", f"--ignore={ADAPTERS}", "tests/kernels", "tests/models/test_graphs.py"), 100, 150),
    ((ADAPTERS, "tests/models/test_batch_invariant.py"), 25, 60),
)


@pytest.mark.skipif(
    Version(importlib.metadata.version("triton")) < Version("3.7"),
    reason="before Triton 3.7 the interpreter cannot loop up to a value that was loaded, with numpy 2.4 or newer",
)
@pytest.mark.timeout(900)
def test_triton_kernels_pass_the_kernel_tests() -> None:
    chosen = "(triton or test_graphs)" + "".join(f" and not ({left_out})" for left_out in LEFT_OUT)
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-k", chosen, "-p", "no:cacheprovider", *paths],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for paths, *_ in PARTS
    ]
    outputs = [process.communicate()[0] for process in running]
    for process, output, (_, *fewest) in zip(running, outputs, PARTS, strict=True):
        assert process.returncode == 0, output[-8000:]
        passed = re.search(r"(\d+) passed", output)
        assert passed is not None
        assert int(passed[1]) >= fewest[FULL], output[-2000:]  # they were there, and not for another backend
