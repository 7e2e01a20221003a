"""Every test gets a fresh server of fakes and a client that talks to it in-process."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.support.fake_serving import FakeServer, make_fake_server
from tests.support.tiny import make_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
async def server(tokenizer_folder: Path) -> FakeServer:
    return make_fake_server(tokenizer_folder)


@pytest.fixture
async def client(server: FakeServer) -> httpx.AsyncClient:
    return server.client()


@pytest.fixture
async def roomy(server: FakeServer) -> httpx.AsyncClient:
    """The same with a context that tools fit in."""
    server.max_model_len = 2048
    return server.client()
