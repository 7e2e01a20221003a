"""How a share of a limit is shown, wherever one is printed or written: none above 1 without saying what that means.

Nothing does more than a limit allows, so what is above 1.00 of one says that the limit was measured wrongly, and with
it that no share of it can be trusted.
"""

from __future__ import annotations

WRONG = "the limit is wrong"


def exceeds(share: float) -> bool:
    """Whether a share would be shown as more than 1.00, or 100 %."""
    return round(share, 2) > 1


def percent(share: float) -> str:
    """71%, or 180% (the limit is wrong)."""
    return f"{share:.0%}{_note(share)}"


def fraction(share: float) -> str:
    """0.71, or 1.80 (the limit is wrong)."""
    return f"{share:.2f}{_note(share)}"


def times_least(ratio: float) -> str:
    """Of a time to the least: 1.41, or 0.55 (the limit is wrong)."""
    return f"{ratio:.2f}{_note(1 / max(ratio, 1e-9))}"


def _note(share: float) -> str:
    return f" ({WRONG})" if exceeds(share) else ""
