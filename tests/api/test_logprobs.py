"""Log-probabilities as JSON: what they say, and that writing very many of them keeps nobody else waiting."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from loraplex.server.api import turns
from loraplex.server.api.logprobs import ChatScores, CompletionScores, chat_logprobs, fill_in, write_prompt
from loraplex.server.api.prompts import Echo, Prompt, ScoredPrompt, ScoredToken
from loraplex.server.text.tokenizer import Tokenizer
from tests.support.fake_serving import FakeServer, scores_of

LOWEST = -9999.0
TOP = [(5, -0.5), (9, -math.inf), (5000, -2.5)]  # the last id is none of the vocabulary's


@pytest.fixture
def tokenizer(server: FakeServer) -> Tokenizer:
    return server.tokenizer


def scored(*ids: int) -> list[ScoredToken]:
    return [ScoredToken(token, -0.1 * token, tuple(TOP), 3 * i) for i, token in enumerate(ids)]


def test_chat_entries_are_what_pydantic_writes(tokenizer: Tokenizer) -> None:
    tokens = scored(*range(20, 300, 7), 5, 5000)
    written = ChatScores(tokenizer)
    for token in tokens:
        written.add(token)
    answer = {"choices": [{"logprobs": written.record.model_dump()}]}
    found = json.loads(fill_in(json.dumps(answer, separators=(",", ":")), [written]))
    assert found["choices"][0]["logprobs"] == json.loads(chat_logprobs(tokens, tokenizer).model_dump_json())


def test_completions_have_parallel_lists(tokenizer: Tokenizer) -> None:
    written = CompletionScores(tokenizer)
    for token in (ScoredToken(7, None, (), 0), *scored(5, 20), ScoredToken(21, math.nan, (), 9)):
        written.add(token)
    found = json.loads(fill_in(written.record.model_dump_json(), [written]))
    text = tokenizer.token_text
    assert found["tokens"] == [text(7), text(5), text(20), text(21)]
    assert found["token_logprobs"] == [None, -0.5, -2.0, None]
    assert found["text_offset"] == [0, 0, 3, 9]
    top = {text(5): -0.5, text(9): LOWEST, text(5000): -2.5}
    assert found["top_logprobs"] == [None, top, {**top, text(20): -2.0}, {text(21): None}]


def test_nothing_in_a_text_is_taken_for_a_place(tokenizer: Tokenizer) -> None:
    one, other = CompletionScores(tokenizer), CompletionScores(tokenizer)
    one.add(scored(20)[0])
    content = f'{{"a":{one.placeholder},"b":{other.placeholder},"c":"\\\\1 {one.record.tokens[0]}"}}'
    found = json.loads(fill_in(content, [one, other]))
    assert (len(found["a"]["tokens"]), found["b"]["tokens"]) == (1, [])
    assert found["c"] == f"\\1 {one.record.tokens[0]}"


async def others_turns(work: Any) -> int:
    """How often another task of the loop has its turn while `work` goes on."""
    turns_had = 0

    async def count() -> None:
        nonlocal turns_had
        while True:
            turns_had += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await work
    counting.cancel()
    return turns_had


async def test_others_have_their_turn_while_a_long_prompt_is_written(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "SECONDS", 0.0)
    ids = [20 + i % 200 for i in range(500)]
    echo = await Echo.build(tokenizer, Prompt(ids), scored=True)
    prompt = ScoredPrompt(ids, echo.offsets, scores_of([(-1.0, [(7, -0.5), (8, -1.5)])] * 499), 2)
    written = CompletionScores(tokenizer)
    assert await others_turns(write_prompt(written, prompt)) >= 400
    assert await others_turns(Echo.build(tokenizer, Prompt(ids), scored=True)) >= 400
    found = json.loads(written.text())
    assert found["token_logprobs"] == [None] + [-1.0] * 499
    assert found["text_offset"] == list(echo.offsets)
