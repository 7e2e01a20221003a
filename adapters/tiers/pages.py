"""PagePool: which page of the arena belongs to whom. Integers only; the bytes are the arena's.

One pool serves adapters ("adapter"), the KV cache of sequences ("kv") and cached prefixes nobody uses at the moment
("prefix"), so memory goes to whichever needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable


class PagePool:
    """Hands out pages 0 .. num_pages - 1. The lowest free numbers are not promised; a freed page is reused first.

    Not thread-safe: the engine thread is its only user.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"a pool of {num_pages} pages was asked for; expected 0 or more")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the last freed page is the warmest in cache
        self._owner: list[str | None] = [None] * num_pages
        self._used: dict[str, int] = {}
        self.reached = 0  # pages 0 to reached - 1 have been handed out at some time; the others never
        self.on_reached: Callable[[], None] = lambda: None  # called when it has grown

    @property
    def num_free(self) -> int:
        """Count the pages nobody owns."""
        return len(self._free)

    def used_by(self, owner: str) -> int:
        """Count the pages `owner` holds."""
        return self._used.get(owner, 0)

    def owners(self) -> tuple[str | None, ...]:
        """List who owns each page; None: nobody. 0.1 ms for 40,000."""
        return tuple(self._owner)

    def alloc(self, n: int, owner: str) -> list[int] | None:
        """Take `n` pages for `owner`. None when there are not that many: then nothing is taken."""
        if n < 0:
            raise ValueError(f"{n} pages were asked for; expected 0 or more")
        if n > len(self._free):
            return None
        if n == 0:
            return []
        pages = self._free[: -n - 1 : -1]
        del self._free[-n:]
        for page in pages:
            self._owner[page] = owner
        last = max(pages) + 1
        if last > self.reached:
            self.reached = last
            self.on_reached()
        self._used[owner] = self._used.get(owner, 0) + n
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back, whoever owns them.

        Raises ValueError for a page outside the pool, free already, or named twice; then none is freed.
        """
        pages = list(pages)
        for page in pages:
            if not 0 <= page < self.num_pages:
                raise ValueError(f"page {page} is not of this pool: it has pages 0 to {self.num_pages - 1}")
            if self._owner[page] is None:
                raise ValueError(f"page {page} is freed twice: nobody owns it")
        if len(set(pages)) != len(pages):
            raise ValueError(f"a page is named twice in one free(): {sorted(pages)}")
        for page in pages:
            owner = self._owner[page]
            assert owner is not None
            self._used[owner] -= 1
            self._owner[page] = None
            self._free.append(page)

    def assign(self, pages: Iterable[int], owner: str) -> None:
        """Hand pages that somebody owns to `owner`. Raises ValueError for a page that is free or foreign."""
        for page in pages:
            before = self._owner[page] if 0 <= page < self.num_pages else None
            if before is None:
                raise ValueError(f"page {page} is nobody's and cannot be handed on; expected one that is owned")
            self._owner[page] = owner
            self._used[before] -= 1
            self._used[owner] = self._used.get(owner, 0) + 1

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is either free or owned, once, and the counts agree."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert all(0 <= page < self.num_pages for page in free), "a foreign page is in the free list"
        counts: dict[str, int] = {}
        for page, owner in enumerate(self._owner):
            assert (owner is None) == (page in free), f"page {page} is owned by {owner!r} and free, or neither"
            if owner is not None:
                counts[owner] = counts.get(owner, 0) + 1
        used = {owner: n for owner, n in self._used.items() if n}
        assert used == counts, f"pages by owner are {counts} but counted as {used}"
