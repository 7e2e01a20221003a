"""Bodies in a Content-Encoding: decoded within --max-body, or refused by name."""

from __future__ import annotations

import gzip
import json
import zlib

import httpx
import pytest

from tests.support.fake_serving import FakeServer

BODY = json.dumps({"model": "base", "prompt": "hi", "max_tokens": 4}).encode()
LIMIT = 100_000  # of the fake server


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


async def post(client: httpx.AsyncClient, encoding: str, content: bytes) -> httpx.Response:
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    return await client.post("/v1/completions", content=content, headers=headers)


@pytest.mark.parametrize(
    ("encoding", "content"),
    [
        ("gzip", gzip.compress(BODY, mtime=0)),
        ("GZIP", gzip.compress(BODY[:20], mtime=0) + gzip.compress(BODY[20:], mtime=0)),
        ("x-gzip", gzip.compress(BODY, mtime=0)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", raw_deflate(BODY)),
        ("identity", BODY),
        ("", BODY),
    ],
)
async def test_what_is_decoded(client: httpx.AsyncClient, server: FakeServer, encoding: str, content: bytes) -> None:
    response = await post(client, encoding, content)
    assert response.status_code == 200, response.text
    assert server.engine.requests[0].params.max_tokens == 4


@pytest.mark.parametrize("encoding", ["zstd", "br", "compress", "gzip, gzip", "nonsense"])
async def test_others_are_refused_by_name(client: httpx.AsyncClient, server: FakeServer, encoding: str) -> None:
    """Also on a body that is plain, and would be read if nobody looked."""
    response = await post(client, encoding, BODY)
    assert response.status_code == 415
    error = response.json()["error"]
    assert error["code"] == "unsupported_encoding"
    assert "gzip, deflate" in error["message"] or "twice" in error["message"]
    assert not server.engine.requests


@pytest.mark.parametrize(
    ("encoding", "content"),
    [
        ("gzip", BODY),
        ("gzip", gzip.compress(BODY, mtime=0)[:-9]),
        ("gzip", gzip.compress(BODY, mtime=0) + b"more"),
        ("gzip", b"\x1f\x8b"),
        ("deflate", zlib.compress(BODY) + b"more"),
        ("deflate", zlib.compress(BODY)[:-1]),
        ("deflate", BODY),
    ],
)
async def test_what_is_not_in_its_encoding(
    client: httpx.AsyncClient, server: FakeServer, encoding: str, content: bytes
) -> None:
    response = await post(client, encoding, content)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_encoding")
    assert not server.engine.requests


async def test_a_bomb_is_not_unpacked(client: httpx.AsyncClient, server: FakeServer) -> None:
    for content in (gzip.compress(b" " * 50_000_000, mtime=0), gzip.compress(b" " * (LIMIT // 2)) * 3):
        response = await post(client, "gzip", content)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    padded = BODY + b" " * (LIMIT - len(BODY))
    assert (await post(client, "gzip", gzip.compress(padded, mtime=0))).status_code == 200
    assert (await post(client, "gzip", gzip.compress(padded + b" ", mtime=0))).status_code == 413


@pytest.mark.parametrize("route", ["/", "/generate", "/tokenize", "/v1/chat/completions", "/v1/load_lora_adapter"])
async def test_on_every_route(client: httpx.AsyncClient, route: str) -> None:
    response = await client.post(route, content=BODY, headers={"Content-Encoding": "zstd"})
    assert response.status_code in (415, 422)
    assert "zstd" in response.text
