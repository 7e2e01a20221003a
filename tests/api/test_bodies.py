"""Bodies before they are objects: what they may be made of, how many come at once, and where they are parsed."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from loraplex.server.api import chat_schemas, schemas
from loraplex.server.api.body import NAMES_BODY, SMALL_BODY, Bodies
from loraplex.server.api.dialects import lorax_schemas, sglang, tokenize
from loraplex.server.api.encodings import MAX_MEMBERS
from loraplex.server.api.errors import ApiError, ClientGone
from loraplex.server.api.openai import responses_schemas
from loraplex.server.api.structure import STRUCTURES_SHARE, check_structure
from loraplex.server.config import RequestLimits
from loraplex.server.engine.request import Overloaded
from loraplex.server.tenancy.rate_limits import Account, Limits
from loraplex.server.tenancy.tenants import ANYONE, Caller, calling
from tests.support.asking import FORMS
from tests.support.fake_serving import FakeServer
from tests.support.waiting import LIMIT, turns

LIMITS = RequestLimits(max_body_bytes=1 << 20, max_values=16_384)
MANY = {
    "lists": "[" + "[]," * 20_000 + "[]]",
    "keys": "{" + "".join(f'"{i}":0,' for i in range(20_000)) + '"":0}',
    "deep lists": "[" * 20_000 + "]" * 20_000,
    "numbers": "[" + "5," * 20_000 + "5]",
    "strings": "[" + '"",' * 20_000 + '""]',
    "cut off": "[" + "[]," * 20_000,
}


@pytest.fixture
async def client(server: FakeServer) -> httpx.AsyncClient:
    return server.client(limits=LIMITS)


def told(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    return str(error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize("what", MANY)
@pytest.mark.parametrize("form", FORMS)
async def test_many_values_are_refused_in_the_routes_own_words(client: httpx.AsyncClient, form: str, what: str) -> None:
    route, body = FORMS[form]
    status = 422 if "inputs" in body else 400
    content = json.dumps(body)[:-1] + f', "foo": {MANY[what]}' + "}"
    for headers, sent in (({}, content.encode()), ({"content-encoding": "gzip"}, gzip.compress(content.encode()))):
        answer = await client.post(route, content=sent, headers=headers)
        assert answer.status_code == status, answer.text
        assert "--max-values" in told(answer)
        if status == 400:
            assert answer.json()["error"]["code"] == "too_many_values"


async def test_a_long_prompt_of_ids_is_refused_by_its_length(client: httpx.AsyncClient, server: FakeServer) -> None:
    answer = await client.post("/v1/completions", json={"model": "base", "prompt": [5] * 10_000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    answer = await client.post("/v1/completions", json={"model": "base", "prompt": [[5]] * 2000})
    assert "2004 keys, objects and lists" in told(answer)
    assert not server.engine.requests


async def test_strings_hold_what_they_like(client: httpx.AsyncClient) -> None:
    """A prompt that is code, a table, or JSON itself."""
    text = json.dumps({"a": [{"b": '\\"[{,:'}] * 20_000})
    answer = await client.post("/tokenize", json={"model": "base", "prompt": text[:200], "foo": text})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/abort_request"]
)
async def test_routes_of_names_take_small_bodies(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.post(path, json={"lora_name": "x", "lora_path": "y" * NAMES_BODY, "rid": "x"})
    assert answer.status_code in (400, 413)
    message = answer.json().get("error_message") or told(answer)
    assert f"at most {NAMES_BODY} are taken by this route" in message


async def test_too_large_is_told_in_loraxs_words(client: httpx.AsyncClient) -> None:
    for route in ("/", "/generate_stream", "/embed"):
        answer = await client.post(route, json={"inputs": "x" * LIMITS.max_body_bytes})
        assert (answer.status_code, answer.json()["error_type"]) == (413, "validation")
        assert "--max-body" in answer.json()["error"]


async def test_members_of_gzip_are_bounded(client: httpx.AsyncClient) -> None:
    content = json.dumps(FORMS["completions"][1]).encode()
    for empty, status in ((MAX_MEMBERS - 1, 200), (MAX_MEMBERS, 400)):
        sent = gzip.compress(b"") * empty + gzip.compress(content)
        answer = await client.post("/v1/completions", content=sent, headers={"content-encoding": "gzip"})
        assert answer.status_code == status, answer.text


texts = st.text(st.sampled_from('a,:[]{}"\\\u00e9\n'), max_size=8)
values = st.recursive(
    texts | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=40
)


def made_of(value: Any) -> tuple[int, int]:
    """Values beside the first of each list and object; keys, objects and lists. By recursion."""
    if not isinstance(value, dict | list):
        return 0, 0
    inner = [made_of(each) for each in (value.values() if isinstance(value, dict) else value)]
    own = 1 + len(value) if isinstance(value, dict) else 1
    return max(0, len(value) - 1) + sum(v for v, _ in inner), own + sum(s for _, s in inner)


@example(":", False, 0)
@given(values, st.booleans(), st.integers(0, 60))
def test_what_is_counted(value: Any, ascii_only: bool, most: int) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    found, structures = made_of(value)
    limits = RequestLimits(max_values=most)
    if found > most or structures > most // STRUCTURES_SHARE:
        with pytest.raises(ApiError, match="at most"):
            check_structure(text, limits)
    else:
        check_structure(text, limits)


# ------------------------------------------------------------------------------------------------------ where and when


class Client:
    """Its body as the server receives it; the last piece comes when the gate is open."""

    def __init__(self, *pieces: bytes) -> None:
        self.gone = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self._pieces = list(pieces)

    def request(self) -> Request:
        return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, self._receive)

    async def _receive(self) -> dict[str, Any]:
        if self._pieces:
            if len(self._pieces) == 1:
                await self.gate.wait()
            return {"type": "http.request", "body": self._pieces.pop(0), "more_body": bool(self._pieces)}
        await self.gone.wait()
        return {"type": "http.disconnect"}


class Parser:
    """Notes whose bodies it is given; works while its gate is open."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, int]] = []
        self.gate = threading.Event()
        self.most = self._now = 0

    def __call__(self, body: bytes, limits: RequestLimits) -> int:
        self.seen.append((body[:2], threading.get_ident()))
        self._now += 1
        self.most = max(self.most, self._now)
        assert self.gate.wait(LIMIT)
        self._now -= 1
        return len(body)


