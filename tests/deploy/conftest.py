"""A server of fakes, for its routes and metrics; the chart; the compose file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fake_serving import FakeServer, make_fake_server
from tests.support.tiny import make_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
async def server(tokenizer_folder: Path) -> FakeServer:
    return make_fake_server(tokenizer_folder)
