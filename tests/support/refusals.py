"""What is refused is told apart by the code of its refusal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from loraplex.adapters.errors import AdapterRefused


@contextmanager
def refused(code: str, told: str = "") -> Iterator[None]:
    """Expect AdapterRefused with `code`; where `told`, a pattern, is given, it is in the message."""
    with pytest.raises(AdapterRefused) as caught:
        yield
    assert caught.value.code == code, caught.value
    assert re.search(told, str(caught.value)), f"{told!r} is not in {str(caught.value)!r}"
