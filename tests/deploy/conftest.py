"""A server of fakes, for its routes and metrics."""

from __future__ import annotations

from tests.api.conftest import server, tokenizer_folder

__all__ = ["server", "tokenizer_folder"]
