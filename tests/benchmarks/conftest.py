"""The base that servers in these tests have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.tiny import make_tiny_model, make_tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama called tiny, in bfloat16 and with a context of 4,096 tokens, and its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_tokenizer(make_tiny_model("llama", path, dtype=torch.bfloat16, max_position_embeddings=4096))
