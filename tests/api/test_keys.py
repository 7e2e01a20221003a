"""Two tenants before the real routes: who gets in, what they see, and what they can do to each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.routing import Route

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files.beneath import below
from loraplex.server.api.page.ui import page_files
from loraplex.server.config_access import AuthConfig
from loraplex.server.tenancy.local_sources import LocalSources
from loraplex.server.tenancy.rate_limits import Limits
from loraplex.server.tenancy.tenants import Key, digest_of
from tests.support.fake_serving import FakeServer, access_of
from tests.support.waiting import until

ALICE, BOB, ROOT, PROMETHEUS = "lpx_alice-secret", "lpx_bob-secret", "lpx_root-secret", "lpx_prometheus-secret"
KEYS = {
    ALICE: Key("alice", "acme", ("acme/*", "shared"), weight=2.0),
    BOB: Key("bob", "byte", ("byte/*", "shared"), base=False),
    ROOT: Key("root", "ops", admin=True),
    PROMETHEUS: Key("prometheus", "ops", (), base=False, metrics=True),
}
ADAPTERS = ("acme/sql", "byte/poet", "shared", "private")


@pytest.fixture
async def guarded(server: FakeServer) -> FakeServer:
    """With KEYS and ADAPTERS."""
    for name in ADAPTERS:
        await server.adapters.register(name, f"/adapters/{name}")
    server.given["access"] = access_of(KEYS)
    return server


def chat(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **fields}


def routes_of(app: Any) -> Iterator[Route]:
    for route in app.routes:
        yield from route.original_router.routes if hasattr(route, "original_router") else [route]


# ---- at the door ----------------------------------------------------------------------------------------------------


async def test_every_route_is_closed_but_those_that_machines_ask(guarded: FakeServer) -> None:
    app = guarded.app()
    client = guarded.client(app=app)
    opened, paths = set(), set()
    for route in routes_of(app):
        paths.add(route.path)
        for method in route.methods or ():
            path = route.path.replace("{model:path}", "x").replace("{response_id}", "x")
            answer = await client.request(method, path, content=b"{}" if method == "POST" else None)
            if answer.status_code != 401:
                opened.add(f"{method} {route.path}")
    expected = {
        *(f"GET {path}" for path in ("/", "/health", "/ready", "/startup", "/ping", "/version", "/load", "/get_load")),
        "POST /ping",
        *(f"{method} {path}" for path in page_files() for method in ("GET", "HEAD")),
    }
    assert opened == expected
    assert {"/health", "/version", "/v1/chat/completions", "/generate_stream", "/metrics"} <= paths
    assert (await client.get("/no/such/route")).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ALICE},
        {"Authorization": f"Basic {ALICE}"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {ALICE}x"},
        {"Authorization": f"Bearer {ALICE} {ALICE}"},
        {"Authorization": f"Bearer {digest_of(ALICE).hex()}"},
        {"Authorization": "Bearer " + "k" * 60_000},
        {"Authorization": b"Bearer \xff\xfe\x00"},
        {"x-api-key": ""},
        {"x-api-key": "Bearer " + ALICE},
    ],
)
async def test_without_a_known_key_nobody_gets_in(guarded: FakeServer, headers: dict[str, Any]) -> None:
    client = guarded.client()
    answer = await client.post("/v1/chat/completions", json=chat("base"), headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    assert "lpx" not in answer.text
    assert "kkk" not in answer.text
    assert guarded.engine.requests == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {ALICE}"},
        {"authorization": f"bearer   {ALICE} "},
        {"x-api-key": ALICE},
        {"x-api-key": ALICE, "Authorization": "Basic cHJveHk6eA=="},
        {"x-api-key": ALICE, "Authorization": "Bearer hf_of-the-hub"},
        {"x-api-key": "something-of-a-proxy", "Authorization": f"Bearer {ALICE}"},
    ],
)
async def test_a_key_is_known_from_either_header(guarded: FakeServer, headers: dict[str, str]) -> None:
    client = guarded.client()
    answer = await client.post("/v1/chat/completions", json=chat("acme/sql"), headers=headers)
    assert answer.status_code == 200
    (request,) = guarded.engine.requests
    assert (request.tenant, request.weight) == ("acme", 2.0)


async def test_a_body_is_not_read_for_strangers(guarded: FakeServer) -> None:
    read = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read = True
        yield b"{}"

    client = guarded.client()
    assert (await client.post("/v1/completions", content=body())).status_code == 401
    assert not read


async def test_lorax_routes_and_adapter_routes_refuse_in_their_own_words(guarded: FakeServer) -> None:
    client = guarded.client("wrong")
    lorax = await client.post("/generate", json={"inputs": "hi"})
    assert lorax.status_code == 401
    assert set(lorax.json()) == {"error", "error_type"}
    assert lorax.json()["error_type"] == "authentication"
    vllm = await client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/x"})
    assert (vllm.status_code, vllm.json()["object"]) == (401, "error")
    assert vllm.json()["error"]["code"] == "invalid_api_key"


async def test_metrics_are_for_admins_and_those_it_is_given_to(guarded: FakeServer) -> None:
    stranger, alice, root, prometheus = guarded.clients(None, ALICE, ROOT, PROMETHEUS)
    answers = [await client.get("/metrics") for client in (stranger, alice, root, prometheus)]
    assert [answer.status_code for answer in answers] == [401, 403, 200, 200]
    assert "loraplex:api_keys 4.0" in answers[2].text
    assert "loraplex:unauthorized_total 1.0" in answers[2].text
    assert "lpx_" not in answers[2].text
    guarded.given["access"].open_metrics = True
    assert (await stranger.get("/metrics")).status_code == 200


async def test_a_server_without_keys_asks_nobody(guarded: FakeServer) -> None:
    client = guarded.client(access=None)
    assert (await client.post("/v1/chat/completions", json=chat("private"))).status_code == 200
    assert (await client.get("/metrics")).status_code == 200
    request = guarded.engine.requests[0]
    assert (request.tenant, request.weight) == ("", 1.0)


# ---- what a key sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("secret", "names"),
    [
        (ALICE, ["base", "alias", "acme/sql", "shared"]),
        (BOB, ["byte/poet", "shared"]),
        (ROOT, ["base", "alias", "acme/sql", "byte/poet", "private", "shared"]),
        (PROMETHEUS, []),
    ],
)
async def test_the_list_shows_what_a_key_may_use_and_it_may_use_what_is_shown(
    guarded: FakeServer, secret: str, names: list[str]
) -> None:
    client = guarded.client(secret)
    shown = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
    assert shown == names
    for name in ("base", "alias", *ADAPTERS):
        status = 200 if name in names else 404
        assert (await client.get(f"/v1/models/{name}")).status_code == status
        assert (await client.post("/v1/chat/completions", json=chat(name))).status_code == status


Ask = Callable[[httpx.AsyncClient, str], Any]
ASKS: dict[str, Ask] = {
    "chat": lambda c, m: c.post("/v1/chat/completions", json=chat(m)),
    "stream": lambda c, m: c.post("/v1/chat/completions", json=chat(m, stream=True)),
    "completion": lambda c, m: c.post("/v1/completions", json={"model": m, "prompt": "hi"}),
    "response": lambda c, m: c.post("/v1/responses", json={"model": m, "input": "hi"}),
    "embedding": lambda c, m: c.post("/v1/embeddings", json={"model": m, "input": "hi"}),
    "tokenize": lambda c, m: c.post("/tokenize", json={"model": m, "prompt": "hi"}),
    "card": lambda c, m: c.get(f"/v1/models/{m}"),
    "prefixed": lambda c, m: c.post("/v1/completions", json={"model": f"base:{m}", "prompt": "hi"}),
    "version": lambda c, m: c.post("/v1/completions", json={"model": f"{m}@0123abcd", "prompt": "hi"}),
    "mix": lambda c, m: c.post("/v1/completions", json={"model": f"shared+{m}*0.5", "prompt": "hi"}),
    "adapters": lambda c, m: c.post(
        "/v1/completions", json={"model": "base", "prompt": "hi", "adapters": [{"name": "shared"}, {"name": m}]}
    ),
    "lora_path": lambda c, m: c.post("/v1/completions", json={"model": "base", "prompt": "hi", "lora_path": m}),
    "source": lambda c, m: c.post(
        "/v1/completions", json={"model": "base", "prompt": "hi", "adapter_id": m, "adapter_source": "hub"}
    ),
    "unload": lambda c, m: c.post("/v1/unload_lora_adapter", json={"lora_name": m}),
    "sglang": lambda c, m: c.post("/generate", json={"text": "hi", "lora_path": m}),
    "sglang_unload": lambda c, m: c.post("/unload_lora_adapter", json={"lora_name": m}),
    "lorax": lambda c, m: c.post("/generate", json={"inputs": "hi", "parameters": {"adapter_id": m}}),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("forbidden", ["acme/sql", "acme/bad", "private"])
async def test_a_forbidden_adapter_and_one_that_is_not_there_cannot_be_told_apart(
    guarded: FakeServer, ask: str, forbidden: str
) -> None:
    """acme/bad was refused when it was read, which its own tenant is told."""
    guarded.adapters.registry.mark_refused("acme/bad", AdapterRefused("shape_mismatch", "it does not fit"))
    unknown = forbidden[:-1] + "_"
    bob, alice = guarded.clients(BOB, ALICE)
    there, absent = await ASKS[ask](bob, forbidden), await ASKS[ask](bob, unknown)
    assert there.status_code == absent.status_code >= 400
    assert there.text.replace(forbidden, "NAME") == absent.text.replace(unknown, "NAME")
    assert {**there.headers, "x-request-id": ""} == {**absent.headers, "x-request-id": ""}
    if ask in ("chat", "stream", "completion", "response", "card", "mix"):
        assert there.status_code == 404
    if ask == "chat" and forbidden == "acme/bad":
        assert (await ASKS[ask](alice, forbidden)).status_code == 400
    assert guarded.engine.requests == []


async def test_no_route_tells_a_tenant_of_anothers_adapters(guarded: FakeServer) -> None:
    app = guarded.app()
    bob = guarded.client(BOB, app=app)
    bodies = ({"model": "shared", "prompt": "hi"}, {"inputs": "hi"}, {"lora_name": "byte/x", "lora_path": "/x"})
    told = set()
    for route in routes_of(app):
        for method in route.methods or ():
            path = route.path.replace("{model:path}", "shared").replace("{response_id}", "x")
            for body in bodies if method == "POST" else (None,):
                answer = await bob.request(method, path, json=body)
                assert answer.status_code != 401
                assert "acme" not in answer.text
                assert "private" not in answer.text
                told |= {route.path} if "shared" in answer.text else set()
    assert {"/v1/models", "/v1/completions", "/lora-adapters"} <= told


async def test_the_base_is_as_absent_to_those_who_may_not_use_it(guarded: FakeServer) -> None:
    bob = guarded.client(BOB)
    for ask in ("chat", "completion", "response", "card", "tokenize"):
        there, absent = await ASKS[ask](bob, "base"), await ASKS[ask](bob, "bose")
        assert there.status_code == absent.status_code == 404
        assert there.text.replace("base", "bose") == absent.text
    assert (await bob.post("/v1/chat/completions", json=chat("byte/poet"))).status_code == 200


# ---- management -----------------------------------------------------------------------------------------------------


def load(name: str, path: str = "/adapters/new", **fields: Any) -> dict[str, Any]:
    return {"lora_name": name, "lora_path": path, **fields}


async def test_tenants_manage_their_own_namespace_and_admins_all(guarded: FakeServer) -> None:
    alice, bob, root = guarded.clients(ALICE, BOB, ROOT)
    registry = guarded.adapters.registry
    assert (await alice.post("/v1/load_lora_adapter", json=load("acme/new"))).status_code == 200
    assert (await alice.post("/v1/chat/completions", json=chat("acme/new"))).status_code == 200
    for name in ("byte/new", "byte/poet", "new", "acme", "shared"):
        answer = await alice.post("/v1/load_lora_adapter", json=load(name, load_inplace=True))
        assert answer.status_code == 403
        assert (answer.json()["type"], answer.json()["error"]["code"]) == ("permission_error", 403)
    assert registry.get("byte/new") is None
    poet = registry.get("byte/poet")
    assert poet is not None
    assert poet.source == "/adapters/byte/poet"
    assert (await bob.post("/v1/unload_lora_adapter", json={"lora_name": "acme/new"})).status_code == 404
    assert (await bob.post("/v1/unload_lora_adapter", json={"lora_name": "shared"})).status_code == 403
    assert registry.get("acme/new")
    assert registry.get("shared")
    assert (await alice.post("/v1/unload_lora_adapter", json={"lora_name": "acme/new"})).status_code == 200
    assert (await root.post("/v1/load_lora_adapter", json=load("new"))).status_code == 200
    assert (await root.post("/v1/unload_lora_adapter", json={"lora_name": "byte/poet"})).status_code == 200


async def test_requests_may_name_local_folders_only_where_the_operator_says(
    guarded: FakeServer, tmp_path: Path
) -> None:
    (tmp_path / "in/side").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "out")
    guarded.given |= {"local_sources": LocalSources((tmp_path / "in",))}
    root = guarded.client(ROOT)
    statuses = {}
    for source in ("in/side", "in/absent", "out", "absent", "in/../out", "in/link"):
        body = load(f"a-{len(statuses)}", f"{tmp_path}/{source}")
        statuses[source] = (await root.post("/v1/load_lora_adapter", json=body)).status_code
    assert statuses == {
        "in/side": 200, "in/absent": 200, "out": 400, "absent": 400, "in/../out": 400, "in/link": 400
    }  # fmt: skip
    for source, status in (
        ("org/name", 200),
        ("s3://bucket/x", 200),
        ("file:///etc", 400),
        ("/etc", 400),
        ("~", 400),
        ("~nobody-of-that-name/x", 400),
    ):
        body = load(f"b-{source[:2].strip('/~:')}{status}x", source)
        assert (await root.post("/v1/load_lora_adapter", json=body)).status_code == status, source


async def test_a_path_gives_nobody_more_than_the_name_does(guarded: FakeServer, tmp_path: Path) -> None:
    """Folders of --adapter-dir are adapters by their names: by its path, too, one is for those who may use it."""
    for name in ("shared", "private", "private/checkpoint-9"):
        (tmp_path / "named" / name).mkdir(parents=True)
    (tmp_path / "named/mine").symlink_to(tmp_path / "named/private")
    guarded.given |= {"local_sources": LocalSources((), tmp_path / "named")}
    guarded.given["access"] = access_of({"k": replace(KEYS[BOB], load_on_use=True), ROOT: KEYS[ROOT]})
    bob, root = guarded.clients("k", ROOT)
    answers: dict[str, tuple[int, int, str]] = {}
    for place in ("shared", "private", "private/checkpoint-9", "absent", "mine", ".", "../named"):
        body = load(f"byte/a{len(answers)}", f"{tmp_path}/named/{place}")
        loaded = await bob.post("/v1/load_lora_adapter", json=body)
        use = {"model": "shared", "prompt": "hi", "adapter_id": body["lora_path"], "adapter_source": "local"}
        used = await bob.post("/v1/completions", json={**use, "model": "base"})
        told = loaded.text.replace(place, "PLACE") + used.text.replace(place, "PLACE")
        answers[place] = (loaded.status_code, used.status_code, told)
    assert answers["shared"][:2] == (200, 200)
    assert {answer[:2] for place, answer in answers.items() if place != "shared"} == {(400, 400)}
    assert answers["private"][2] == answers["absent"][2] == answers["mine"][2]
    assert (await root.post("/v1/load_lora_adapter", json=load("x", f"{tmp_path}/named/private"))).status_code == 200


async def test_what_a_request_may_load_stays_where_it_was_looked_at(guarded: FakeServer, tmp_path: Path) -> None:
    """The source that is kept says what it must not be led out of, whatever is put in its place later."""
    for name in ("in/side", "named/shared/checkpoint-9", "named/private", "named/..data/sql"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "in/link").symlink_to("side")
    (tmp_path / "door").symlink_to("in")
    (tmp_path / "named/alias").symlink_to("shared")
    (tmp_path / "named/sql").symlink_to("..data/sql")
    guarded.given |= {"local_sources": LocalSources((tmp_path / "in",), tmp_path / "named")}
    guarded.given["access"] = access_of({"k": KEYS[BOB], ROOT: KEYS[ROOT]})
    bob, root = guarded.clients("k", ROOT)
    inside, named = tmp_path / "in", tmp_path / "named"
    expected = {
        "in/side": below(inside, "side"),
        "in/link": below(inside, "link"),
        "in/../in/./side": below(inside, "side"),
        "in": below(inside, "."),
        "door/side": below(inside, "side"),
        "named/shared": below(named, "shared", "."),
        "named/shared/checkpoint-9": below(named, "shared", "checkpoint-9"),
        "named/alias": below(named, "shared", "."),
    }
    for i, (path, source) in enumerate(expected.items()):
        for given in (f"{tmp_path}/{path}", f"file://{tmp_path}/{path}"):
            answer = await bob.post("/v1/load_lora_adapter", json=load(f"byte/a{i}", given, load_inplace=True))
            assert answer.status_code == 200
            version = guarded.adapters.registry.get(f"byte/a{i}")
            assert version is not None
            assert version.source == source
    cards = {card["id"]: card["root"] for card in (await bob.get("/v1/models")).json()["data"]}
    assert cards["byte/a1"] == f"{inside}/link", "as it was given"
    await root.post("/v1/load_lora_adapter", json=load("all", f"{named}/sql"))
    version = guarded.adapters.registry.get("all")
    assert version is not None
    assert version.source == below(named, "sql"), "an admin may use all of them: the link may be turned elsewhere"


@pytest.mark.parametrize("route", ["/v1/load_lora_adapter", "/v1/completions"])
async def test_nobody_learns_which_folders_there_are(
    guarded: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """What could be a folder here or a repository of the Hub is the Hub's for tenants, whatever is here."""
    (tmp_path / "work/org/here1").mkdir(parents=True)
    (tmp_path / "here1").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    guarded.given |= {"local_sources": LocalSources(())}
    guarded.given["access"] = access_of({"k": replace(KEYS[BOB], load_on_use=True)})
    bob = guarded.client("k")
    answers = []
    for name in ("here1", "gone1"):
        for text in (f"org/{name}", f"../{name}", f"{tmp_path}/{name}", f"~/{name}"):
            body = {"model": "base", "prompt": "hi", "adapter_id": text, "adapter_source": "hub"}
            if route.startswith("/v1/load"):
                body = load(f"byte/{len(answers)}", text)
            answer = await bob.post(route, json=body)
            told = answer.json()["error"]["message"].replace(name, "NAME") if answer.status_code != 200 else ""
            answers.append((answer.status_code, told))
    assert answers[:4] == answers[4:]
    assert [status for status, _ in answers[:4]] == [200, 400, 400, 400]
    sources = {version.source for version in guarded.adapters.registry.list()}
    assert {s.removeprefix("hf://") for s in sources if "org" in s} == {"org/here1", "org/gone1"}
    assert "org/here1" not in sources, "with its scheme, so that the folder is not read"


