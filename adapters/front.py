"""What an adapter puts in front of each prompt: virtual tokens, or keys and values of such. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Front:
    """Virtual tokens: the prompt's positions begin behind them."""

    tokens: int
    stored: bool  # keys and values of every layer as the cache holds them; else embeddings, in the stream's scale
    width: int  # values of a token
