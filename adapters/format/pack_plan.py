"""Plan how an adapter's file becomes its image, once for all adapters of the same shapes; then only do it.

A file holds A as the image does but in another dtype, and B transposed and unscaled. Where each row goes is known from
the shapes (tiles.plan_image): a PackPlan is that, written down as strips for image/packing.py in the order of the file,
which is then read from its start to its end.

Only pairs of A and B are handled, which is nearly all adapters; others are packed part by part (writing.pack).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import FactorPair
from loraplex.adapters.format.values import cancels
from loraplex.adapters.image.packing import DTYPES, STRIP, OpenFile, Strips, pack
from loraplex.adapters.image.placement import PartPlace, Strip
from loraplex.adapters.image.tiles import AdapterImage, BaseLayout, LowRank, plan_image
from loraplex.adapters.throttle import READING_NICE
from loraplex.kernels.constants import ALIGN
from loraplex.kernels.records import element_bytes

SLICE_BYTES = 16 << 20
"""Of the image, written between two looks at whether anybody still waits: 7 ms."""

_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""As an integer; below it are all finite magnitudes, in their order."""

_Row = tuple[int, int, int, int, int, int, int, int, int, float, bool]
"""A record of STRIP."""


class PackPlan:
    """Immutable, for use by any thread. 72 bytes a strip: 20 KB for attention in 30 layers, 50 KB for all linears."""

    def __init__(self, pairs: Sequence[FactorPair], layout: BaseLayout) -> None:
        """pairs: what is to be in the image, one at least."""
        plan = plan_image([pair.shape for pair in pairs], layout)
        self.nbytes = plan.num_pages * layout.page_bytes
        """Of the image's pages."""
        rows = [
            row
            for number, (pair, place) in enumerate(zip(pairs, plan.places, strict=True))
            for row in _strips(pair, place, element_bytes(layout.dtype), 2 * number)
        ]
        strips = np.array(sorted([*rows, *_gaps(rows, self.nbytes)]), dtype=STRIP)
        self._slices = tuple(_slices(strips))
        self._dtype = layout.dtype
        self._page_bytes = layout.page_bytes
        self._num_factors = 2 * len(pairs)
        self._first = pairs[0]
        self._tiles, self._extent, self._used = plan.tiles, plan.extent, plan.nbytes

    def read(self, file: OpenFile, memory: Tensor, throttle: Callable[[], None]) -> AdapterImage:
        """The image of an adapter known to be sound, written to `memory`, [nbytes] uint8, from its file.

        Raises OSError, and EOFError where the file ends early.
        """
        self._pack(file, memory, throttle, None)
        return self._image(memory)

    def make(self, data: Tensor, memory: Tensor, throttle: Callable[[], None]) -> tuple[AdapterImage, bool]:
        """The image, written to `memory`, from the data of a file, [data_bytes] uint8, and whether it is sound.

        Sound is what has only finite values and some that are not zero, once rounded, in every A and every B, and a
        first B A that is not zero.
        """
        peaks = np.zeros(self._num_factors, dtype=np.int32)
        self._pack(data, memory, throttle, peaks)
        sound = 0 < peaks.min() <= peaks.max() < _INFINITY[self._dtype]
        return self._image(memory), bool(sound) and not cancels(self._first_part(data))

    def _first_part(self, data: Tensor) -> LowRank:
        pair = self._first
        buffer = data.numpy()
        a, b = (
            torch.frombuffer(buffer, dtype=info.dtype, count=math.prod(info.shape), offset=info.offset).view(info.shape)
            for info in (pair.a, pair.b)
        )
        return LowRank(pair.shape.layer, pair.shape.projection, a, b, pair.scaling)

    def _pack(
        self, source: Tensor | OpenFile, memory: Tensor, throttle: Callable[[], None], peaks: NDArray[np.int32] | None
    ) -> None:
        for strips in self._slices:
            pack(strips, source, memory, self._dtype, peaks, READING_NICE)
            throttle()

    def _image(self, memory: Tensor) -> AdapterImage:
        return AdapterImage(memory.view(-1, self._page_bytes), self._tiles, self._used, self._extent)


def _strips(pair: FactorPair, place: PartPlace, item: int, factor: int) -> Iterator[_Row]:
    """A and B of a module, `factor` being A's number and one more B's. B lies as [out, rank] in the file."""
    for strip in place.a:
        yield _row(pair.a, strip, (pair.shape.projection.in_features, 1), place.a_row, item, factor, 1.0)
    for strip in place.b:
        yield _row(pair.b, strip, (1, pair.shape.rank), place.b_row, item, factor + 1, pair.scaling)


def _row(
    info: TensorInfo, strip: Strip, steps: tuple[int, int], dst_row: int, item: int, factor: int, scale: float
) -> _Row:
    """`steps`: elements in the file from row to row, and from column to column."""
    rows, cols = strip.last - strip.first, strip.end - strip.begin
    src = info.offset + (strip.first * steps[0] + strip.begin * steps[1]) * info.dtype.itemsize
    if rows == 1:  # perhaps part of a row; the next thing may follow at once
        dst_row = -(-cols * item // ALIGN) * ALIGN
    dtype = DTYPES.index(info.dtype)
    return (src, *steps, rows, cols, strip.position, dst_row, dtype, factor, scale, scale != 1)


def _gaps(rows: Iterable[_Row], nbytes: int) -> Iterator[_Row]:
    """Strips that zero what `rows` leave of an image."""
    at = 0
    for start, end in [*sorted((row[5], row[5] + row[3] * row[6]) for row in rows), (nbytes, nbytes)]:
        if at < start:
            yield (0, 0, 1, 1, 0, at, start - at, 0, 0, 1.0, False)
        at = end


def _slices(strips: Strips) -> Iterator[Strips]:
    """About SLICE_BYTES each."""
    ends = np.cumsum(strips["rows"] * strips["dst_row"])
    cuts = np.flatnonzero(np.diff(ends // SLICE_BYTES)) + 1
    yield from np.split(strips, cuts)
