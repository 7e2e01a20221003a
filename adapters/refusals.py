"""How many adapters were looked at and refused, by reason: what an operator's alert counts. Free of torch."""

from __future__ import annotations

import threading
from collections import Counter

from loraplex.adapters.errors import AdapterRefused, AdapterUnavailable

REASONS = (
    "bad_config",
    "bad_file",
    "bad_source",
    "forbidden",
    "missing_extra",
    "missing_file",
    "missing_tensor",
    "needs_setting",
    "no_effect",
    "not_finite",
    "shape_mismatch",
    "too_large",
    "unavailable",
    "unmatched_tensor",
    "unsupported_kind",
    "unsupported_option",
)
"""AdapterRefused's codes, but for "changed", "unread" and "bad_golden": a request's misfortune, and its
adapter is served on. Further "unavailable": the source could not be reached.
"""

OTHER = "other"
"""What has none of these codes: whatever is raised, there are no more series than these."""


class Refusals:
    """Counters. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def count(self, error: object) -> None:
        """Count why an adapter could not be had, where `error` is one of these reasons."""
        if isinstance(error, AdapterUnavailable):
            reason = "unavailable"
        elif isinstance(error, AdapterRefused) and error.code != "changed":
            reason = reason_of(error)
        else:
            return
        with self._lock:
            self._counts[reason] += 1

    def counts(self) -> dict[str, int]:
        """Return the counts by reason: all of REASONS and OTHER."""
        with self._lock:
            return {reason: self._counts[reason] for reason in (*REASONS, OTHER)}


def reason_of(error: AdapterRefused) -> str:
    """Return the error's code, where that is one of REASONS."""
    return error.code if error.code in REASONS else OTHER
