"""Shared blocks against a plain model: what every table reads is what it would have computed, and nothing is lost.

The model writes into each place of a page what its keys and values are a function of: the root and all tokens up to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex.adapters.tiers.eviction import Reclaimer
from loraplex.adapters.tiers.pages import PagePool
from loraplex.server.engine.policy.kv_cache import FREED, KVCache
from loraplex.server.engine.policy.kv_groups import GroupSpec
from loraplex.server.engine.policy.prefix_cache import block_key

GROUPS = {
    "full": (GroupSpec((0,), None),),
    "window": (GroupSpec((0,), 5),),
    "full and windows": (GroupSpec((0,), 7), GroupSpec((1,), None), GroupSpec((2,), 7), GroupSpec((3,), 2)),
    "two full": (GroupSpec((0,), None), GroupSpec((1,), None), GroupSpec((2,), 1)),
}
ROOTS = (b"root a", b"root b", None)
Prefix = tuple[bytes, tuple[int, ...]]


@dataclass
class _Seq:
    root: bytes | None
    tokens: list[int]
    computed: int
    asked: int  # tokens looked up and not counted yet
    adopted: int
    trimmed: int = 0
    shared: dict[tuple[int | None, int], Prefix] = field(default_factory=dict)  # (window, block) -> what it is


class PrefixMachine(RuleBasedStateMachine):
    @initialize(
        groups=st.sampled_from(sorted(GROUPS)), block_size=st.sampled_from([1, 2, 4]), num_pages=st.integers(16, 70)
    )
    def start(self, groups: str, block_size: int, num_pages: int) -> None:
        self.groups = GROUPS[groups]
        self.windows = list(dict.fromkeys(group.window for group in self.groups))
        self.size = block_size
        self.pool = PagePool(num_pages)
        self.kv = KVCache(self.pool, self.groups, block_size, Reclaimer())
        self.seqs: dict[int, _Seq] = {}
        self.next = 0
        self.memory: dict[tuple[int, int], tuple[bytes | None, tuple[int, ...]]] = {}  # (page, offset) -> contents
        self.cached: dict[tuple[int | None, Prefix], tuple[int, ...]] = {}  # (window, contents) -> its groups' pages
        self.hits = self.queries = 0

    # -- the model's own words -----------------------------------------------------------------------------------------

    def members(self, window: int | None) -> list[int]:
        return [index for index, group in enumerate(self.groups) if group.window == window]

    def prefix(self, seq: _Seq, blocks: int) -> Prefix:
        assert seq.root is not None
        return seq.root, tuple(seq.tokens[: blocks * self.size])

    def oldest(self, window: int | None, position: int) -> int:
        return 0 if window is None else max(0, position - window + 1)

    def longest(self, seq: _Seq) -> int:
        """Blocks that could be taken: for each window, all that hold a key which the next token sees."""
        for blocks in range((len(seq.tokens) - 1) // self.size, 0, -1):
            needed = [
                (window, self.prefix(seq, block + 1))
                for window in self.windows
                for block in range(self.oldest(window, blocks * self.size) // self.size, blocks)
            ]
            if all(key in self.cached for key in needed):
                return blocks
        return 0

    def in_use(self) -> set[tuple[int | None, Prefix]]:
        return {(window, prefix) for seq in self.seqs.values() for (window, _), prefix in seq.shared.items()}

    # -- what happens --------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.seqs) < 6)
    @rule(root=st.sampled_from(ROOTS), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24), data=st.data())
    def adopt(self, root: bytes | None, tokens: list[int], data: st.DataObject) -> None:
        known = [prefix for _, prefix in self.cached]
        if known and data.draw(st.booleans()):  # go on from something cached, or from part of it
            root, start = data.draw(st.sampled_from(sorted(known)))
            tokens = [*start[: data.draw(st.integers(0, len(start)))], *tokens]
        seq = _Seq(root, tokens, 0, 0, 0)
        number = self.next
        self.next += 1
        expected = 0 if root is None else self.longest(seq)
        free = self.pool.num_free
        found = self.kv.adopt(number, root, tokens)
        assert found == expected * self.size
        assert self.pool.num_free == free, "what is cached is taken, not copied"
        seq.computed = seq.adopted = seq.trimmed = found
        seq.asked = 0 if root is None else len(tokens)
        for window in self.windows if found else ():
            for block in range(self.oldest(window, found) // self.size, expected):
                seq.shared[window, block] = self.prefix(seq, block + 1)
        assert (self.kv.held(number) == 0) == (found == 0)
        self.seqs[number] = seq

    def compute(self, number: int, count: int) -> bool:
        """A step of one sequence: room, new keys and values, and a look at all those that its queries see."""
        seq = self.seqs[number]
        last = seq.computed + count
        missing = self.kv.missing(number, seq.computed, last)
        fits = missing <= self.pool.num_free
        assert self.kv.grow(number, seq.computed, last) == fits
        if not fits:
            return False
        self.queries += seq.asked
        self.hits += seq.adopted if seq.asked else 0
        seq.asked = 0
        tables = self.kv.tables(number)
        for index, group in enumerate(self.groups):
            for position in range(seq.computed, last):
                page, offset = tables[index][position // self.size], position % self.size
                users = [other for other in self.seqs if self.kv.held(other) and self.shows(other, page)]
                assert users == [number], "a page that somebody shares is written to"
                assert not any(page in pages for pages in self.cached.values()), "a cached page is written to"
                self.memory[page, offset] = (seq.root, tuple(seq.tokens[: position + 1]))
            for position in range(seq.computed, last):
                for key in range(self.oldest(group.window, position), position + 1):
                    found = self.memory[tables[index][key // self.size], key % self.size]
                    assert found == (seq.root, tuple(seq.tokens[: key + 1])), "a table shows another's keys"
        seq.computed = last
        return True

    def shows(self, number: int, page: int) -> bool:
        return any(page in table for table in self.kv.tables(number))

    @precondition(lambda self: self.seqs)
    @rule(data=st.data(), count=st.integers(1, 9), token=st.integers(0, 1), publish=st.integers(0, 4))
    def step(self, data: st.DataObject, count: int, token: int, publish: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.seqs)))
        seq = self.seqs[number]
        if not self.compute(number, min(count, len(seq.tokens) - seq.computed)):
            return
        if seq.computed == len(seq.tokens):
            seq.tokens.append(token)
        if publish:  # now and then not: it may come after several steps, and after blocks have left the window
            self.kv.publish(number, seq.root, seq.tokens, seq.computed)
            self.published(number)
        held = self.kv.held(number)
        assert self.kv.trim(number, seq.computed) == held - self.kv.held(number)
        seq.trimmed = seq.computed
        for window, block in tuple(seq.shared):
            if (block + 1) * self.size <= self.oldest(window, seq.computed):
                del seq.shared[window, block]

    def published(self, number: int) -> None:
        seq = self.seqs[number]
        if seq.root is None:
            return
        for window in self.windows:
            members = self.members(window)
            for block in range(self.oldest(window, seq.trimmed) // self.size, seq.computed // self.size):
                pages = tuple(self.kv.tables(number)[group][block] for group in members)
                assert FREED not in pages
                prefix = self.prefix(seq, block + 1)
                assert self.cached.setdefault((window, prefix), pages) == pages, "the same block is kept twice"
                seq.shared[window, block] = prefix

    @precondition(lambda self: self.seqs)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.seqs)))
        held = self.kv.held(number)
        assert self.kv.free(number) == held
        assert self.kv.held(number) == 0
        del self.seqs[number]

    @rule(pages=st.integers(1, 12))
    def reclaim(self, pages: int) -> None:
        idle = self.cached.keys() - self.in_use()
        free = self.pool.num_free
        freed = self.kv.reclaimer.reclaim(pages)
        assert freed == self.pool.num_free - free
        gone = {key for key in self.cached if self.find(key) is None}
        assert gone <= idle
        assert freed == sum(len(self.cached[key]) for key in gone)
        assert freed >= pages or gone == idle
        for key in gone:
            del self.cached[key]
        for window, (root, tokens) in self.cached:
            for blocks in range(1, len(tokens) // self.size if window is None else 0):
                assert (None, (root, tokens[: blocks * self.size])) in self.cached, "a block is left that none can find"

    def find(self, key: tuple[int | None, Prefix]) -> object:
        window, (root, tokens) = key
        chain = root
        for start in range(0, len(tokens), self.size):
            chain = block_key(chain, tokens[start : start + self.size])
        return self.kv._prefixes.find(self.windows.index(window), chain)

    @invariant()
    def agrees(self) -> None:
        self.kv.check_integrity()
        shown = {
            page
            for number in self.seqs
            if self.kv.held(number)
            for table in self.kv.tables(number)
            for page in table
            if page != FREED
        }
        cached = {page for pages in self.cached.values() for page in pages}
        assert self.pool.used_by("kv") == len(shown)
        assert self.pool.used_by("prefix") == len(cached - shown) == self.kv.reclaimer.idle_pages
        assert self.pool.num_free == self.pool.num_pages - len(cached | shown)
        assert (self.kv.hits, self.kv.queries) == (self.hits, self.queries)

    def teardown(self) -> None:
        if not hasattr(self, "kv"):
            return
        for number in self.seqs:
            self.kv.free(number)
        self.kv.reclaimer.reclaim(self.pool.num_pages)
        assert self.pool.num_free == self.pool.num_pages
        self.kv.check_integrity()


TestPrefixCache = PrefixMachine.TestCase
TestPrefixCache.settings = settings(max_examples=150, stateful_step_count=50)


def _cache(pages: int = 64, groups: tuple[GroupSpec, ...] = GROUPS["full"], size: int = 4) -> KVCache:
    return KVCache(PagePool(pages), groups, size, Reclaimer())


def _run(cache: KVCache, seq: int, tokens: list[int], root: bytes | None = b"root") -> int:
    """Compute all of `tokens` in one step; returns how many were found."""
    found = cache.adopt(seq, root, tokens)
    assert cache.grow(seq, found, len(tokens))
    cache.publish(seq, root, tokens, len(tokens))
    cache.trim(seq, len(tokens))
    return found


def test_a_shared_system_prompt_is_found_by_the_same_root_alone() -> None:
    cache = _cache()
    system = list(range(100, 110))  # two blocks and a half
    assert _run(cache, 1, [*system, 1, 2]) == 0
    assert _run(cache, 2, [*system, 3, 4]) == 8
    assert _run(cache, 3, [*system, 3, 4], root=b"another adapter") == 0
    assert _run(cache, 4, [*system, 3, 4], root=None) == 0
    assert cache.tables(1)[0][:2] == cache.tables(2)[0][:2]
    assert cache.tables(1)[0][2] != cache.tables(2)[0][2], "the block in which they part is each one's own"
    assert cache.pool.used_by("kv") == 4 + 3 + 3
    assert (cache.hits, cache.queries) == (8, 36)
    cache.check_integrity()


def test_what_is_before_a_turn_is_everybodys_and_what_is_after_it_its_own() -> None:
    """Blocks of 4: the turn at 10 is in the third one, and the turn at 8 begins it."""
    cache = _cache()
    tokens = list(range(100, 118))
    asked = ((10, b"asked"),)

    def run(seq: int, turns: tuple[tuple[int, bytes], ...]) -> int:
        found = cache.adopt(seq, b"root", tokens, turns)
        assert cache.grow(seq, found, len(tokens))
        cache.publish(seq, b"root", tokens, len(tokens), turns)
        return found

    assert run(1, ()) == 0
    assert run(2, asked) == 8, "the two blocks before it are the base's"
    assert run(3, asked) == 16
    assert run(4, ((10, b"other"),)) == 8
    assert run(5, ((9, b"asked, from 9"),)) == 8
    assert run(6, ((8, b"asked, from 8"),)) == 8
    assert run(7, ((7, b"asked, from 7"),)) == 4
    assert run(8, ((2, b"first"), (10, b"asked"))) == 0
    assert run(9, ((2, b"first"),)) == 8
    assert run(10, ((2, b"first"), (10, b"asked"))) == 16
    assert run(11, ((40, b"beyond"),)) == 16
    cache.check_integrity()


def test_one_token_is_always_left() -> None:
    cache = _cache()
    assert _run(cache, 1, list(range(8))) == 0
    assert cache.adopt(2, b"root", list(range(8))) == 4
    assert cache.adopt(3, b"root", list(range(9))) == 8
    assert cache.adopt(4, b"root", list(range(4))) == 0
    assert cache.held(4) == 0
    assert cache.adopt(5, b"root", [7]) == 0


def test_blocks_outlive_their_sequence_until_the_pages_are_wanted_leaves_first() -> None:
    cache = _cache(pages=8)
    tokens = list(range(20))
    _run(cache, 1, tokens)
    assert cache.free(1) == 5
    assert (cache.pool.used_by("kv"), cache.pool.used_by("prefix")) == (0, 5)
    assert cache.reclaimer.reclaim(2) == 2
    assert cache.adopt(2, b"root", [*tokens, 9]) == 12
    assert cache.reclaimer.idle_pages == 0
    assert cache.reclaimer.reclaim(1) == 0, "what a sequence has adopted stays"


def test_concurrent_twins_end_up_with_one_copy() -> None:
    """Both compute the same prompt in the same step: the second to publish takes the first one's pages."""
    cache = _cache()
    tokens = list(range(9))
    for seq in (1, 2):
        assert cache.adopt(seq, b"root", tokens) == 0
        assert cache.grow(seq, 0, 9)
    assert cache.pool.used_by("kv") == 6
    for seq in (1, 2):
        cache.publish(seq, b"root", tokens, 9)
    assert cache.pool.used_by("kv") == 4
    assert cache.tables(1)[0][:2] == cache.tables(2)[0][:2]
    assert cache.held(1) == cache.held(2) == 3
    assert [block.uses for block in cache._prefixes._blocks[0].values()] == [2, 2]
    cache.free(1)
    assert cache.pool.used_by("prefix") == 0
    cache.check_integrity()


