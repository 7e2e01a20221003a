"""Where each sequence's keys and values lie: block tables per KV group, over the pages of the one pool.

A KV page holds `block_size` tokens of all layers of one group. Layers with the same attention window share groups, so
that pages a sliding window has left behind can be freed while the full-attention layers keep theirs; groups are of
equal size, so that pages are. Integers only, free of torch.

    tokens of a sequence   0 ....... 15 | 16 ...... 31 | 32 ...... 47 | 48 ...
    table of a full group       p7      |      p2      |      p9      |  p4
    table of a window group     -1      |      -1      |      p5      |  p0      (-1: no future query can see it)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from loraplex.adapters.pages import PagePool

OWNER = "kv"
"""The pool's name for pages of the KV cache."""

FREED = -1

MAX_GROUPS = 8
"""Backends have room for as many page tables in a step."""


@dataclass(frozen=True)
class GroupSpec:
    """Layers that share pages. `len(layers)` may fall short of the page's layer places: the rest is padding."""

    layers: tuple[int, ...]
    window: int | None


def kv_groups(windows: ListLike[int | None]) -> tuple[GroupSpec, ...]:
    """Cut layers (`windows[i]` is layer i's window) into groups of one window and equal size.

    The size is the least frequent window's layer count, or the most frequent one's where they are within a quarter of
    each other (12 and 13 layers make two groups of 13, not two of 12 and one of 1), or more where that makes too many
    groups; a window's last group may be padded. Gemma 3 (26 layers, 4 of them full): 1 + 6 groups of 4 with 2 places
    unused.
    """
    by_window: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        by_window.setdefault(window, []).append(layer)
    counts = [len(layers) for layers in by_window.values()]
    size = max(counts) if 4 * max(counts) < 5 * min(counts) else min(counts)
    while sum(-(-count // size) for count in counts) > max(MAX_GROUPS, len(counts)):
        size += 1
    return tuple(
        GroupSpec(tuple(layers[start : start + size]), window)
        for window, layers in by_window.items()
        for start in range(0, len(layers), size)
    )


def group_layers(groups: ListLike[GroupSpec]) -> int:
    """Layer places in every KV page."""
    return max(len(group.layers) for group in groups)


def peak_pages(groups: ListLike[GroupSpec], block_size: int, num_tokens: int, chunk: int) -> int:
    """The most pages a sequence of `num_tokens` ever holds when at most `chunk` tokens are computed in a step."""
    blocks = -(-num_tokens // block_size)
    total = 0
    for group in groups:
        # A chunk's queries see window - 1 + chunk keys; an interval that long touches at most this many blocks.
        most = blocks if group.window is None else (group.window + chunk - 3 + block_size) // block_size + 1
        total += min(blocks, most)
    return total


class KVCache:
    """Block tables of all sequences. Keys are the caller's sequence numbers. One thread only."""

    def __init__(self, pool: PagePool, groups: ListLike[GroupSpec], block_size: int) -> None:
        self.pool = pool
        self.groups = tuple(groups)
        self.block_size = block_size
        self._tables: dict[int, tuple[array[int], ...]] = {}  # sequence -> per group: page of each block, or FREED
        self._held: dict[int, int] = {}  # sequence -> pages it holds, all groups

    def missing(self, seq: int, num_computed: int, num_tokens: int) -> int:
        """Pages that grow() would take."""
        tables = self._tables.get(seq)
        last = -(-num_tokens // self.block_size)
        if tables is None:
            return sum(last - min(last, self._first_visible(group, num_computed)) for group in self.groups)
        return sum(max(0, last - len(table)) for table in tables)

    def grow(self, seq: int, num_computed: int, num_tokens: int) -> bool:
        """Make room for `seq` to hold `num_tokens` tokens, of which `num_computed` are stored and the rest come now.

        False when the pages are not there: then nothing is taken.
        """
        pages = self.pool.alloc(self.missing(seq, num_computed, num_tokens), OWNER)
        if pages is None:
            return False
        if seq not in self._tables:
            # A sequence that starts past position 0 (a cached prefix) never needs what its windows have left behind.
            self._tables[seq] = tuple(
                array("i", [FREED] * self._first_visible(group, num_computed)) for group in self.groups
            )
            self._held[seq] = 0
        self._held[seq] += len(pages)
        last = -(-num_tokens // self.block_size)
        start = 0
        for table in self._tables[seq]:
            count = max(0, last - len(table))
            table.extend(pages[start : start + count])
            start += count
        return True

    def trim(self, seq: int, num_computed: int) -> int:
        """Free the pages that no query from position `num_computed` on can see. Returns how many."""
        freed: list[int] = []
        for group, table in zip(self.groups, self._tables[seq], strict=True):
            block = min(self._first_visible(group, num_computed), len(table)) - 1
            while block >= 0 and table[block] != FREED:
                freed.append(table[block])
                table[block] = FREED
                block -= 1
        self.pool.free(freed)
        self._held[seq] -= len(freed)
        return len(freed)

    def free(self, seq: int) -> int:
        """Free all pages of `seq` and forget it. Returns how many; 0 for one that holds none."""
        tables = self._tables.pop(seq, ())
        pages = [page for table in tables for page in table if page != FREED]
        self.pool.free(pages)
        self._held.pop(seq, None)
        return len(pages)

    def tables(self, seq: int) -> tuple[array[int], ...]:
        """Per group, the page of each block (int32, FREED where it is past the window). Read only; do not keep."""
        return self._tables[seq]

    def held(self, seq: int) -> int:
        """Pages `seq` holds."""
        return self._held.get(seq, 0)

    def peak_pages(self, num_tokens: int, chunk: int) -> int:
        """See peak_pages()."""
        return peak_pages(self.groups, self.block_size, num_tokens, chunk)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every table's pages are its own and are exactly the pool's "kv" pages."""
        seen: set[int] = set()
        for seq, tables in self._tables.items():
            pages = [page for table in tables for page in table if page != FREED]
            assert len(pages) == self._held[seq], f"sequence {seq} holds {len(pages)} pages, counted {self._held[seq]}"
            assert len({len(table) for table in tables}) == 1, f"sequence {seq}: its groups' tables differ in length"
            for group, table in zip(self.groups, tables, strict=True):
                live = [page != FREED for page in table]
                assert live == sorted(live), f"sequence {seq}: a freed block after a live one, window {group.window}"
            for page in pages:
                assert page not in seen, f"page {page} is in two tables"
                seen.add(page)
        assert self._tables.keys() == self._held.keys(), "tables and page counts name different sequences"
        used = self.pool.used_by(OWNER)
        assert len(seen) == used, f"{len(seen)} pages in tables, but the pool counts {used}"
        self.pool.check_integrity()

    def _first_visible(self, group: GroupSpec, position: int) -> int:
        """The first block that a query at `position` or later can see."""
        if group.window is None:
            return 0
        return max(0, position - group.window + 1) // self.block_size
