"""What one sequence has of the KV pages. Integers only."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from loraplex.server.engine.policy.prefix_cache import Block

FREED = -1


class BlockTables:
    """Pages of the sequence's own, and blocks that it shares."""

    __slots__ = ("blocks", "key", "pages", "published", "tables")

    def __init__(self, tables: tuple[array[int], ...], num_lanes: int) -> None:
        self.tables = tables  # per group: page of each block, or FREED
        self.pages = 0  # in all tables
        self.blocks: tuple[list[Block | None], ...] = tuple([] for _ in range(num_lanes))  # the published; None: freed
        self.published = 0  # blocks, from the first
        self.key = b""  # of the last published block, or the root

    def check(self, seq: int, lanes: Iterable[tuple[int | None, tuple[int, ...]]]) -> None:
        """Raise AssertionError unless the tables of `seq` agree with each other. lanes: (window, its groups)."""
        count = sum(page != FREED for table in self.tables for page in table)
        assert count == self.pages, f"sequence {seq} holds {count} pages, counted {self.pages}"
        assert len({len(table) for table in self.tables}) == 1, f"sequence {seq}: its groups' tables differ in length"
        assert all(len(blocks) == self.published for blocks in self.blocks), f"sequence {seq}: published is miscounted"
        for window, members in lanes:
            live = [[page != FREED for page in self.tables[group]] for group in members]
            assert live[0] == sorted(live[0]), f"sequence {seq}: a freed block after a live one, window {window}"
            assert all(other == live[0] for other in live), f"sequence {seq}: groups of window {window} differ"
