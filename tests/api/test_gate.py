"""The gate says what the middlewares say, whatever is asked and however; the middlewares are the oracle."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Message, Receive, Scope, Send

from loraplex.server.api.gate import Gate, gate_of
from loraplex.server.config_access import AuthConfig
from loraplex.server.tenancy.access import Access
from loraplex.server.tenancy.keys_file import CHECK_SECONDS, KeysFile, new_key
from loraplex.server.tenancy.tenants import owners_keyring
from tests.support.clock import Clock
from tests.support.fake_serving import FakeServer

PATHS = (
    "/",
    "/v1/models",
    "/generate",
    "/v1/load_lora_adapter",
    "/metrics",
    "/health",
    "/ping",
    "/ui",
    "/no/such/route",
)
METHODS = ("GET", "HEAD", "POST", "OPTIONS")
KEYS: tuple[dict[str, str], ...] = (
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": "Basic right"},
    {"authorization": "bearer  right "},
    {"authorization": "Bearer " + "x" * 600},
    {"x-api-key": "right"},
    {"x-api-key": "wrong", "authorization": "Bearer right"},
    {"x-api-key": "\xfcber"},
)
ORIGINS: tuple[dict[str, str], ...] = (
    {},
    {"origin": "https://page"},
    {"origin": "https://other"},
    {"access-control-request-method": "POST"},
    {"origin": "https://page", "access-control-request-method": "POST"},
    {"origin": "https://other", "access-control-request-method": "POST"},
)


@pytest.mark.parametrize("cors_origins", [(), ("*",), ("https://page",)])
@pytest.mark.parametrize("open_metrics", [True, False])
async def test_as_the_application(server: FakeServer, cors_origins: tuple[str, ...], open_metrics: bool) -> None:
    access = Access(owners_keyring(["right"]), open_metrics=open_metrics)
    app = server.app(access=access, auth=AuthConfig(cors_origins=cors_origins))
    gate = gate_of(app)
    refused = 0
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for path, method, key, origin in itertools.product(PATHS, METHODS, KEYS, ORIGINS):
            raw = [(name.encode(), value.encode("latin-1")) for name, value in {**key, **origin}.items()]
            asked = client.build_request(method, path, headers=[*raw, (b"x-request-id", b"mine")])
            before = access.num_refused
            found = gate.refuse(method, path, [(name.lower(), value) for name, value in asked.headers.raw])
            counted = access.num_refused - before
            answer = await client.send(asked)
            if answer.status_code != 401:
                assert found is None, (path, method, key)
                continue
            assert found is not None, (path, method, key)
            assert counted == access.num_refused - before - 1 == 1
            assert found.status == 401
            assert sorted(found.headers) == sorted(answer.headers.raw)
            assert found.body == answer.content
            refused += 1
    assert refused > len(PATHS)


async def test_ids_are_the_clients_own_or_new(server: FakeServer) -> None:
    gate = Gate(Access(owners_keyring(["right"])))

    def id_of(*headers: tuple[bytes, bytes]) -> bytes:
        found = gate.refuse("GET", "/v1/models", headers)
        assert found is not None
        return dict(found.headers)[b"x-request-id"]

    assert id_of((b"x-request-id", b"mine-1")) == b"mine-1"
    assert id_of((b"x-request-id", b"first"), (b"x-request-id", b"second")) == b"first"  # as the middlewares read it
    made = {id_of(), id_of((b"x-request-id", b"a b")), id_of((b"x-request-id", b"\xff"))}
    assert len(made) == 3
    assert all(len(each) == 32 for each in made)


class OlderCors(CORSMiddleware):
    """As starlette had it up to 0.4x: who names no origin passes by."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passes = "origin" not in Headers(scope=scope)
        await (self.app(scope, receive, send) if passes else super().__call__(scope, receive, send))

    async def send(self, message: Message, send: Send, request_headers: Headers) -> None:
        assert request_headers["Origin"]
        await super().send(message, send, request_headers)


async def test_the_middleware_of_web_pages_is_asked_as_a_server_asks_it(server: FakeServer) -> None:
    gate = Gate(Access(owners_keyring(["right"])), partial(OlderCors, allow_origins=["https://page"]))
    told = [gate.refuse("GET", "/v1/models", headers) for headers in ([], [(b"origin", b"https://page")])]
    assert [dict(found.headers).get(b"access-control-allow-origin") for found in told if found is not None] == [
        None,
        b"https://page",
    ]


async def test_a_file_that_is_due_is_looked_at_first(tmp_path: Path) -> None:
    """Else a key that was just added would be refused, and one that was just taken away would pass for longer."""
    (old, first), (new, second) = (new_key(name, "acme") for name in ("old", "new"))
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n{first}")
    path.chmod(0o600)
    clock = Clock()
    access = Access(KeysFile(path, clock), clock=clock)
    gate = Gate(access)

    def passes(secret: str) -> bool:
        return gate.refuse("GET", "/v1/models", [(b"x-api-key", secret.encode())]) is None

    assert (passes(old), passes(new)) == (True, False)
    path.write_text(f"keys:\n{second}")
    clock.now += CHECK_SECONDS
    assert passes(new)  # to the middlewares, which wait for the file
    assert await access.find([new]) is not None
    assert (passes(old), passes(new)) == (False, True)


async def test_a_server_without_keys_refuses_nobody() -> None:
    assert Gate().refuse("GET", "/v1/models", []) is None