def of_tenant(name: str) -> AbstractContextManager[None]:
    return calling(Caller(replace(ANYONE, tenant=name), Account(Limits(), lambda: 0.0), Counter()))


async def test_large_ones_are_parsed_beside_the_loop_one_at_a_time() -> None:
    bodies, parser = Bodies(LIMITS), Parser()
    large = [asyncio.create_task(bodies.read_as(Client(b"x" * (SMALL_BODY + 1)).request(), parser)) for _ in range(5)]
    while not parser.seen:
        await asyncio.sleep(0)
    await turns()
    assert len(parser.seen) == 1
    parser.gate.set()
    async with asyncio.timeout(LIMIT):
        assert await asyncio.gather(*large) == [SMALL_BODY + 1] * 5
        assert await bodies.read_as(Client(b"x" * SMALL_BODY).request(), parser) == SMALL_BODY
    assert parser.most == 1
    threads = [thread for _, thread in parser.seen]
    assert threading.get_ident() not in threads[:5]
    assert threads[5] == threading.get_ident()


async def test_a_tenant_with_many_bodies_lets_others_go_between() -> None:
    bodies, parser, tasks = Bodies(LIMITS), Parser(), []
    for name in ["a"] * 20 + ["b", "c"]:
        with of_tenant(name):
            content = name.encode() * (SMALL_BODY + 1)
            tasks.append(asyncio.create_task(bodies.read_as(Client(content).request(), parser)))
    await turns()
    parser.gate.set()
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*tasks)
    order = [body[:1] for body, _ in parser.seen]
    assert order.index(b"b") <= 3
    assert order.index(b"c") <= 3


