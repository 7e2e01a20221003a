"""A clock that goes on by a microsecond whenever it is asked, for tests whose every run has to be the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from unittest.mock import patch


@contextmanager
def counted_clock(*modules: str) -> Iterator[None]:
    """One for the `perf_counter` of all these modules while the block runs.

    Who is evicted hangs on how long bringing it took; Hypothesis has to find the same whenever it tries the same again.
    """
    asked = count()
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch(f"{module}.perf_counter", lambda: next(asked) / 2**20))  # differences are exact
        yield
