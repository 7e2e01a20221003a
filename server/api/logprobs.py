"""Log probabilities in the two forms clients know."""

from __future__ import annotations

from collections.abc import Sequence

from loraplex.server.api.chat_schemas import ChatLogprobs, TokenLogprob, TopLogprob
from loraplex.server.api.choice import ScoredToken
from loraplex.server.api.schemas import CompletionLogprobs
from loraplex.server.engine.tokenizer import Tokenizer

LOWEST = -9999.0
"""JSON has no minus infinity."""


def chat_logprobs(tokens: Sequence[ScoredToken], tokenizer: Tokenizer) -> ChatLogprobs:
    """One entry a token, each with the likeliest of its place. The entries' `bytes`, joined, are the text's."""

    def entry(token_id: int, logprob: float | None) -> TopLogprob:
        own = tokenizer.token_bytes(token_id)
        shown = LOWEST if logprob is None else max(logprob, LOWEST)
        return TopLogprob(token=own.decode(errors="replace"), logprob=shown, bytes=list(own))

    return ChatLogprobs(
        content=[
            TokenLogprob(**dict(entry(t.token_id, t.logprob)), top_logprobs=[entry(*each) for each in t.top])
            for t in tokens
        ]
    )


def completion_logprobs(tokens: Sequence[ScoredToken], tokenizer: Tokenizer) -> CompletionLogprobs:
    """Parallel lists. The top ones always include the token drawn, and are one more where it is not among them."""
    result = CompletionLogprobs()
    for token in tokens:
        text = tokenizer.token_text(token.token_id)
        result.tokens.append(text)
        result.text_offset.append(token.offset)
        if token.logprob is None:  # nothing predicts a prompt's first token
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            continue
        result.token_logprobs.append(max(token.logprob, LOWEST))
        # Where two tokens read the same (parts of characters do), the likelier one stays
        top: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            top.setdefault(tokenizer.token_text(token_id), max(logprob, LOWEST))
        result.top_logprobs.append(top)
    return result