async def test_who_has_left_is_not_parsed() -> None:
    bodies, parser = Bodies(LIMITS), Parser()
    first, second = Client(b"1" * (SMALL_BODY + 1)), Client(b"2" * (SMALL_BODY + 1))
    tasks = [asyncio.create_task(bodies.read_as(each.request(), parser)) for each in (first, second)]
    await turns()
    second.gone.set()
    parser.gate.set()
    async with asyncio.timeout(LIMIT):
        assert await tasks[0] == SMALL_BODY + 1
        with pytest.raises(ClientGone):
            await tasks[1]
    assert [body for body, _ in parser.seen] == [b"11"]


async def test_large_ones_have_one_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not fit is told to come again; small ones always fit, and what was held is given back."""
    monkeypatch.setattr("loraplex.server.api.body.MAX_HELD", 1 << 20)
    bodies, parser = Bodies(LIMITS), Parser()
    parser.gate.set()
    slow = [Client(b"x" * (SMALL_BODY + 1), b"x" * (400 << 10), b"x") for _ in range(3)]
    tasks = []
    for each in slow[:2]:
        each.gate.clear()
        tasks.append(asyncio.create_task(bodies.read_as(each.request(), parser)))
    await turns()
    with pytest.raises(Overloaded):
        await bodies.read_as(slow[2].request(), parser)
    assert await bodies.read_as(Client(b"x" * SMALL_BODY).request(), parser) == SMALL_BODY
    slow[0].gate.set()
    tasks[1].cancel()
    async with asyncio.timeout(LIMIT):
        await tasks[0]
        assert await bodies.read_as(Client(b"x" * (1 << 20)).request(), parser) == 1 << 20
    assert not bodies._held


async def test_a_tenant_has_half_of_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.server.api.body.MAX_HELD", 1 << 20)
    bodies, parser, tasks = Bodies(LIMITS), Parser(), []
    with of_tenant("a"):
        tasks.append(asyncio.create_task(bodies.read_as(Client(b"x" * (300 << 10)).request(), parser)))
        await turns()
        with pytest.raises(Overloaded):
            await bodies.read_as(Client(b"x" * (300 << 10)).request(), parser)
    with of_tenant("b"):
        tasks.append(asyncio.create_task(bodies.read_as(Client(b"x" * (300 << 10)).request(), parser)))
    await turns()
    parser.gate.set()
    async with asyncio.timeout(LIMIT):
        assert await asyncio.gather(*tasks) == [300 << 10] * 2


MODULES = (schemas, chat_schemas, lorax_schemas, responses_schemas, sglang, tokenize)
RECORDS = [
    found
    for module in MODULES
    for found in vars(module).values()
    if isinstance(found, type) and issubclass(found, schemas.Incoming) and found.__module__ == module.__name__
]


def lists_of(schema: Any) -> list[dict[str, Any]]:
    parts = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list | tuple) else ()
    own = [schema] if isinstance(schema, dict) and schema.get("type") == "list" else []
    return own + [found for part in parts for found in lists_of(part)]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_lists_end_at_their_first_wrong_item(record: type[BaseModel]) -> None:
    assert all(found.get("fail_fast") for found in lists_of(record.__pydantic_core_schema__))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guided_choice", [5] * 1000),
        ("logit_bias", {str(i): [] for i in range(1000)}),
        ("logit_bias", {str(i): 101 for i in range(1000)}),
        ("stop_token_ids", [-1] * 100),
    ],
)
def test_one_error_is_enough(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        schemas.CompletionRequest.model_validate_json(json.dumps({"model": "m", "prompt": "p", field: value}))
    assert caught.value.error_count() == 1
