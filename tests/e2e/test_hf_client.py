"""The real huggingface_hub.InferenceClient, as people call TGI and LoRAX with it, against a live server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import InferenceClient

from tests.support.live_server import LiveServer, live_server
from tests.support.waiting import LIMIT

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["hen", "fox"]}, "n": {"type": "integer"}},
    "required": ["kind", "n"],
}


@pytest.fixture(scope="module")
def served(base: Path) -> Iterator[LiveServer]:
    with live_server(base, "base") as server:
        yield server


@pytest.fixture
def client(served: LiveServer) -> InferenceClient:
    return InferenceClient(base_url=served.url, timeout=LIMIT)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": SCHEMA},
        {"type": "json_schema", "value": {"name": "animal", "schema": SCHEMA}},
        {"type": "regex", "value": r"[a-f]{3}-\d{2}"},
    ],
    ids=lambda grammar: grammar["type"],
)
def test_text_generation_holds_to_a_grammar(client: InferenceClient, grammar: dict[str, Any], stream: bool) -> None:
    answer = client.text_generation(
        "the", grammar=grammar, max_new_tokens=200, do_sample=True, seed=3, stream=stream, stop=["never"]
    )
    text = "".join(answer).removesuffix("<|eos|>") if stream else answer  # the client yields the end token, too
    if grammar["type"] == "regex":
        assert re.fullmatch(grammar["value"], text)
    else:
        found = json.loads(text)
        assert list(found) == ["kind", "n"]
        assert found["kind"] in ("hen", "fox")
        assert abs(found["n"]) < 10**15


def test_chat_completion_holds_to_a_format(client: InferenceClient) -> None:
    for form in (
        {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}},
        {"type": "json", "value": SCHEMA},
        {"type": "regex", "value": "hen|fox"},
    ):
        answer = client.chat_completion(
            [{"role": "user", "content": "the"}], model="base", response_format=form, max_tokens=200, seed=1
        )
        text = answer.choices[0].message.content
        assert text in ("hen", "fox") if form["type"] == "regex" else json.loads(text)["kind"] in ("hen", "fox")
