"""The tiny base of most tests here, made once a process; no test writes to its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import make_peft_adapter
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with a tokenizer."""
    return make_tiny_tokenizer(make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def oracle(base: Path) -> Any:
    """transformers' model of `base`; make_peft_adapter works on copies of it."""
    return load_oracle(base)


@pytest.fixture(scope="module")
def live(base: Path) -> Iterator[LiveServer]:
    """A server of `base`, as it comes."""
    with live_server(base) as server:
        yield server


@pytest.fixture(scope="module")
def adapters(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters "one", "two" and "three"."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two", "three")):
        make_peft_adapter(oracle, folder / name, seed=seed, r=2, target_modules=["q_proj", "v_proj"])
    return folder
