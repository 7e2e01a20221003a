"""How an adapter's file becomes its image, worked out once for all adapters of the same shapes, and then only done.

A file holds A as the image does but in another dtype, and B transposed and unscaled; and projections that are alike lie
at even distances from layer to layer, in the file and in the image but for the pages' ends. So the image is made in two
steps, neither of which looks at single modules:

    file     | L0 k A | L0 k B | L0 o A | ...      in the file's dtype, layers in the order 0, 1, 10, 11, ...
    stream   | L0 q A | L0 q B | L0 k A | ...      converted, scaled, transposed: some ten modules a torch call
    image    the same bytes, but for what is pulled forward to fill the pages' ends: a few copies a page

On a 4 MB file (all attention projections of 30 layers, rank 8) that is 0.5 ms for 50 torch calls instead of 10 ms.
Only A and B are handled, which is nearly all adapters; the others (biases; tensors at odd addresses) are packed part by
part (tiles.pack).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from loraplex.adapters.adapter_files import TensorInfo
from loraplex.adapters.peft_format import AdapterModule, Blueprint
from loraplex.adapters.peft_values import cancels
from loraplex.adapters.tiles import AdapterImage, BaseLayout, ImagePlan, LowRank, PartShape, plan_image
from loraplex.kernels.hugepages import huge_zeros
from loraplex.kernels.metadata import ALIGN, element_bytes

GRAIN = 32_768
"""Elements of a torch call. torch spreads larger ones over threads of its own, which would take the engine's cores."""

