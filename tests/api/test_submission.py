"""A request whose adapter has other files by now: the engine finds out, and points the name at the new ones."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused
from loraplex.adapters.files.tokenizer_files import TokenizerFiles
from loraplex.adapters.info import AdapterInfo
from loraplex.server.api.submission import Submission
from loraplex.server.engine.request import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from tests.support.asking import COMPLETIONS, body_of
from tests.support.fake_serving import FakeServer, say

NEW = AdapterInfo(8, ("q_proj",), 1, 64)


@pytest.fixture
async def changing(server: FakeServer) -> FakeServer:
    """The adapter "sql" is registered; the first request for it ends as outdated."""
    server.adapters.registry.register("sql", "/a/sql", AdapterInfo(8, (), 2, 4096))
    change(server, NEW)
    return server


def change(server: FakeServer, info: AdapterInfo, times: int = 1) -> None:
    """Have the first `times` requests end as outdated, "sql" being what `info` says from then on."""

    def script(request: GenerationRequest) -> Any:
        if len(server.engine.requests) > times:
            assert all(server.adapters.registry.leases(lease.version) > 0 for lease, _ in request.mix)
            return say(server.tokenizer, "the answer", request)
        registry = server.adapters.registry
        old = registry.get("sql")
        assert old is not None
        registry.renew(old, info)
        error = AdapterRefused("changed", "the files have changed")
        return [TokenEvent(request.request_id, None, finish=FinishReason.ERROR, error=error)]

    server.engine.script = script


def ask(**fields: Any) -> dict[str, Any]:
    return body_of(COMPLETIONS, **{"model": "sql", **fields})


async def test_the_new_ones_answer(changing: FakeServer, client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETIONS, json=ask())
    assert (response.status_code, response.json()["choices"][0]["text"]) == (200, "the answer")
    first, second = (request.mix[0][0].version for request in changing.engine.requests)
    assert first.uid != second.uid
    assert [changing.adapters.registry.leases(version) for version in (first, second)] == [0, 0]
    assert changing.engine.open == set()


async def test_once_only(changing: FakeServer, client: httpx.AsyncClient) -> None:
    change(changing, NEW, times=2)
    response = await client.post(COMPLETIONS, json=ask())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "changed")
    assert len(changing.engine.requests) == 2


async def test_not_where_that_very_version_was_asked_for(changing: FakeServer, client: httpx.AsyncClient) -> None:
    (version,) = changing.adapters.registry.list()
    changing.adapters.registry.identify(version, "ab" * 32)
    response = await client.post(COMPLETIONS, json=ask(model="sql@abababababab"))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "changed")
    assert len(changing.engine.requests) == 1


async def test_not_where_the_new_ones_have_another_tokenizer(changing: FakeServer, client: httpx.AsyncClient) -> None:
    """The prompt was written by the old one."""
    change(changing, AdapterInfo(8, ("q_proj",), 1, 64, tokenizer=TokenizerFiles(template="{{ messages }}")))
    response = await client.post(COMPLETIONS, json=ask())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "changed")
    assert len(changing.engine.requests) == 1
    assert [changing.adapters.registry.leases(version) for version in changing.adapters.registry.list()] == [0]


async def test_leases_are_given_back_where_one_of_a_mix_is_gone(changing: FakeServer) -> None:
    registry = changing.adapters.registry
    registry.register("old", "/a/old", AdapterInfo(8, (), 2, 4096))
    mix = tuple((registry.lease(name), 0.5) for name in ("sql", "old"))
    request = GenerationRequest("r", (1,), SamplingParams(max_tokens=1), mix=mix)
    submission = Submission(changing.engine, registry, request)
    registry.unregister("old")
    with pytest.raises(AdapterNotFound):
        await anext(submission)
    assert [registry.leases(version) for version in registry.list()] == [0]
