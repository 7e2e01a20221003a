"""Full blocks of keys and values, found by what they were computed from, shared, and kept for as long as there is room.

A block's key is a hash chained over the tokens before it, from a root that stands for everything else that its keys and
values depend on (adapters and weights, tenant, rotary variant):

    key of block i = blake2b-128(key of block i - 1 | turns in block i | tokens of block i),    key of block -1 = root

A turn is a position from which on the sequence wears more than before (an activated LoRA): blocks before it are found
by whoever wears what they were computed with, the base itself mostly. So equal keys mean equal contents, for all that a
128-bit hash can tell. Integers only.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as ListLike
from hashlib import blake2b

from loraplex.adapters.tiers.eviction import Reclaimer
from loraplex.adapters.tiers.pages import PagePool

USED = "kv"
"""The pool's name for pages that sequences refer to."""

IDLE = "prefix"
"""The pool's name for pages of cached blocks that no sequence refers to."""


Turns = tuple[tuple[int, bytes], ...]
"""(position, what the keys and values depend on from there on), by position."""


def block_key(before: bytes, tokens: ListLike[int], turned: bytes = b"") -> bytes:
    """Make the key [16 bytes] of the block with `tokens` after the block with key `before` (or the root).

    turned: the turns in the block.
    """
    return blake2b(before + turned + array("i", tokens).tobytes(), digest_size=16).digest()


def turned_in(turns: Turns, start: int, stop: int) -> bytes:
    """List what turns at the positions [start, stop)."""
    return b"".join(what for position, what in turns if start <= position < stop)


class Block:
    """A cached block's pages in the KV groups of one window. Never written to again."""

    __slots__ = ("key", "lane", "pages", "refs", "uses")

    def __init__(self, lane: int, key: bytes, pages: tuple[int, ...]) -> None:
        self.lane = lane
        self.key = key
        self.pages = pages  # one for each group of the lane
        self.refs = 1  # sequences whose tables show them
        self.uses = 1  # sequences that had it in their tables, so far

    def __repr__(self) -> str:
        return f"Block(lane {self.lane}, {self.key.hex()[:8]}, pages {self.pages}, {self.refs} refs)"


class PrefixCache:
    """The cached blocks of each lane (the KV groups with one window), referred to or idle."""

    def __init__(self, pool: PagePool, reclaimer: Reclaimer, num_lanes: int, block_size: int) -> None:
        self.token_seconds = 1e-3
        """What computing a token's keys and values anew takes, in seconds; a guess until it is measured."""
        self._pool = pool
        self._block_size = block_size
        self._idle = reclaimer.owner(IDLE, self._evict)
        self._blocks: tuple[dict[bytes, Block], ...] = tuple({} for _ in range(num_lanes))

    def find(self, lane: int, key: bytes) -> Block | None:
        """Find the block, if it is cached."""
        return self._blocks[lane].get(key)

    def insert(self, lane: int, key: bytes, pages: tuple[int, ...]) -> Block:
        """Make the pages of a sequence's block findable. The sequence refers to the block from now on."""
        block = self._blocks[lane][key] = Block(lane, key, pages)
        return block

    def take(self, block: Block) -> None:
        """Count one more sequence that refers to the block."""
        if block.refs == 0:
            self._idle.remove(block)
            self._pool.assign(block.pages, USED)
        block.refs += 1

    def release(self, block: Block) -> None:
        """Count one sequence less that refers to the block; after the last it is idle.

        Release a sequence's blocks from the last to the first: a block is used no less than those after it, so none
        goes while one that can only be found through it stays.
        """
        block.refs -= 1
        if block.refs == 0:
            self._pool.assign(block.pages, IDLE)
            self._idle.add(block, len(block.pages), self._block_size * self.token_seconds, block.uses)

    def check_integrity(self, refs: dict[Block, int]) -> int:
        """Raise AssertionError unless every cached block is referred to as `refs` counts, and idle where it is not.

        Returns the pages of the blocks that are referred to.
        """
        used, idle = 0, 0
        for lane, blocks in enumerate(self._blocks):
            for key, block in blocks.items():
                assert (block.lane, block.key) == (lane, key), f"{block!r} is filed under another key"
                assert block.refs == refs.get(block, 0), f"{block!r} is in {refs.get(block, 0)} tables"
                assert (block in self._idle) == (block.refs == 0), f"{block!r} is referred to and idle, or neither"
                assert block.uses >= 1
                used += len(block.pages) if block.refs else 0
                idle += 0 if block.refs else len(block.pages)
        assert all(self.find(block.lane, block.key) is block for block in refs), "a table shows a block not cached"
        assert idle == self._idle.pages == self._pool.used_by(IDLE), f"{idle} idle pages, the pool counts otherwise"
        return used

    def _evict(self, block: Block) -> int:
        del self._blocks[block.lane][block.key]
        self._pool.free(block.pages)
        return len(block.pages)
