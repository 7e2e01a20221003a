"""A few cases of a test instead of the product of its parameters: for where a case takes seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest


def covering(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Choose cases of each test until every value of every parameter is in one of them, in the order of `items`.

    Greedy: always the case with the most values not met yet; of several, one whose values were met least, so that types
    and ranks take turns. A test without parameters stays.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = {item for of_one_test in cases.values() for item in _cover(of_one_test)}
    return [item for item in items if item in chosen]


def _cover(cases: Sequence[pytest.Item]) -> list[pytest.Item]:
    met: Counter[tuple[str, str]] = Counter()
    missing = set().union(*map(_values, cases))
    chosen = [] if missing else list(cases)
    while missing:
        best = max(cases, key=lambda case: (len(_values(case) & missing), -sum(met[value] for value in _values(case))))
        chosen.append(best)
        met.update(_values(best))
        missing -= _values(best)
    return chosen


def _values(item: pytest.Item) -> set[tuple[str, str]]:
    """Parameters and their values, in words; parameters that are given together are one."""
    params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    found = set()
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        found.add((str(mark.args[0]), repr([params.pop(name.strip()) for name in names])))
    return found | {(name, repr(value)) for name, value in params.items()}  # those of fixtures