async def test_a_callers_token_is_for_that_caller_alone(guarded: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    """Neither another token nor none gets at what it fetched, no listing names it, and no log has it."""
    keys = {s: replace(KEYS[k], load_on_use=True, adapters=("**",)) for s, k in (("a", ALICE), ("b", BOB))}
    guarded.given["access"] = access_of(keys)
    accesses: list[Any] = []
    register = guarded.adapters.register

    async def noted(name: str, source: str, **fields: Any) -> Any:
        accesses.append((name, fields["access"].token, fields["access"].ambient))
        return await register(name, source, **fields)

    guarded.adapters.register = noted  # type: ignore[method-assign]
    alice, bob = guarded.clients("a", "b")
    body = {"model": "base", "prompt": "hi", "adapter_id": "org/hush", "adapter_source": "hub", "max_tokens": 3}
    with caplog.at_level("DEBUG"):
        for client, token in ((alice, "hf_alices"), (bob, "hf_bobs"), (bob, None), (alice, "hf_alices")):
            answer = await client.post("/v1/completions", json={**body, "api_token": token})
            assert answer.status_code == 200
    assert [(token, ambient) for _, token, ambient in accesses] == [
        ("hf_alices", False), ("hf_bobs", False), (None, False)
    ]  # fmt: skip
    names = [name for name, _, _ in accesses]
    assert len(set(names)) == 3
    assert "hf_" not in caplog.text
    for client in (alice, bob):
        listed = {card["id"] for card in (await client.get("/v1/models")).json()["data"]}
        assert listed & set(names) == {names[2]}
        for hidden in names[:2]:
            asked = await client.post("/v1/completions", json={"model": hidden, "prompt": "hi"})
            assert asked.status_code == 404


async def test_loading_on_first_use_is_for_keys_that_may(guarded: FakeServer) -> None:
    guarded.given["access"] = access_of({"may": replace(KEYS[BOB], load_on_use=True), "not": KEYS[BOB]})
    may, may_not = guarded.clients("may", "not")
    body = {"model": "base", "prompt": "hi", "adapter_id": "org/name", "adapter_source": "hub", "max_tokens": 3}
    refused = await may_not.post("/v1/completions", json=body)
    assert refused.status_code == 404
    assert (await may.post("/v1/completions", json=body)).status_code == 200


# ---- what belongs to others -----------------------------------------------------------------------------------------


async def test_stored_responses_are_their_tenants(guarded: FakeServer) -> None:
    alice, bob = guarded.clients(ALICE, BOB)
    body = {"model": "shared", "input": "hi", "max_output_tokens": 3}
    made = (await alice.post("/v1/responses", json=body)).json()["id"]
    for method, path in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
        answer = await bob.request(method, f"/v1/responses/{made}{path}")
        absent = await bob.request(method, f"/v1/responses/resp_none{path}")
        assert answer.status_code == absent.status_code == 404
        assert answer.text.replace(made, "resp_none") == absent.text
    follow = {**body, "previous_response_id": made}
    assert (await bob.post("/v1/responses", json=follow)).status_code == 400
    assert (await alice.get(f"/v1/responses/{made}")).status_code == 200


async def test_nobody_aborts_the_answers_of_others(guarded: FakeServer) -> None:
    alice, bob = guarded.clients(ALICE, BOB)
    engine = guarded.engine
    engine.gate.clear()
    answer = asyncio.create_task(alice.post("/v1/completions", json={"model": "shared", "prompt": "a", "rid": "mine"}))
    await until(lambda: bool(engine.requests))
    assert (await bob.post("/abort_request", json={"rid": "mine"})).json() == {"aborted": 0}
    assert engine.stopped == set()
    assert (await alice.post("/abort_request", json={"rid": "mine"})).json() == {"aborted": 1}
    engine.gate.set()
    assert (await answer).json()["choices"][0]["finish_reason"] == "abort"


async def test_tenants_are_told_to_the_engine_for_shares_and_cached_prefixes(guarded: FakeServer) -> None:
    alice, bob = guarded.clients(ALICE, BOB)
    for client in (alice, bob):
        assert (await client.post("/v1/chat/completions", json=chat("shared", cache_salt="s"))).status_code == 200
    told = [(request.tenant, request.weight, request.cache_salt) for request in guarded.engine.requests]
    assert told == [("acme", 2.0, "s"), ("byte", 1.0, "s")]


# ---- browsers, and the official client ------------------------------------------------------------------------------


async def test_web_pages_may_ask_only_where_the_operator_says(guarded: FakeServer) -> None:
    preflight = {"Origin": "https://ours.example", "Access-Control-Request-Method": "POST"}
    closed = guarded.client()
    assert "access-control-allow-origin" not in (await closed.options("/v1/models", headers=preflight)).headers
    guarded.given |= {"auth": AuthConfig(cors_origins=("https://ours.example",))}
    browser, alice = guarded.clients(None, ALICE)
    allowed = await browser.options("/v1/models", headers=preflight)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://ours.example")
    other = await browser.options("/v1/models", headers={**preflight, "Origin": "https://other.example"})
    assert other.status_code == 400
    refused = await browser.get("/v1/models", headers={"Origin": "https://ours.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://ours.example"  # else pages cannot read it
    assert (await alice.get("/v1/models", headers={"Origin": "https://ours.example"})).status_code == 200


async def test_the_official_client_raises_what_it_raises_at_openai(guarded: FakeServer) -> None:
    guarded.given["access"] = access_of({"k": replace(KEYS[ALICE], limits=Limits(requests_per_minute=2))})
    transport = httpx.ASGITransport(guarded.app())

    def official(secret: str) -> openai.AsyncOpenAI:
        http = httpx.AsyncClient(transport=transport)
        return openai.AsyncOpenAI(api_key=secret, base_url="http://test/v1", http_client=http, max_retries=0)

    with pytest.raises(openai.AuthenticationError) as unknown:
        await official("other").chat.completions.create(**chat("shared"))
    assert unknown.value.code == "invalid_api_key"
    known = official("k")
    with pytest.raises(openai.NotFoundError):
        await known.chat.completions.create(**chat("byte/poet"))
    raw = await known.chat.completions.with_raw_response.create(**chat("shared"))
    assert raw.headers["x-ratelimit-limit-requests"] == "2"
    assert raw.headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(openai.RateLimitError) as limited:
        await known.chat.completions.create(**chat("shared"))
    assert limited.value.code == "rate_limit_exceeded"
    assert limited.value.response.headers["retry-after"] == "30"