def test_a_window_needs_only_what_it_sees() -> None:
    """The window's first blocks are gone, the full group's are not: a hit at the end works, one further up does not."""
    groups = (GroupSpec((0,), None), GroupSpec((1,), 6))
    cache = _cache(groups=groups)
    tokens = list(range(24))
    _run(cache, 1, tokens)  # the window has left blocks 0 to 3 (tokens 0 to 15)
    assert cache.reclaimer.idle_pages == 4
    assert cache.adopt(2, b"root", [*tokens[:12], 99]) == 12, "what the window has left is still cached"
    cache.free(2)
    cache.reclaimer.reclaim(4)
    assert cache.adopt(3, b"root", [*tokens[:12], 99]) == 0
    assert cache.adopt(4, b"root", [*tokens, 99]) == 24
    full, window = cache.tables(4)
    assert FREED not in full
    assert [page == FREED for page in window] == [True] * 4 + [False] * 2  # a query at 24 sees 19 to 24
    cache.check_integrity()


def test_a_failed_admission_counts_for_nothing() -> None:
    cache = _cache()
    tokens = list(range(9))
    _run(cache, 1, tokens)
    cache.free(1)
    [before] = {block.uses for block in cache._prefixes._blocks[0].values()}
    for _ in range(5):
        assert cache.adopt(2, b"root", tokens) == 8
        assert cache.free(2) == 2
    assert (cache.hits, cache.queries) == (0, 9)
    assert cache._asked == {}
    assert {block.uses for block in cache._prefixes._blocks[0].values()} == {before}
    assert _run(cache, 2, tokens) == 8
    assert (cache.hits, cache.queries) == (8, 18)
    assert {block.uses for block in cache._prefixes._blocks[0].values()} == {before + 1}


