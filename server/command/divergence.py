"""How far two versions on a running server are from each other: KL over the tokens of golden questions and answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from loraplex.server.command.remote import Remote
from loraplex.server.proof.golden import GoldenQuestion

AT_ONCE = 8
"""Questions under way."""

LIKELIEST = 20
"""Tokens of a place whose log-probabilities are compared; all others are one more."""


@dataclass(frozen=True)
class Divergence:
    """Mean KL of the version in place from the candidate, in nats a token."""

    prompts: float
    answers: float


def mean_divergence(remote: Remote, placed: str, candidate: str, questions: Sequence[GoldenQuestion]) -> Divergence:
    """Compute the mean KL of `placed` from `candidate` over all prompts' tokens but the first, and all answers'.

    An answer is what `placed` says greedily, the token that ends it included; both versions read the same tokens.

    Semantics: mean over places of sum over t of p(t) log(p(t) / q(t)), p being the version in place; t are its
    LIKELIEST tokens that the candidate tells of as well, and all others as one more. Never more than the KL itself.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(partial(_of_question, remote, placed, candidate), questions))
    prompts = [nats for prompt, _ in found for nats in prompt]
    answers = [nats for _, answer in found for nats in answer]
    return Divergence(*(sum(nats) / len(nats) if nats else 0.0 for nats in (prompts, answers)))


def divergence_at(p: Mapping[str, float], q: Mapping[str, float]) -> float:
    """Compute the KL of one place from the log-probabilities of its likeliest tokens; the rest is one token more."""
    both = p.keys() & q.keys()
    pairs = [(math.exp(p[token]), math.exp(q[token])) for token in both]
    pairs.append((max(0.0, 1 - sum(one for one, _ in pairs)), max(0.0, 1 - sum(other for _, other in pairs))))
    return max(0.0, sum(one * math.log(one / max(other, 1e-12)) for one, other in pairs if one > 0))


def _of_question(
    remote: Remote, placed: str, candidate: str, question: GoldenQuestion
) -> tuple[list[float], list[float]]:
    """Compute the KL of each place of the prompt, and of each of the answer. Raises RemoteError."""
    body = {"prompt": question.prompt} if question.prompt is not None else {"messages": list(question.messages)}
    ids: list[int] = remote.ask("POST", "/tokenize", {"model": candidate, **body})["tokens"]
    asked = {"prompt": ids, "max_tokens": question.max_tokens}
    answer: list[int] = _complete(remote, placed, asked)["token_ids"]
    places = [_places(remote, model, [*ids, *answer[:-1]]) for model in (placed, candidate)]
    nats = [divergence_at(p, q) for p, q in zip(*places, strict=True)]
    return nats[: len(ids) - 1], nats[len(ids) - 1 :]


def _places(remote: Remote, model: str, ids: list[int]) -> list[dict[str, float]]:
    """Return the log-probabilities of the likeliest tokens at each place after the first of `ids`, and after the last.

    By id, as several tokens may read the same. What a place has beyond them, the token that comes next, is left out.
    """
    fields = {"echo": True, "logprobs": LIKELIEST, "logprobs_mode": "raw_logprobs", "return_tokens_as_token_ids": True}
    found = _complete(remote, model, {"prompt": ids, "max_tokens": 1, **fields})
    told = found["logprobs"]["top_logprobs"][1 : len(ids) + 1]
    return [dict(sorted(place.items(), key=lambda each: -each[1])[:LIKELIEST]) for place in told]


def _complete(remote: Remote, model: str, fields: dict[str, Any]) -> dict[str, Any]:
    body = {"model": model, "temperature": 0, "return_token_ids": True, **fields}
    choice: dict[str, Any] = remote.ask("POST", "/v1/completions", body)["choices"][0]
    return choice
