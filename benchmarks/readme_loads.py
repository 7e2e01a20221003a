"""What README's servers are asked, ours alone and beside its peers: closed loops of streams over adapters in turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraplex.benchmarks.load import Request

PROMPT_TOKENS, OUTPUT_TOKENS, RANK = 96, 64, 16

Ask = Callable[[Sequence[int], int | None], Request]
"""Makes a request of a prompt and an adapter's number, None for the base."""


@dataclass(frozen=True)
class Load:
    """A row of the tables."""

    name: str
    streams: int
    adapters: int  # 0: the base
    requests: int  # of one round
    prompt_tokens: int = PROMPT_TOKENS

    @property
    def context(self) -> int:
        """Tokens that a request may take, prompt and answer, and a few to spare."""
        return self.prompt_tokens + OUTPUT_TOKENS + 32

    def prompts(self, seed: int) -> list[list[int]]:
        """Token ids, equal for every server. No other load and no other seed has them: a prefix cache finds nothing."""
        rng = random.Random(f"{self.name} {seed}")
        return [[rng.randrange(100, 40000) for _ in range(self.prompt_tokens)] for _ in range(self.requests)]

    def asked(self, ask: Ask, seed: int) -> list[Request]:
        """One round, adapters in turn."""
        return [
            ask(prompt, n % self.adapters if self.adapters else None) for n, prompt in enumerate(self.prompts(seed))
        ]


LOADS = (
    Load("base, 1 stream", 1, 0, 4),
    Load("base, 16 streams", 16, 0, 48),
    Load("1 adapter, 1 stream", 1, 1, 4),
    Load("32 adapters round-robin, 16 streams", 16, 32, 64),
)

CONTEXTS = (
    Load("4k context, 1 stream", 1, 0, 1, 4096),
    Load("16k context, 1 stream", 1, 0, 1, 16384),
)
"""Long prompts, beside peers alone: what counts is the first token, and the rate after it."""


def ask_ours(prompt: Sequence[int], adapter: int | None) -> Request:
    """Of loraplex, with the demo base and adapters as random_adapters names them."""
    return Request("demo" if adapter is None else f"ad{adapter}", prompt, OUTPUT_TOKENS)
