"""The short way of writing a stream's chunks against the long one: pydantic's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.api.answer_schemas import Completion, CompletionChoice, Usage
from loraplex.server.api.choice import Delta
from loraplex.server.api.respond import Collected, Scores, TextFrame
from loraplex.server.api.schemas import Wire
from tests.support.asking import WORK
from tests.support.fake_serving import FakeServer, say

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


class Rendering:
    """Completions of a model of any name."""

    def __init__(self, model: str) -> None:
        self.model = model

    def scores(self) -> None:
        return None

    def chunks(self, delta: Delta, scores: Scores | None, usage: Usage | None) -> Iterable[Completion]:
        choice = CompletionChoice(index=delta.index, text=delta.text, logprobs=None, finish_reason=None)
        yield Completion(id=self.model, created=7, model=self.model, choices=[choice])

    def opening(self, num_choices: int) -> Iterable[Wire]:
        return ()

    def is_plain(self, delta: Delta) -> bool:
        return True

    def usage_chunk(self, usage: Usage) -> Wire:
        raise NotImplementedError

    def whole(self, choices: list[Collected], usage: Usage) -> Wire:
        raise NotImplementedError


@given(model=TEXT, text=TEXT, index=st.integers(0, 9), hidden=st.sampled_from([None, {"usage"}]))
def test_a_frame_writes_what_pydantic_writes(model: str, text: str, index: int, hidden: set[str] | None) -> None:
    rendering = Rendering(model)
    [chunk] = rendering.chunks(Delta(index, text), None, None)
    assert TextFrame.of(rendering, index, hidden).around(text) == chunk.model_dump_json(exclude=hidden)


ROUTES = [WORK["completions"], WORK["chat"]]


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_all_chunks_have_the_same_fields(
    server: FakeServer, client: httpx.AsyncClient, path: str, body: dict[str, Any], usage: bool
) -> None:
    """Those written the short way and the last one, which is not."""
    said = 'the "fox"\n and \\ the end é€😀'
    server.engine.script = lambda request: say(server.tokenizer, said, request)
    fields = {"model": "base", "n": 2, "max_tokens": 40, "stream": True, "stream_options": {"include_usage": usage}}
    answer = await client.post(path, json={**body, **fields})
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    with_choices = [chunk for chunk in chunks if chunk["choices"]]
    assert lines[-1] == "[DONE]"
    assert len({tuple(chunk) for chunk in with_choices}) == 1
    assert len({tuple(chunk["choices"][0]) for chunk in with_choices}) == 1
    assert ("usage" in with_choices[0]) == usage
    texts = ["", ""]
    for chunk in with_choices:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
    assert texts == [said, said]
