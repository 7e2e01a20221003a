"""The tiny base of most tests here, made once a process; no test writes to its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with a tokenizer."""
    return make_tiny_tokenizer(make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def oracle(base: Path) -> Any:
    """transformers' model of `base`; make_peft_adapter works on copies of it."""
    return load_oracle(base)
