"""What an adapter puts in front of the prompt, in pages: rows end to end, without tiles.

A row is a virtual token: its embedding, or its keys and values of all layers. No kernel reads them; a step takes the
rows that it needs out of the pages (server/engine/step/fronts.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.adapters.image.placement import padded
from loraplex.adapters.image.tiles import IMAGE_COLUMNS, AdapterImage, BaseLayout
from loraplex.kernels.hugepages import huge_zeros
from loraplex.kernels.records import element_bytes


def front_bytes(tokens: int, width: int, dtype: torch.dtype) -> int:
    """Count the bytes of `tokens` rows of `width` elements, padded to the arena's unit."""
    return padded(tokens * width * element_bytes(dtype))


def pack_front(rows: Tensor, layout: BaseLayout) -> AdapterImage:
    """Lay rows [V, W] end to end into pages, rounded to layout.dtype."""
    nbytes = front_bytes(rows.shape[0], rows.shape[1], layout.dtype)
    pages = huge_zeros(-(-nbytes // layout.page_bytes) * layout.page_bytes)
    pages.view(layout.dtype)[: rows.numel()].view(rows.shape).copy_(rows)
    tiles = torch.zeros(0, IMAGE_COLUMNS, dtype=torch.int32)
    return AdapterImage(pages.view(-1, layout.page_bytes), tiles, nbytes, nbytes)


def front_rows(pages: Sequence[Tensor], dtype: torch.dtype, width: int, first: int, end: int) -> Tensor:
    """Take the rows `first` to `end` [end - first, width] in `dtype` out of pages [page_bytes] uint8, in new memory."""
    size, row = pages[0].shape[0], width * element_bytes(dtype)
    page = first * row // size
    found = torch.cat(list(pages[page : -(-end * row // size)]))
    return found[first * row - page * size : end * row - page * size].view(dtype).view(end - first, width)
