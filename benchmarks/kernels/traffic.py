"""Counts the bytes that launches move, in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton.runtime import interpreter


@dataclass(frozen=True)
class Traffic:
    """One launch."""

    kernel: str  # bgmv._shrink
    moved: int  # bytes that its programs loaded or stored; masked elements are not
    distinct: int  # of these, bytes at different addresses, those loaded and those stored: with a perfect cache


@contextmanager
def counted() -> Iterator[list[Traffic]]:
    """The launches inside, in order. Reaches into the interpreter's private classes."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    launches: list[Traffic] = []
    seen: dict[tuple[str, int], list[NDArray[np.uint64]]] = {}  # addresses, by direction and size of an element

    def note(direction: str, pointers: Any, mask: Any) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        seen.setdefault((direction, width), []).append(addresses.ravel())

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counting_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        result = call(self, *args, **kwargs)
        flat = [(width, np.concatenate(parts)) for (_, width), parts in seen.items()]
        launches.append(
            Traffic(
                f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}",
                sum(width * addresses.size for width, addresses in flat),
                sum(width * np.unique(addresses).size for width, addresses in flat),
            )
        )
        return result

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    executor.__call__ = counting_call
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call
