"""Where each sequence's keys and values lie: block tables per KV group, over the pages of the one pool.

A KV page holds `block_size` tokens of all layers of one group. Layers with the same attention window share groups, so
that pages a sliding window has left behind can be freed while the full-attention layers keep theirs; groups are of
equal size, so that pages are. Integers only.

    tokens of a sequence   0 ....... 15 | 16 ...... 31 | 32 ...... 47 | 48 ...
    table of a full group       p7      |      p2      |      p9      |  p4
    table of a window group     -1      |      -1      |      p5      |  p0      (-1: no future query can see it)
                           published: full, shared, read only ------->|  the sequence's own, written to

Blocks that are computed in full may be published: other sequences find them (prefix_cache.py) and show the same pages
in their tables. The groups of one window go together, as a lane: their tables have the same blocks at all times.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as ListLike

from loraplex.adapters.tiers.eviction import Reclaimer
from loraplex.adapters.tiers.pages import PagePool
from loraplex.server.engine.policy.block_tables import FREED, BlockTables
from loraplex.server.engine.policy.kv_groups import GroupSpec, peak_pages
from loraplex.server.engine.policy.prefix_cache import USED, Block, PrefixCache, Turns, block_key, turned_in


class KVCache:
    """Block tables of all sequences. Keys are the caller's sequence numbers. One thread only."""

    def __init__(
        self, pool: PagePool, groups: ListLike[GroupSpec], block_size: int, reclaimer: Reclaimer | None = None
    ) -> None:
        """`reclaimer` evicts idle cached blocks, and other owners' things; None: one for this cache alone."""
        self.pool = pool
        self.groups = tuple(groups)
        self.block_size = block_size
        self.reclaimer = reclaimer or Reclaimer()
        self.hits = 0  # tokens that adopt() found, of sequences that went on to grow()
        self.queries = 0  # tokens that it was asked for
        windows = list(dict.fromkeys(group.window for group in self.groups))
        self._lanes = tuple(
            (window, tuple(i for i, group in enumerate(self.groups) if group.window == window)) for window in windows
        )
        self._prefixes = PrefixCache(pool, self.reclaimer, len(windows), block_size)
        self._held: dict[int, BlockTables] = {}
        self._asked: dict[int, int] = {}  # sequence -> tokens that adopt() looked up, until grow() or free()

    @property
    def token_seconds(self) -> float:
        """Return what a token's prefill takes: losing a cached block costs block_size times as much."""
        return self._prefixes.token_seconds

    @token_seconds.setter
    def token_seconds(self, seconds: float) -> None:
        self._prefixes.token_seconds = seconds

    # -- what is shared ------------------------------------------------------------------------------------------------

    def adopt(self, seq: int, root: bytes | None, tokens: ListLike[int], turns: Turns = ()) -> int:
        """Give a sequence that holds nothing the cached blocks that `tokens` begin with, before its first grow().

        `root` and `turns` stand for all that keys and values depend on beside the tokens; None: nothing is shared.
        Returns how many tokens need not be computed: a multiple of block_size, less than len(tokens). 0: nothing was
        taken. Call free() where nothing comes of it.
        """
        if seq in self._held:
            raise ValueError(f"sequence {seq} holds pages already; cached blocks come before any of its own")
        if root is None:
            return 0
        self._asked[seq] = len(tokens)
        keys = self._longest(root, tokens, turns)
        if not keys:
            return 0
        held = self._held[seq] = self._new(len(keys) * self.block_size)
        held.key, held.published = keys[-1], len(keys)
        for index, key in enumerate(keys):
            for lane, (_, members) in enumerate(self._lanes):
                block = None
                if index >= len(held.tables[members[0]]):  # the window sees it
                    block = self._prefixes.find(lane, key)
                    assert block is not None, "a block found a moment ago is gone"
                    self._prefixes.take(block)
                    for group, page in zip(members, block.pages, strict=True):
                        held.tables[group].append(page)
                    held.pages += len(block.pages)
                held.blocks[lane].append(block)
        return len(keys) * self.block_size

    def publish(
        self, seq: int, root: bytes | None, tokens: ListLike[int], num_computed: int, turns: Turns = ()
    ) -> None:
        """Make the full blocks among the first `num_computed` of `tokens` findable as adopt() looks for them.

        Call after every step, before trim(); cheap where no block has become full. A block that another sequence was
        first to publish is swapped for that one, and its pages are freed.
        """
        held = self._held.get(seq)
        if root is None or held is None or (held.published + 1) * self.block_size > num_computed:
            return
        if held.published == 0:
            held.key = root
        for index in range(held.published, num_computed // self.block_size):
            held.key = self._key(held.key, tokens, index, turns)
            for lane, (_, members) in enumerate(self._lanes):
                held.blocks[lane].append(self._share(held, lane, members, index))
        held.published = num_computed // self.block_size

    # -- what a sequence has -------------------------------------------------------------------------------------------

    def missing(self, seq: int, num_computed: int, num_tokens: int) -> int:
        """Count the pages that grow() would take."""
        held = self._held.get(seq)
        last = -(-num_tokens // self.block_size)
        if held is None:
            return sum(last - min(last, self._first_visible(group.window, num_computed)) for group in self.groups)
        return max(0, last - len(held.tables[0])) * len(self.groups)

    def grow(self, seq: int, num_computed: int, num_tokens: int) -> bool:
        """Make room for `seq` to hold `num_tokens` tokens, of which `num_computed` are stored and the rest come now.

        False when the pages are not there: then nothing is taken.
        """
        pages = self.pool.alloc(self.missing(seq, num_computed, num_tokens), USED)
        if pages is None:
            return False
        held = self._held.get(seq)
        if seq in self._asked:
            self._count_adopted(self._asked.pop(seq), held)
        if held is None:
            # A sequence that starts past position 0 never needs what its windows have left behind.
            held = self._held[seq] = self._new(num_computed)
        held.pages += len(pages)
        last = -(-num_tokens // self.block_size)
        start = 0
        for table in held.tables if pages else ():
            count = max(0, last - len(table))
            table.extend(pages[start : start + count])
            start += count
        return True

    def trim(self, seq: int, num_computed: int) -> int:
        """Let go of the pages that no query from position `num_computed` on can see. Returns how many.

        Published ones stay cached if nobody else's are left, as those of free() do.
        """
        held = self._held[seq]
        before = held.pages
        for lane, (window, members) in enumerate(self._lanes):
            if window is not None:
                table = held.tables[members[0]]
                block = min(self._first_visible(window, num_computed), len(table)) - 1
                while block >= 0 and table[block] != FREED:
                    self._let_go(held, lane, members, block)
                    block -= 1
        return before - held.pages

    def free(self, seq: int) -> int:
        """Let go of all pages of `seq` and forget it. Returns how many; 0 for one that holds none.

        Its published blocks stay cached until their pages are reclaimed; its other pages are free at once.
        """
        self._asked.pop(seq, None)
        held = self._held.pop(seq, None)
        if held is None:
            return 0
        count = held.pages
        for lane, (_, members) in enumerate(self._lanes):
            table = held.tables[members[0]]
            for block in range(len(table) - 1, -1, -1):  # leaves first, see PrefixCache.release
                if table[block] == FREED:
                    break
                self._let_go(held, lane, members, block)
        return count

    @property
    def available(self) -> int:
        """Count the pages that can be had without taking them from anybody: free ones, and those of what is idle."""
        return self.pool.num_free + self.reclaimer.idle_pages

    def make_room(self, pages: int) -> bool:
        """Have `pages` free, if need be by evicting what is idle. Returns whether they are."""
        short = pages - self.pool.num_free
        return short <= 0 or self.reclaimer.reclaim(short) >= short

    def tables(self, seq: int) -> tuple[array[int], ...]:
        """List the page of each block per group (int32, FREED where it is past the window). Read only; do not keep."""
        return self._held[seq].tables

    def held(self, seq: int) -> int:
        """Count the pages in the tables of `seq`, those it shares with others included."""
        held = self._held.get(seq)
        return 0 if held is None else held.pages

    def peak_pages(self, num_tokens: int, chunk: int) -> int:
        """Return what peak_pages() does for the groups here."""
        return peak_pages(self.groups, self.block_size, num_tokens, chunk)

    def check_integrity(self) -> None:
        """Raise AssertionError unless each page of a table is either its sequence's own or that of a block it shares.

        And unless the pool, the cached blocks' reference counts and the Reclaimer agree with that.
        """
        own: set[int] = set()
        refs: dict[Block, int] = {}
        for seq, held in self._held.items():
            held.check(seq, self._lanes)
            for lane, (_, members) in enumerate(self._lanes):
                for index in range(len(held.tables[members[0]])):
                    pages = tuple(held.tables[group][index] for group in members)
                    block = held.blocks[lane][index] if index < held.published else None
                    if block is not None:
                        assert pages == block.pages, f"sequence {seq}: its table shows {pages} and not those of {block}"
                        refs[block] = refs.get(block, 0) + 1
                    elif pages[0] != FREED:
                        assert index >= held.published, f"sequence {seq}: block {index} is published and not shared"
                        assert own.isdisjoint(pages), f"one of the pages {pages} is in two tables"
                        own.update(pages)
        shared = {page for block in refs for page in block.pages}
        assert own.isdisjoint(shared), "a page is a sequence's own and shared"
        used = self._prefixes.check_integrity(refs)
        assert len(shared) == used, "a page is in two shared blocks"
        assert len(own) + used == self.pool.used_by(USED), f"{len(own) + used} pages in tables, the pool counts others"
        self.reclaimer.check_integrity()
        self.pool.check_integrity()

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _longest(self, root: bytes, tokens: ListLike[int], turns: Turns) -> list[bytes]:
        """List the keys of the longest usable cached prefix; one token is always left to compute.

        A prefix is usable if each lane has the blocks that its window sees from there on.
        """
        keys: list[bytes] = []
        usable = 0
        runs = [0] * len(self._lanes)  # cached blocks in a row, up to here
        for count in range(1, (len(tokens) - 1) // self.block_size + 1):
            keys.append(self._key(keys[-1] if keys else root, tokens, count - 1, turns))
            enough = True
            for lane, (window, _) in enumerate(self._lanes):
                runs[lane] = runs[lane] + 1 if self._prefixes.find(lane, keys[-1]) is not None else 0
                if runs[lane] == 0 and window is None:
                    return keys[:usable]
                enough = enough and runs[lane] >= count - self._first_visible(window, count * self.block_size)
            usable = count if enough else usable
        return keys[:usable]

    def _share(self, held: BlockTables, lane: int, members: tuple[int, ...], index: int) -> Block | None:
        """Share the block of one lane with the cache from now on; None where the window has left it."""
        pages = tuple(held.tables[group][index] for group in members)
        if pages[0] == FREED:
            return None
        block = self._prefixes.find(lane, held.key)
        if block is None:
            return self._prefixes.insert(lane, held.key, pages)
        self._prefixes.take(block)
        block.uses += 1
        for group, page in zip(members, block.pages, strict=True):
            held.tables[group][index] = page
        self.pool.free(pages)
        return block

    def _let_go(self, held: BlockTables, lane: int, members: tuple[int, ...], index: int) -> None:
        """Take one block of one lane out of a sequence's tables."""
        pages = [held.tables[group][index] for group in members]
        for group in members:
            held.tables[group][index] = FREED
        held.pages -= len(pages)
        block = held.blocks[lane][index] if index < held.published else None
        if block is None:
            self.pool.free(pages)
        else:
            held.blocks[lane][index] = None
            self._prefixes.release(block)

    def _count_adopted(self, asked: int, held: BlockTables | None) -> None:
        """Count what a sequence goes on with as used: only now, since a failed admission is tried again."""
        self.queries += asked
        if held is not None:
            self.hits += held.published * self.block_size
            for blocks in held.blocks:
                for block in blocks:
                    if block is not None:
                        block.uses += 1

    def _new(self, num_computed: int) -> BlockTables:
        """Make the tables of a sequence that starts at `num_computed`: they reach to what its windows see there."""
        tables = tuple(array("i", [FREED] * self._first_visible(group.window, num_computed)) for group in self.groups)
        return BlockTables(tables, len(self._lanes))

    def _key(self, before: bytes, tokens: ListLike[int], index: int, turns: Turns) -> bytes:
        start, stop = index * self.block_size, (index + 1) * self.block_size
        return block_key(before, tokens[start:stop], turned_in(turns, start, stop) if turns else b"")

    def _first_visible(self, window: int | None, position: int) -> int:
        """Find the first block that a query at `position` or later can see."""
        if window is None:
            return 0
        return max(0, position - window + 1) // self.block_size