def test_often_used_prefixes_stay() -> None:
    cache = _cache()
    for seq, root in enumerate([b"rare", b"often", b"often", b"often", b"late"]):
        _run(cache, seq, list(range(9)), root)
    for seq in range(5):
        cache.free(seq)
    cache.reclaimer.reclaim(4)
    assert cache.adopt(9, b"often", list(range(9))) == 8
    assert cache.adopt(10, b"rare", list(range(9))) == 0
    assert cache.adopt(11, b"late", list(range(9))) == 0


def test_a_block_costs_what_computing_it_takes() -> None:
    """Against an adapter of the same size: whichever takes longer to bring back stays."""
    for token_seconds, first in ((1e-3, "adapter"), (1e-5, "prefix")):
        cache = _cache(size=4)
        adapters = cache.reclaimer.owner("adapter", lambda key: 1)
        cache.token_seconds = token_seconds
        _run(cache, 1, list(range(5)))
        cache.free(1)
        adapters.add("a", 1, cost=1e-3, uses=1.0)
        cache.reclaimer.reclaim(1)
        assert cache.reclaimer.evictions == {"prefix": 0, "adapter": 0} | {first: 1}


def test_adopting_is_for_who_has_nothing() -> None:
    cache = _cache()
    _run(cache, 1, [1, 2])
    with pytest.raises(ValueError, match="sequence 1 holds pages already"):
        cache.adopt(1, b"root", [1, 2])


@pytest.mark.parametrize("damage", ["refs", "table", "pool", "index", "heap"])
def test_integrity_check_sees_damage(damage: str) -> None:
    cache = _cache()
    _run(cache, 1, list(range(12)))
    _run(cache, 2, list(range(9)))
    cache.free(1)
    cache.check_integrity()
    blocks = list(cache._prefixes._blocks[0].values())
    if damage == "refs":
        blocks[0].refs += 1
    elif damage == "table":
        cache.tables(2)[0][0] = cache.tables(2)[0][1]
    elif damage == "pool":
        cache.pool.assign(blocks[2].pages, "kv")
    elif damage == "index":
        del cache._prefixes._blocks[0][blocks[0].key]
    else:
        cache._prefixes._idle.remove(blocks[2])
    with pytest.raises(AssertionError):
        cache.check_integrity()
