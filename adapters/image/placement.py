"""Lay the rows of an adapter's parts into pages: where each goes (tiles.py says why so). Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loraplex.kernels.constants import ALIGN


@dataclass(frozen=True)
class Strip:
    """Rows of one factor that lie together in the image."""

    first: int  # rank
    last: int  # past the last
    begin: int  # column; A's rows are never cut
    end: int  # past the last
    position: int  # bytes from the image's start


@dataclass(frozen=True)
class PartPlace:
    """Where the rows of one part go: row r of a strip is `a_row` or `b_row` bytes, a multiple of 64, after r - 1."""

    a_row: int  # 0: no A
    b_row: int  # 0: no B
    a: tuple[Strip, ...]
    b: tuple[Strip, ...]


def padded(nbytes: int) -> int:
    """Round up to whole units of ALIGN bytes."""
    return -(-nbytes // ALIGN) * ALIGN


@dataclass
class RowPlacement:
    """Where the rows of one part go. Positions in bytes from the image's start."""

    ranks: int
    out: int  # elements of a row of B
    a_row: int  # bytes from one row of A to the next, a multiple of 64; 0: no A
    b_row: int  # 0: no B, `rank` is past the last from the start
    item: int  # bytes of an element
    step: int  # most ranks of a tile
    wide: int  # elements of a row of A
    # first rank, past the last, position
    a_strips: list[tuple[int, int, int]] = field(default_factory=list)
    # first rank, past the last, first column, past the last, position
    b_strips: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    rank: int = 0  # the first rank whose B is still to be placed
    column: int = 0  # the first column of that B still to be placed

    def place(self) -> PartPlace:
        """Return where the rows went, once all are placed."""
        a = tuple(Strip(first, last, 0, self.wide, at) for first, last, at in self.a_strips)
        return PartPlace(self.a_row, self.b_row, a, tuple(Strip(*strip) for strip in self.b_strips))


class _Cursor:
    """The next free byte, counted as if pages were contiguous."""

    def __init__(self, page_bytes: int) -> None:
        self.position = 0
        self.skipped = 0
        self._page_bytes = page_bytes

    @property
    def rest(self) -> int:
        """Count the bytes left on this page; a whole page when it has just been filled."""
        return self._page_bytes - self.position % self._page_bytes

    @property
    def at_page_start(self) -> bool:
        return self.position % self._page_bytes == 0

    def take(self, nbytes: int) -> int:
        position = self.position
        self.position += nbytes
        return position

    def skip_page(self) -> None:
        if not self.at_page_start:
            self.skipped += self.rest
            self.position += self.rest


def place_rows(placements: Sequence[RowPlacement], page_bytes: int) -> tuple[int, int]:
    """Give every row its position. Returns the image's extent and the bytes in use."""
    cursor = _Cursor(page_bytes)
    for i, placement in enumerate(placements):
        rank = 0
        while placement.a_row and rank < placement.ranks:
            n = min(cursor.rest // placement.a_row, placement.ranks - rank)
            if n:
                placement.a_strips.append((rank, rank + n, cursor.take(n * placement.a_row)))
                rank += n
            else:
                for pending in placements[i:]:
                    if _place_b(pending, cursor):
                        break
                cursor.skip_page()
        while placement.rank < placement.ranks:
            _place_b(placement, cursor)
    return cursor.position, cursor.position - cursor.skipped


def _place_b(placement: RowPlacement, cursor: _Cursor) -> bool:
    """Place what is left of B up to this page's end: whole rows, then part of one. True when the page is full."""
    while placement.rank < placement.ranks:
        rank, column = placement.rank, placement.column
        n = 0 if column else min(cursor.rest // placement.b_row, placement.ranks - rank)
        if n:
            placement.b_strips.append((rank, rank + n, 0, placement.out, cursor.take(n * placement.b_row)))
            placement.rank += n
        else:
            end = min(placement.out, column + cursor.rest // placement.item)
            position = cursor.take(padded((end - column) * placement.item))
            placement.b_strips.append((rank, rank + 1, column, end, position))
            placement.column = end % placement.out
            placement.rank += end == placement.out
        if cursor.at_page_start:
            return True
    return False
