"""Compiles kernels for GPUs that are not here: which variants the ops would launch, and what each costs on a target.

The ops run with a driver that has no device. Triton's own launcher says, by its hook, what it would compile for the
arguments at hand; nothing is launched, so results are whatever memory held. Not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.driver import driver


@dataclass(frozen=True)
class Target:
    """A GPU to compile for."""

    name: str
    gpu: Any  # triton's GPUTarget
    shared_bytes: int  # that a block may have
    registers: int  # that a thread may have


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 166912, 255),
        Target("sm_90", GPUTarget("cuda", 90, 32), 232448, 255),
        Target("sm_100", GPUTarget("cuda", 100, 32), 232448, 255),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 65536, 512),
    )
}


@dataclass(frozen=True)
class Variant:
    """What the JIT compiles for some arguments of a kernel; equal keys share it."""

    kernel: str  # bgmv._shrink
    key: str  # the JIT's own cache key
    function: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @property
    def label(self) -> str:
        """The constants that tell variants of a kernel apart, and the dtype of its first tensor."""
        values = list(self.constants.values())
        names = [self.function.arg_names[path[0]] for path in self.constants]
        dtype = next(kind for kind in self.signature.values() if kind.startswith("*")).removeprefix("*")
        return f"{dtype} " + " ".join(f"{n}={int(v)}" for n, v in zip(names, values, strict=True))


@dataclass(frozen=True)
class Resources:
    """What a compiled variant takes."""

    registers: int  # a thread's
    spilled: int  # bytes of a thread's stack and local memory
    shared_bytes: int  # a block's
    warps: int


class _NoDevice:
    """As much of a driver as choosing a variant takes."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target.gpu

    def get_current_device(self) -> str:
        return self._target.name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def noted(target: Target) -> Iterator[dict[str, Variant]]:
    """Kernels launched inside are noted by their JIT cache key instead; tensors stay as they are."""
    variants: dict[str, Variant] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        name = f"{fn.module.rpartition('.')[2]}.{fn.name}"
        if (name + key) not in variants:
            options = {name: compile[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
            function, signature, attributes = fn.jit_function, compile["signature"], compile["configs"][0]
            variants[name + key] = Variant(name, key, function, signature, compile["constants"], attributes, options)
        return True  # as if somebody else had compiled it: nothing is launched

    before = driver._active
    driver.set_active(_NoDevice(target))
    knobs.runtime.jit_cache_hook = note
    try:
        yield variants
    finally:
        knobs.runtime.jit_cache_hook = None
        driver.set_active(before)


def variants_of(work: Callable[[], None], target: Target) -> list[Variant]:
    """Every variant that `work` would have compiled for `target`."""
    with noted(target) as variants:
        work()
    return list(variants.values())


def compile_variant(variant: Variant, target: Target) -> Resources:
    """Raises triton's CompilationError and whatever else compiling it raises."""
    source = ASTSource(variant.function, variant.signature, variant.constants, variant.attributes)
    compiled = triton.compile(source, target=target.gpu, options=variant.options)
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    registers, spilled = _cuda(compiled) if target.gpu.backend == "cuda" else _hip(compiled)
    return Resources(registers, spilled, shared, warps)


def _cuda(compiled: CompiledKernel) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump --dump-resource-usage printed no resources: {text[:300]!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def _hip(compiled: CompiledKernel) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"the compiled kernel says nothing about {name}")
        return int(found[1])

    # Scalar registers spill into lanes of vector registers, which costs no memory; what does is private.
    return number("vgpr_count"), number("private_segment_fixed_size")
