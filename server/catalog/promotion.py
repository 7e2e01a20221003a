"""What an alias demands of the version that is to have all of its requests.

eval >= previous    it scored at least what the version in place did, on every golden set that both were scored on,
                    and there is such a set
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from loraplex.adapters.errors import AdapterError

Requirement = Literal["", "eval >= previous"]
"""Of an alias; "": none."""

ScoresOf = Callable[[str], Mapping[str, float]]
"""From a target to its scores, by golden set; none where it is no version of an adapter."""

SHOWN = 12
"""Digits of a golden set's digest."""


class PromotionRefused(AdapterError):
    """A promotion that the alias' policy does not allow, by the scores that are recorded."""


def check_promotion(alias: str, promoted: str, in_place: str, scores_of: ScoresOf) -> None:
    """Raise PromotionRefused unless the target `promoted` scored at least what `in_place` did."""
    if promoted == in_place:
        return
    new, old = scores_of(promoted), scores_of(in_place)
    shared = sorted(new.keys() & old.keys())
    if not shared:
        missing = [name for name, found in ((promoted, new), (in_place, old)) if not found]
        found = f"none of {' and '.join(missing)}" if missing else "none of the same golden set"
        raise PromotionRefused(
            f"alias {alias!r} requires eval >= previous: of {promoted} and {in_place}, found scores for {found}; "
            "run 'loraplex adapters eval' on both, with one golden set"
        )
    worse = [golden for golden in shared if new[golden] < old[golden]]
    if worse:
        told = ", ".join(f"{new[golden]:.4f} after {old[golden]:.4f} on {golden[:SHOWN]}" for golden in worse)
        raise PromotionRefused(
            f"alias {alias!r} requires eval >= previous: {promoted} scored less than {in_place}: {told}; nothing is "
            "changed"
        )
