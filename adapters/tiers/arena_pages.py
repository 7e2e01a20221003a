"""The arena's bytes, by pages: an adapter's image is written to them in slices, and read back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from loraplex.kernels.hugepages import huge_zeros


class ArenaPages:
    """Engine thread only."""

    def __init__(self, arena: Tensor) -> None:
        """arena [num_pages, page_bytes] uint8, contiguous."""
        self._arena = arena
        on_cpu = arena.device.type == "cpu"
        self._memory = arena.view(-1).numpy().data if on_cpu else None  # [num_pages * page_bytes]

    def write(self, pages: Sequence[int], source: Tensor, first: int, last: int) -> None:
        """Copy bytes `first` to `last` of `source`, [len(pages), page_bytes] uint8, to where they belong in `pages`.

        On a GPU the copies are queued before whatever is computed next on the current stream.
        """
        spans = self._spans(pages, first, last)
        if self._memory is None:
            flat, arena = source.view(-1), self._arena.view(-1)
            for start, stop, target in spans:
                arena[target : target + stop - start].copy_(flat[start:stop], non_blocking=True)
            return
        # memcpy with the GIL held, 0.2 ms for 3.7 MB: torch would wake its threads (5 ms, median, beside a busy
        # process), and torch and numpy let go of the GIL at each page.
        data = source.reshape(-1).numpy().data
        for start, stop, target in spans:
            self._memory[target : target + stop - start] = data[start:stop]

    def views(self, pages: Sequence[int]) -> list[Tensor]:
        """Return `pages` as they lie, [page_bytes] uint8 each."""
        return [self._arena[page] for page in pages]

    def read(self, pages: Sequence[int]) -> Tensor:
        """Return what `pages` hold, [len(pages), page_bytes] uint8, in new host memory."""
        found = huge_zeros(len(pages) * self._arena.shape[1]).view(len(pages), -1)
        for target, page in zip(found, pages, strict=True):
            target.copy_(self._arena[page])
        return found

    def _spans(self, pages: Sequence[int], first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Split bytes `first` to `last` of an image at page ends: from, to, and where in the arena."""
        size = self._arena.shape[1]
        while first < last:
            index, start = divmod(first, size)
            stop = min(last, first + size - start)
            yield first, stop, pages[index] * size + start
            first = stop
