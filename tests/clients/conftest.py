"""What `run.py` tells the clients' tests. Without it nothing here is collected: each client has another environment."""

from __future__ import annotations

import os

import pytest

if "LORAPLEX_URL" not in os.environ:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def url() -> str:
    """Of the server, without a path."""
    return os.environ["LORAPLEX_URL"]


@pytest.fixture(scope="session")
def key() -> str:
    """It may do everything."""
    return os.environ["LORAPLEX_KEY"]


@pytest.fixture(scope="session")
def slow_key() -> str:
    """It may ask once a minute."""
    return os.environ["LORAPLEX_SLOW_KEY"]