_INT = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""As an integer; below it are all finite magnitudes, in their order."""


@dataclass(frozen=True, slots=True)
class _Factor:
    """A, or B as the image has it, of one module: rows of ranks. In elements, of the file's dtype or the image's."""

    name: str  # of the projection
    dtype: torch.dtype  # in the file
    rows: int
    cols: int
    src_row: int  # from row to row
    src_col: int
    dst_row: int
    scale: float | None
    src: int
    dst: int  # in the stream
    number: int  # twice the module's number, and 1 more for B


@dataclass(frozen=True, slots=True)
class _Convert:
    """One torch call: the same part of the same factor of several modules."""

    dtype: torch.dtype
    shape: tuple[int, int, int]  # modules, rows, columns
    src: int
    src_strides: tuple[int, int, int]
    dst: int
    dst_strides: tuple[int, int, int]
    scale: float | None
    numbers: slice  # of the factors


@dataclass(frozen=True, slots=True)
class _Move:
    """Bytes from the stream to the image."""

    src: int
    dst: int
    count: int


class Recipe:
    """Immutable, for use by any thread. Some 700 bytes a torch call: 50 KB, or 150 KB on all linears."""

    def __init__(self, modules: Sequence[AdapterModule], blueprint: Blueprint, layout: BaseLayout) -> None:
        """`modules`: those of `blueprint` that are to be in the image. Raises ValueError unless is_for() them."""
        if not is_for(modules, blueprint):
            raise ValueError("the modules have biases, or tensors at odd addresses; a recipe is for A and B only")
        plan = plan_image([PartShape(module.layer, module.projection, module.rank) for module in modules], layout)
        factors, moves = _lay_stream(modules, blueprint.header, plan, layout.dtype)
        self._converts = tuple(_converts(factors))
        self._moves = tuple(_joined(moves))
        self._dtype = layout.dtype
        self._page_bytes = layout.page_bytes
        self._num_modules = len(modules)
        self._first = (modules[0], *_infos(modules[0], blueprint.header))
        self._tiles, self._nbytes, self._extent = plan.tiles, plan.nbytes, plan.extent
        self.num_pages = plan.num_pages

    def convert(self, data: Tensor, breathe: Callable[[], None]) -> Tensor:
        """The stream, [nbytes] uint8, from the data of a file, [data_bytes] uint8."""
        stream = huge_zeros(self._nbytes)
        elements = stream.view(self._dtype)
        views = {dtype: _view(data, dtype) for dtype in {step.dtype for step in self._converts}}
        for step in self._converts:
            found = views[step.dtype].as_strided(step.shape, step.src_strides, step.src)
            if step.scale is not None:
                found = found.float() * step.scale
            elements.as_strided(step.shape, step.dst_strides, step.dst).copy_(found)
            breathe()
        return stream

    def is_sound(self, data: Tensor, stream: Tensor, breathe: Callable[[], None]) -> bool:
        """Whether every A and every B is finite and not zero in the compute dtype, and the first B A is not zero."""
        magnitudes = stream.view(_INT[self._dtype])
        peaks = torch.zeros(2 * self._num_modules, dtype=magnitudes.dtype)
        mask = torch.iinfo(magnitudes.dtype).max
        for step in self._converts:
            found = magnitudes.as_strided(step.shape, step.dst_strides, step.dst)
            peak = peaks[step.numbers]
            torch.maximum(peak, (found & mask).amax((1, 2)), out=peak)
            breathe()
        if not 0 < int(peaks.min()) <= int(peaks.max()) < _INFINITY[self._dtype]:
            return False
        module, *infos = self._first
        a, b = (
            _view(data, info.dtype).as_strided(info.shape, (info.shape[1], 1), info.offset // info.dtype.itemsize)
            for info in infos
        )
        return not cancels(LowRank(module.layer, module.projection, a, b, module.scaling))

    def lay_out(self, stream: Tensor) -> AdapterImage:
        """The stream as an image."""
        pages = huge_zeros(self.num_pages * self._page_bytes)
        target, source = pages.numpy(), stream.numpy()
        for move in self._moves:
            target[move.dst : move.dst + move.count] = source[move.src : move.src + move.count]
        return AdapterImage(pages.view(self.num_pages, self._page_bytes), self._tiles, self._nbytes, self._extent)


def is_for(modules: Iterable[AdapterModule], blueprint: Blueprint) -> bool:
    """Whether there can be a recipe: A and B only, each aligned to its own elements."""
    names = [(m.a, m.b) if m.rank and not (m.bias or m.b_bias) else (None, None) for m in modules]
    infos = [blueprint.header.get(name or "") for pair in names for name in pair]
    return bool(infos) and all(info is not None and info.offset % info.dtype.itemsize == 0 for info in infos)


def _infos(module: AdapterModule, header: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
    assert module.a is not None
    assert module.b is not None
    return header[module.a], header[module.b]


def _lay_stream(
    modules: Sequence[AdapterModule], header: Mapping[str, TensorInfo], plan: ImagePlan, dtype: torch.dtype
) -> tuple[list[_Factor], list[_Move]]:
    """Where each factor lies in the stream, and how the stream comes into the image."""
    item = element_bytes(dtype)
    factors: list[_Factor] = []
    moves: list[_Move] = []
    at = 0
    for number in sorted(range(len(modules)), key=lambda i: (modules[i].layer, plan.places[i].a[0].position)):
        module, place = modules[number], plan.places[number]
        a_row, b_row = place.a_row, place.b_row
        b_at = at + module.rank * a_row
        factors += _factors(module, header, (a_row // item, b_row // item), (at // item, b_at // item), 2 * number)
        moves += [_Move(at + s.first * a_row, s.position, (s.last - s.first) * a_row) for s in place.a]
        for s in place.b:
            cut = s.end - s.begin != module.projection.out_features  # then it is one row
            count = -(-(s.end - s.begin) * item // ALIGN) * ALIGN if cut else (s.last - s.first) * b_row
            moves.append(_Move(b_at + s.first * b_row + s.begin * item, s.position, count))
        at = b_at + module.rank * b_row
    return factors, moves


def _factors(
    module: AdapterModule, header: Mapping[str, TensorInfo], rows: tuple[int, int], at: tuple[int, int], number: int
) -> list[_Factor]:
    """A and B of a module whose rows are `rows` elements long in the stream and start there at elements `at`."""
    (a, b), name, rank = _infos(module, header), module.projection.name, module.rank
    wide, out = module.projection.in_features, module.projection.out_features
    scale = None if module.scaling == 1 else module.scaling
    a_src, b_src = (info.offset // info.dtype.itemsize for info in (a, b))
    return [
        _Factor(name, a.dtype, rank, wide, wide, 1, rows[0], None, a_src, at[0], number),
        _Factor(name, b.dtype, rank, out, 1, rank, rows[1], scale, b_src, at[1], number + 1),
    ]


def _view(data: Tensor, dtype: torch.dtype) -> Tensor:
    return data[: data.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _converts(factors: Sequence[_Factor]) -> Iterable[_Convert]:
    """Factors of one kind at even distances from each other, as few calls of at most GRAIN elements."""

    def kind(f: _Factor) -> tuple[str, str, int, int, int, int, int, float]:
        return f.name, str(f.dtype), f.rows, f.cols, f.src_row, f.src_col, f.dst_row, f.scale or 0.0

    for _, alike in groupby(sorted(factors, key=lambda f: (kind(f), f.dst)), kind):
        run: list[_Factor] = []
        for factor in alike:
            if run and (factor.src < run[-1].src or (len(run) > 1 and _step(run[-1], factor) != _step(*run[:2]))):
                yield from _cut(run)
                run = []
            run.append(factor)
        yield from _cut(run)


def _step(one: _Factor, other: _Factor) -> tuple[int, int, int]:
    return other.src - one.src, other.dst - one.dst, other.number - one.number


def _cut(run: Sequence[_Factor]) -> Iterable[_Convert]:
    first = run[0]
    src, dst, number = _step(*run[:2]) if len(run) > 1 else (0, 0, 1)
    rows = first.rows if first.src_col != 1 else max(1, min(first.rows, GRAIN // first.cols))
    cols = first.cols if first.src_col == 1 else max(1, min(first.cols, GRAIN // first.rows))
    count = max(1, GRAIN // (rows * cols))
    for i in range(0, len(run), count):
        some = run[i : i + count]
        for row in range(0, first.rows, rows):
            for col in range(0, first.cols, cols):
                begin = some[0].number
                yield _Convert(
                    dtype=first.dtype,
                    shape=(len(some), min(rows, first.rows - row), min(cols, first.cols - col)),
                    src=some[0].src + row * first.src_row + col * first.src_col,
                    src_strides=(src, first.src_row, first.src_col),
                    dst=some[0].dst + row * first.dst_row + col,
                    dst_strides=(dst, first.dst_row, 1),
                    scale=first.scale,
                    numbers=slice(begin, begin + len(some) * number, number),
                )


def _joined(moves: Iterable[_Move]) -> Iterable[_Move]:
    """The same moves with those joined that go on where another ends, on both sides."""
    last: _Move | None = None
    for move in sorted(moves, key=lambda move: move.dst):
        if last is not None and (last.src + last.count, last.dst + last.count) == (move.src, move.dst):
            last = _Move(last.src, last.dst, last.count + move.count)
            continue
        if last is not None:
            yield last
        last = move
    if last is not None:
        yield last
