"""For all tests of adapters' files."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from loraplex.adapters.format import quiet_files


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    """Files written a moment ago are believed: tests write them whole, and do not wait."""
    with patch.object(quiet_files, "CHANGED_WAIT", 0.0):
        yield
