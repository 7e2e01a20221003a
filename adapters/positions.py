"""Which tokens of a prompt an adapter acts on, where these are some of its first and last ones (ReFT). No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

MOST_POSITIONS = 4096
"""First or last ones. Papers take up to 7; a prompt's tokens are the limit that counts."""

_WORDS = re.compile(r"(?:f(\d{1,4}))?\+?(?:l(\d{1,4}))?")


class Span(NamedTuple):
    """Positions [first, end), on which the tiles of a unit act."""

    first: int
    end: int
    unit: int = 0  # 1: of the second set of tiles that an adapter may have


@dataclass(frozen=True)
class Positions:
    """The first and last positions of each prompt; what is generated behind it is not acted on."""

    first: int
    last: int
    skipped: int = 0  # tokens at the prompt's very end that are behind the last ones
    halves: bool = False  # of a prompt too short for all: half of it each at most; else the last ones go before
    units: int = 1  # 2: the last ones have tiles of their own

    def spans(self, length: int) -> tuple[Span, ...]:
        """List what is acted on in a prompt of `length` tokens, ascending and apart."""
        length = max(0, length - self.skipped)
        most = length // 2 if self.halves else length
        begin = length - min(self.last, most)
        found = Span(0, min(self.first, most, begin)), Span(begin, length, self.units - 1)
        return tuple(span for span in found if span.first < span.end)

    def __str__(self) -> str:
        """Write them as pyreft does: "f3+l2"."""
        return "+".join([f"f{self.first}"] * bool(self.first) + [f"l{self.last}"] * bool(self.last))


def parse_positions(text: str) -> tuple[int, int] | None:
    """Read "f3+l2", "f3" or "l2" as (first, last); None where it is none of these, or too many."""
    found = _WORDS.fullmatch(text)
    first, last = (int(number or 0) for number in found.groups()) if found is not None else (0, 0)
    if not first + last > 0 or max(first, last) > MOST_POSITIONS or ("+" in text) != (first > 0 and last > 0):
        return None
    return first, last
