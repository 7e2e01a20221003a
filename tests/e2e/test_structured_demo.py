"""The demo base and the example adapters held to two hundred JSON schemas: a model small enough to go astray wherever
a grammar lets it. Half of the schemas are as people write them: objects say nothing of further properties, and numbers
have no bounds.

The judges are jsonschema, and a matcher of llguidance's made here of the bare schema, which takes every answer's tokens
again.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import llguidance
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from loraplex.server.config_engine import EngineConfig
from loraplex.server.models import demo
from tests.support.live_server import LiveServer, live_server
from tests.support.schemas import Schema, bounded_schemas
from tests.support.version_world import register_all

COUNT, STREAMS, LIMIT = 200, 16, 400
EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
EOS_IDS = [2, 0]
"""<|im_end|>, and <|endoftext|>, which ends answers in llama.cpp too."""


@dataclass(frozen=True)
class Answer:
    schema: Schema
    closed: Schema  # the same without further properties
    text: str
    ids: list[int]  # the token that ended it included
    reason: str


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        importlib.metadata.version(demo.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the weights are not installed; {demo.INSTALL}")
    return demo.ensure_demo_base()


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[LiveServer]:
    config = EngineConfig(device="cpu", max_num_seqs=STREAMS, memory=1 << 30, max_model_len=1024)
    with live_server(folder, "demo", config) as started:
        register_all(started.parts.adapters, EXAMPLES)
        yield started


def draw_schemas(count: int) -> list[Schema]:
    """The same ones in every run."""
    found: dict[str, Schema] = {}

    @settings(
        max_examples=3 * count,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(bounded_schemas())
    def collect(schema: Schema) -> None:
        found.setdefault(json.dumps(schema), schema)

    collect()
    whole = list(found.values())
    return whole[:: len(whole) // count][:count]


def without(node: Any, *keys: str) -> Any:
    """The schema without these keywords."""
    if isinstance(node, list):
        return [without(each, *keys) for each in node]
    if not isinstance(node, dict):
        return node
    left = {key: value for key, value in node.items() if key not in keys}
    return {
        key: {name: without(each, *keys) for name, each in value.items()}
        if key == "properties"
        else value
        if key in ("enum", "const")
        else without(value, *keys)
        for key, value in left.items()
    }


async def ask_all(url: str, schemas: list[Schema]) -> list[Answer]:
    """Through LoRAX's route, which tells the ids of tokens; every other one greedy, base and adapters in turn."""
    slots = asyncio.Semaphore(STREAMS)
    names = [None, *sorted(folder.name for folder in EXAMPLES.iterdir() if folder.is_dir())]
    assert len(names) == 7

    async def ask(client: httpx.AsyncClient, number: int, drawn: Schema) -> Answer:
        closed = drawn if number % 4 < 2 else without(drawn, "minimum", "maximum")
        schema = drawn if number % 4 < 2 else without(closed, "additionalProperties")
        sampling = {"do_sample": True, "seed": number} if number % 2 else {"do_sample": False}
        parameters = {"max_new_tokens": LIMIT, "details": True, **sampling}
        parameters["response_format"] = {"type": "json_object", "schema": schema}
        parameters["adapter_id"] = names[number % len(names)]
        body = {"inputs": f"JSON by the schema {json.dumps(schema)}:\n", "parameters": parameters}
        async with slots:
            answer = await client.post(f"{url}/generate", json=body)
        assert answer.status_code == 200, (schema, answer.text)
        content = answer.json()
        details = content["details"]
        ids = [token["id"] for token in details["tokens"]]
        return Answer(schema, closed, content["generated_text"], ids, details["finish_reason"])

    async with httpx.AsyncClient(timeout=None) as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(client, i, schema)) for i, schema in enumerate(schemas)]
    return [task.result() for task in tasks]


@pytest.fixture(scope="module")
def answers(live: LiveServer) -> list[Answer]:
    return asyncio.run(ask_all(live.url, draw_schemas(COUNT)))


def test_nearly_all_end_by_themselves_and_those_are_valid(answers: list[Answer]) -> None:
    ended = [answer for answer in answers if answer.reason == "eos_token"]
    assert len(answers) == COUNT
    assert len(ended) >= 195, [answer for answer in answers if answer not in ended]
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for answer in ended:
        jsonschema.Draft202012Validator(answer.closed, format_checker=checker).validate(json.loads(answer.text))


def test_no_token_is_one_that_the_grammar_forbids(folder: Path, answers: list[Answer]) -> None:
    vocabulary = llguidance.LLTokenizer((folder / "tokenizer.json").read_text(), eos_token=EOS_IDS)
    for answer in answers:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(answer.schema))
        matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
        assert not matcher.is_error()
        ended = answer.reason == "eos_token"
        said = answer.ids[:-1] if ended else answer.ids
        assert matcher.try_consume_tokens(said) == len(said), answer
        assert not ended or (answer.ids[-1] in EOS_IDS and matcher.is_accepting()), answer
