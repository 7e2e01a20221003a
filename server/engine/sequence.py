"""A request on its way through the engine: the only mutable state there is per request. Free of torch."""

from __future__ import annotations

from loraplex.adapters.registry import AdapterVersion
from loraplex.server.engine.request import FinishReason, GenerationRequest


class Sequence:
    """Known tokens (prompt, then generated), and how many of them have keys and values in the cache.

    There is no prefill state and no decode state: `num_computed` chases `num_tokens`.
    """

    __slots__ = (
        "mix",
        "num_computed",
        "num_prompt",
        "number",
        "output",
        "preemptions",
        "request",
        "tokens",
        "versions",
    )

    def __init__(self, number: int, request: GenerationRequest) -> None:
        self.number = number  # of arrival, never reused: its age, and its key in the KV cache
        self.request = request
        self.tokens: list[int] = list(request.prompt_ids)
        self.output: list[int] = []  # the generated tail of `tokens`
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        self.preemptions = 0
        weights: dict[str, float] = {}
        versions: dict[str, AdapterVersion] = {}
        for lease, weight in request.mix:  # two names may share a digest, which is resident once
            weights[lease.version.digest] = weights.get(lease.version.digest, 0.0) + weight
            versions.setdefault(lease.version.digest, lease.version)
        self.mix = tuple(sorted(weights.items()))  # (digest, weight): the order in which the ops add them up
        self.versions = tuple(versions[digest] for digest, _ in self.mix)

    @property
    def num_tokens(self) -> int:
        """Known tokens."""
        return len(self.tokens)

    @property
    def num_missing(self) -> int:
        """Known tokens that are still to be computed; at least 1 until the request has ended."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decode(self) -> bool:
        """Whether the next row is a decode row: just one token is missing, and it is a generated one."""
        return self.num_computed == len(self.tokens) - 1 >= self.num_prompt

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.tokens.append(token_id)
        self.output.append(token_id)

    def finish_after(self, token_id: int) -> FinishReason | None:
        """Why the request ends with `token_id`, the last token appended; None when it goes on."""
        params = self.request.params
        if token_id in params.stop_token_ids:
            return FinishReason.STOP
        if len(self.output) >= params.max_tokens:
            return FinishReason.LENGTH
        return None

    def __repr__(self) -> str:
        return f"Sequence({self.number}, {self.request.request_id!r}, {self.num_computed}/{self.num_tokens} tokens)"
