"""The same tests run over every backend that can run here, the CPU one over every instruction set this machine has.

Under TRITON_INTERPRET=1 they run over the Triton kernels alone, in the interpreter (gpu/test_interpreter.py does that),
and of each slow test no more cases than it takes to meet every value of every parameter; with CI_FULL=1 all of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from loraplex.kernels.cpu import abi
from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.ops import Backend
from loraplex.kernels.select import load_backend
from tests.support.covering import covering
from tests.support.kernel_builds import compile_arm64_kernels, missing_compiler

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
CPU = [f"cpu-{isa}" for isa in abi.ISAS if abi.library().loraplex_isa(isa.encode()) >= 0]
BACKENDS = ["reference-cpu", *CPU] + (["reference-cuda", "triton-cuda"] if torch.cuda.is_available() else [])
if INTERPRET:
    from tests.support import triton_bf16

    triton_bf16.apply()
    BACKENDS = ["triton-cpu"]
    # The CPU backend's own; and what the Triton backend leaves to torch.
    collect_ignore = [
        "test_arm64.py",
        "test_hugepages.py",
        "test_inner_loops.py",
        "test_invariance.py",
        "test_nucleus.py",
        "test_quantized_linear.py",
        "test_sampling.py",
    ]
QUICK = ("test_dense_ops.py",)  # a second in the interpreter, with all cases
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    name, rest = request.param.split("-", 1)
    return CpuBackend(isa=rest) if name == "cpu" else load_backend(name, rest)


@pytest.fixture(scope="session")
def arm64_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """kernels.cpp as an object file for each instruction set of arm64, and with AVX-512's vectors."""
    if reason := missing_compiler():
        pytest.skip(reason)
    return compile_arm64_kernels(tmp_path_factory.mktemp("arm64"))


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.hookimpl(trylast=True)  # of what -k has left
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The CPU backend computes in bf16 and fp32 alone: there is nothing to skip, those cases do not exist.

    Nor do those of the reference where batch invariance is asked for.
    """
    items[:] = [item for item in items if not _is_cpu_float16(item) and not _is_library(item)]
    if INTERPRET and os.environ.get("CI_FULL") != "1":
        few = set(covering([item for item in items if item.path.name not in QUICK]))
        items[:] = [item for item in items if item in few or item.path.name in QUICK]


def _is_library(item: pytest.Item) -> bool:
    """Tell whether an item asks the reference, whose products are a library's, for batch invariance."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return item.path.name == "test_batch_invariant.py" and str(params.get("backend", "")).startswith("reference-")


def _is_cpu_float16(item: pytest.Item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return str(params.get("backend", "")).startswith("cpu-") and params.get("dtype") is torch.float16
