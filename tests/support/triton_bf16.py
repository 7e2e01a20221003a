"""Makes bfloat16 right in Triton's interpreter, which holds it as uint16 and computes on the bit patterns.

There, stock Triton 3.9 narrows by cutting bits off and multiplies matrices of bfloat16 wrongly, without a warning. Here
narrowing rounds to the nearest even as the hardware does, and products are taken in fp32. It reaches into the
interpreter's private classes, so triton is pinned in constraints.txt; apply() before the first kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrowed(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To the nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def apply() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op

    def as_fp32(x: Any) -> Any:
        return handle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        to = target.scalar
        if (source.dtype.scalar == tl.bfloat16) == (to == tl.bfloat16):
            return cast(self, source, target)
        if to == tl.bfloat16:
            wide = source if source.dtype.scalar == tl.float32 else cast(self, source, tl.float32)
            return handle(narrowed(wide.data), tl.bfloat16)
        return as_fp32(source) if to == tl.float32 else cast(self, as_fp32(source), to)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        return cast_impl(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        return dot(self, as_fp32(a), as_fp32(b), acc, *rest)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        # Kernels widen first: arithmetic on bfloat16 is their mistake, and must not pass by luck.
        assert tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar), "bfloat16 arithmetic: widen to fp32 after the load"
        return binary(self, a, b, op)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.create_dot, builder.binary_op = create_dot, binary_op


@contextmanager
def dots_in_order() -> Iterator[None]:
    """Matrix products summed one element of K after the other, as by one thread of a GPU.

    The interpreter hands them to BLAS, where the order hangs on a row's place in its tile. After apply().
    """
    builder = interpreter.InterpreterBuilder
    before = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
        total = acc.data.astype(np.float32)
        left, right = (
            (widened(x.data) if x.dtype.scalar == tl.bfloat16 else x.data.astype(np.float32)) for x in (a, b)
        )
        for k in range(left.shape[1]):
            total += left[:, k : k + 1] * right[k : k + 1]
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    builder.create_dot = create_dot
    try:
        yield
    finally:
        builder.create_dot = before
