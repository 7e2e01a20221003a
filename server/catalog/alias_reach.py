"""What an alias comes to by way of the aliases that it stands for: each name once, and how far that may go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loraplex.adapters.errors import AdapterError

MAX_DEPTH = 8
"""Aliases that stand for aliases."""

MAX_REACHED = 64
"""Names that an alias comes to. There are 16 million ways through eight levels of eight aliases."""

Links = Mapping[str, Sequence[str]]
"""Alias -> the names of its targets."""


class AliasRefused(AdapterError):
    """An alias that cannot be: to nothing, to itself, or with weights that come to nothing."""


def reached(links: Links, name: str) -> Iterator[str]:
    """List what the alias comes to, aliases among it, each once."""
    seen, left = {name}, list(links.get(name, ()))
    while left:
        found = left.pop()
        if found not in seen:
            seen.add(found)
            yield found
            left += links.get(found, ())


def check_reach(links: Links, name: str) -> None:
    """Check what the alias, changed as `links` say, and those that stand for it come to. Raises AliasRefused."""
    _check_levels(links, name, name)
    for other in links:
        if other != name and name in reached(links, other):
            _check_levels(links, other, name)


def _check_levels(links: Links, start: str, changed: str) -> None:
    found, level = set[str](), set(links[start])
    for _ in range(MAX_DEPTH):
        if start in level:
            raise AliasRefused(f"alias {changed!r} would stand for itself, by {links[changed][0][:200]!r}")
        found |= level
        if len(found) > MAX_REACHED:
            raise AliasRefused(f"alias {changed!r}: {start!r} comes to more than {MAX_REACHED} names; give it fewer")
        level = {target for name in level for target in links.get(name, ())}
        if not level:
            return
    raise AliasRefused(
        f"alias {changed!r}: {start!r} would have more than {MAX_DEPTH} aliases one behind the other, by "
        f"{links[changed][0][:200]!r}"
    )
