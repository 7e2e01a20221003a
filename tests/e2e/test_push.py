"""Adapters by wire to a whole server: what is served afterwards, what is refused, and that nothing is left behind."""

from __future__ import annotations

import gzip
import hashlib
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import safetensors.torch
import torch

from loraplex.adapters.sources.remote import CONFIG_FILE, WEIGHTS_FILE
from loraplex.adapters.sources.spool import CONFIG_KEY
from loraplex.server.config_adapters import DownloadConfig
from loraplex.server.tenancy.keys_file import new_key
from tests.support.left_files import left
from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import ALL, make_peft_adapter
from tests.support.pushing import SAFETENSORS, content_digest, form, one_body, with_metadata
from tests.support.served import greedy
from tests.support.waiting import LIMIT, wait_for

MOST = 400_000
"""Bytes of one adapter; those of the tests have some 60,000."""


@pytest.fixture(scope="module")
def spooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what comes is written."""
    return tmp_path_factory.mktemp("spool")


@pytest.fixture(scope="module")
def made(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Adapters by PEFT."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_peft_adapter(oracle, folder / name, seed=seed, r=4, target_modules=ALL)
        for seed, name in enumerate(("one", "two", "three"), 1)
    }


@pytest.fixture(scope="module")
def live(base: Path, spooled: Path) -> Iterator[LiveServer]:
    with live_server(base, downloads=DownloadConfig(folder=spooled, max_bytes=MOST)) as server:
        yield server


def put(live: LiveServer, name: str, body: bytes, headers: dict[str, str] = SAFETENSORS, **more: Any) -> httpx.Response:
    return live.ask("PUT", f"/v1/adapters/{name}", content=body, headers=headers, **more)


def says(live: LiveServer, adapter: Any) -> str:
    """What PEFT's model of the adapter answers."""
    prompt = live.tokenizer.encode("the")
    return live.tokenizer.decode(greedy(adapter.model, prompt, 20)[0])


def test_both_forms_of_the_body(live: LiveServer, made: dict[str, Any], spooled: Path) -> None:
    one, two = made["one"], made["two"]
    config, weights = ((two.folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))
    headers, body = form(("weights", weights), ("config", config))
    first = put(live, "first", one_body(one.folder))
    second = put(live, "second", body, headers | content_digest(body, "sha-512"))
    assert (first.status_code, second.status_code) == (200, 200), first.text + second.text
    assert live.text("first") == says(live, one)
    assert live.text("second") == says(live, two) != live.text("tiny")
    assert second.json()["digest"] == hashlib.sha256(config + weights).hexdigest()
    assert first.json() == live.ask("GET", "/v1/adapters/first").json()
    assert (first.json()["rank"], first.json()["expires_in"]) == (4, None)
    assert {"first", "second"} <= live.names()
    for name in ("first", "second"):
        assert live.ask("DELETE", f"/v1/adapters/{name}").json()["deleted"] is True
    assert live.complete("first").status_code == 404
    assert live.ask("DELETE", "/v1/adapters/first").status_code == 404
    wait_for(lambda: left(spooled) == [])


def test_a_stream_ends_on_the_version_it_began_with(live: LiveServer, made: dict[str, Any], spooled: Path) -> None:
    assert put(live, "moving", one_body(made["one"].folder)).status_code == 200
    client = live.openai()
    fields: dict[str, Any] = {"prompt": "the", "max_tokens": 20, "temperature": 0, "extra_body": {"ignore_eos": True}}
    stream = iter(client.completions.create(model="moving", stream=True, **fields))
    begun = next(stream).choices[0].text
    assert put(live, "moving", one_body(made["two"].folder)).status_code == 200
    assert live.text("moving") == says(live, made["two"])
    assert begun + "".join(chunk.choices[0].text for chunk in stream) == says(live, made["one"])
    live.idle()
    wait_for(lambda: len(left(spooled)) == 2)
    assert live.ask("DELETE", "/v1/adapters/moving").status_code == 200
    wait_for(lambda: left(spooled) == [])


def test_nobody_is_told_where_it_was_written(live: LiveServer, made: dict[str, Any], spooled: Path) -> None:
    assert put(live, "hidden", one_body(made["one"].folder)).status_code == 200
    for path in ("/lora-adapters", "/v1/models", "/v1/models/hidden", "/v1/adapters/hidden", "/ui/overview"):
        answer = live.ask("GET", path)
        assert answer.status_code == 200
        assert "hidden" in answer.text
        assert str(spooled) not in answer.text, path
    [listed] = [each for each in live.ask("GET", "/lora-adapters").json() if each["name"] == "hidden"]
    assert listed["path"] == "hidden"
    assert live.ask("DELETE", "/v1/adapters/hidden").status_code == 200


def test_only_where_it_is_what_is_expected(live: LiveServer, made: dict[str, Any], spooled: Path) -> None:
    before = len(left(spooled))
    bodies = [one_body(made[name].folder) for name in ("one", "two", "three")]
    first = put(live, "cas?expected=", bodies[0])
    assert first.status_code == 200, first.text
    digest = first.json()["digest"]
    assert put(live, "cas?expected=", bodies[1]).status_code == 409
    lost = put(live, f"cas?expected={'0' * 64}", bodies[1])
    assert lost.status_code == 409
    assert digest[:12] in lost.text
    assert live.text("cas") == says(live, made["one"])
    assert put(live, f"cas?expected={digest[:12]}", bodies[1]).status_code == 200
    assert live.text("cas") == says(live, made["two"])
    assert put(live, f"cas?expected={digest}", bodies[2]).status_code == 409
    assert live.ask("DELETE", "/v1/adapters/cas").status_code == 200
    wait_for(lambda: len(left(spooled)) == before)


def bad_bodies(good: bytes, wrong_shape: bytes) -> dict[str, tuple[int, str, bytes, dict[str, str]]]:
    """Status, code, body, headers."""
    config = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])["__metadata__"][CONFIG_KEY]
    packed, zeros = gzip.compress(good, mtime=0), zlib.compress(bytes(50_000_000))
    twice = form(("config", b"{}"), ("config", b"{}"), ("weights", good))
    lying = struct.pack("<Q", 1 << 50) + good[8:]
    nan = safetensors.torch.load(good)
    next(iter(nan.values())).fill_(float("nan"))
    return {
        "nothing": (400, "missing_file", b"", SAFETENSORS),
        "cut short": (400, "bad_file", good[: len(good) // 2], SAFETENSORS),
        "too long": (400, "bad_file", good + b"x", SAFETENSORS),
        "no config": (400, "missing_file", with_metadata(good, format="pt"), SAFETENSORS),
        "another config": (400, "bad_config", with_metadata(good, **{CONFIG_KEY: "[]"}), SAFETENSORS),
        "a header that lies": (400, "bad_file", lying, SAFETENSORS),
        "shapes of another base": (400, "shape_mismatch", wrong_shape, SAFETENSORS),
        "not finite": (400, "not_finite", safetensors.torch.save(nan, {CONFIG_KEY: config}), SAFETENSORS),
        "another digest": (400, "digest_mismatch", good, SAFETENSORS | content_digest(good[1:])),
        "no digest": (400, "invalid_digest", good, SAFETENSORS | {"content-digest": "sha-256=abc"}),
        "larger than one may be": (413, "request_too_large", good + bytes(MOST), SAFETENSORS),
        "larger once unpacked": (413, "request_too_large", zeros, SAFETENSORS | {"content-encoding": "deflate"}),
        "half of a gzip": (400, "invalid_encoding", packed[:-9], SAFETENSORS | {"content-encoding": "gzip"}),
        "no gzip": (400, "invalid_encoding", good, SAFETENSORS | {"content-encoding": "gzip"}),
        "another encoding": (415, "unsupported_encoding", good, SAFETENSORS | {"content-encoding": "zstd"}),
        "another kind": (415, "unsupported_media_type", good, {"content-type": "application/octet-stream"}),
        "a part twice": (400, "duplicate_part", twice[1], twice[0]),
        "half a form": (400, "incomplete_upload", twice[1][:40], twice[0]),
    }


CASES = tuple(bad_bodies(safetensors.torch.save({"a": torch.zeros(1)}, {CONFIG_KEY: "{}"}), b""))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunked", [False, True])
def test_what_cannot_be_served(
    live: LiveServer, made: dict[str, Any], oracle: Any, spooled: Path, tmp_path: Path, case: str, chunked: bool
) -> None:
    """What the name stood for is served on."""
    good = one_body(made["one"].folder)
    if "kept" not in live.names():
        assert put(live, "kept", good).status_code == 200
    other = safetensors.torch.load(one_body(made["two"].folder))
    config = (made["two"].folder / CONFIG_FILE).read_text()
    wide = {name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in other.items()}
    status, code, body, headers = bad_bodies(good, safetensors.torch.save(wide, {CONFIG_KEY: config}))[case]
    sent: Any = (body[at : at + 10_000] for at in range(0, len(body), 10_000)) if chunked else body
    answer = put(live, "kept", sent, headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert str(spooled) not in answer.text
    wait_for(lambda: len(left(spooled)) == 2)
    assert live.text("kept") == says(live, made["one"])


def test_a_client_that_leaves(live: LiveServer, made: dict[str, Any], spooled: Path) -> None:
    before = len(left(spooled))
    body = one_body(made["one"].folder)
    place = urlsplit(live.url)
    head = f"PUT /v1/adapters/gone HTTP/1.1\r\nHost: x\r\nContent-Type: {SAFETENSORS['content-type']}\r\n"
    with socket.create_connection((place.hostname, place.port or 0), LIMIT) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
        folders = lambda: [path for path in spooled.glob("*/*") if path.is_dir()]  # noqa: E731
        wait_for(lambda: len(folders()) == before // 2 + 1)  # it has begun to come
    wait_for(lambda: len(folders()) == before // 2)
    assert "gone" not in live.names()


def test_other_streams_are_unharmed(live: LiveServer, made: dict[str, Any]) -> None:
    expected, wrong = live.text("tiny"), []
    good = one_body(made["one"].folder)

    def ask() -> None:
        wrong.extend(text for _ in range(5) if (text := live.text("tiny")) != expected)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _, _, body, headers in bad_bodies(good, good).values():
        put(live, "never", body, headers)
    for thread in threads:
        thread.join(LIMIT)
    assert not wrong


def test_without_a_name(live: LiveServer, made: dict[str, Any], spooled: Path) -> None:
    before, body = len(left(spooled)), one_body(made["three"].folder)
    answer = live.ask("POST", "/v1/adapters?ttl=60", content=body, headers=SAFETENSORS)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["id"] == f"@sha256:{found['digest']}"
    assert 50 < found["expires_in"] <= 60
    assert live.text(found["id"]) == says(live, made["three"])
    assert live.text(found["id"][:20]) == says(live, made["three"])
    assert live.text(f"{found['id']}*0.5+{found['id']}*0.5") == says(live, made["three"])
    assert live.complete(found["id"][:19]).status_code == 404
    assert live.names().isdisjoint({found["id"]})
    assert not any("pushed/" in name for name in live.names())
    again = live.ask("POST", "/v1/adapters?ttl=5000", content=body, headers=SAFETENSORS).json()
    assert (again["id"], again["expires_in"] > 4000) == (found["id"], True)
    assert live.ask("GET", f"/v1/adapters/{found['id']}").json()["digest"] == found["digest"]
    wait_for(lambda: len(left(spooled)) == before + 2)
    assert live.ask("DELETE", f"/v1/adapters/{found['id']}").status_code == 200
    assert live.complete(found["id"]).status_code == 404
    wait_for(lambda: len(left(spooled)) == before)


def test_a_push_may_expect_a_version(live: LiveServer, made: dict[str, Any], spooled: Path) -> None:
    before = len(left(spooled))
    one, two = (one_body(made[name].folder) for name in ("one", "two"))
    first = put(live, "swapped?expected=", one)
    assert first.status_code == 200
    digest = first.json()["digest"]
    lost = put(live, "swapped?expected=", two)
    assert (lost.status_code, lost.json()["error"]["present"]) == (409, digest)
    assert put(live, f"swapped?expected={digest[:12]}&retain=1", two).status_code == 200
    assert live.text("swapped") == says(live, made["two"])
    assert put(live, f"swapped?expected={digest}", two).status_code == 409
    assert live.ask("DELETE", "/v1/adapters/swapped").status_code == 200
    wait_for(lambda: len(left(spooled)) == before)


def test_its_time_is_over(live: LiveServer, made: dict[str, Any], spooled: Path) -> None:
    before = len(left(spooled))
    body = one_body(made["three"].folder)
    nameless = live.ask("POST", "/v1/adapters?ttl=0.1", content=body, headers=SAFETENSORS).json()["id"]
    assert put(live, "short?ttl=0.1", body).json()["expires_in"] <= 0.1
    wait_for(lambda: live.complete(nameless).status_code == 410)
    assert live.complete(nameless).json()["error"]["code"] == "adapter_expired"
    wait_for(lambda: live.complete("short").status_code == 410)
    wait_for(lambda: len(left(spooled)) == before)
    live.ask("POST", "/v1/adapters?ttl=60", content=body, headers=SAFETENSORS)
    assert live.complete(nameless).status_code == 200


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("a/b/c", "name"),
        ("tiny", "name"),
        ("pushed/x", "name"),
        ("x?ttl=0", "ttl"),
        ("x?ttl=nan", "ttl"),
        ("x?ttl=soon", "ttl"),
    ],
)
def test_what_cannot_be_asked(live: LiveServer, path: str, param: str) -> None:
    error = put(live, path, b"").json()["error"]
    assert error["param"] == param


@pytest.fixture(scope="module")
def tenants(base: Path, spooled: Path, made: dict[str, Any]) -> Iterator[LiveServer]:
    size = len(one_body(made["one"].folder)) + 2000
    keys = [
        new_key("alice", "acme", max_adapters=2),
        new_key("bob", "byte", max_pushed_bytes=2 * size),
        new_key("root", "ops", admin=True),
    ]
    with live_server(base, keys=keys, downloads=DownloadConfig(folder=spooled / "tenants", max_bytes=MOST)) as server:
        yield server


def test_tenants_have_their_own(tenants: LiveServer, made: dict[str, Any]) -> None:
    body = one_body(made["one"].folder)

    def push(path: str, key: str, method: str = "PUT") -> httpx.Response:
        return tenants.ask(method, f"/v1/adapters{path}", key, content=body, headers=SAFETENSORS)

    def use(model: str, key: str) -> int:
        return tenants.ask(
            "POST", "/v1/completions", key, json={"model": model, "prompt": "x", "max_tokens": 1}
        ).status_code

    assert push("/byte/x", "alice").status_code == 403
    assert tenants.ask("DELETE", "/v1/adapters/byte/x", "alice").status_code == 404
    nameless = push("", "alice", "POST").json()["id"]
    assert (use(nameless, "alice"), use(nameless, "bob"), use(nameless, "root")) == (200, 404, 404)
    assert tenants.ask("GET", f"/v1/adapters/{nameless}", "bob").status_code == 404
    assert push("/acme/x", "alice").status_code == 200
    assert (use("acme/x", "alice"), use("acme/x", "bob"), use("acme/x", "root")) == (200, 404, 200)
    tenants.idle()
    assert push("/acme/y", "alice").status_code == 200  # what has no name makes room
    assert use(nameless, "alice") == 404
    assert push("/acme/z", "alice").json()["error"]["code"] == "rate_limit_exceeded"
    assert push("/acme/x", "alice").status_code == 200


def test_a_tenants_bytes(tenants: LiveServer, made: dict[str, Any], spooled: Path) -> None:
    def push(name: str, adapter: str) -> httpx.Response:
        body = one_body(made[adapter].folder)
        return tenants.ask("PUT", f"/v1/adapters/byte/{name}", "bob", content=body, headers=SAFETENSORS)

    assert [push("a", "one").status_code, push("b", "two").status_code] == [200, 200]
    before = len(left(spooled))
    third = push("c", "three")
    assert (third.status_code, third.json()["error"]["code"]) == (413, "quota_exceeded")
    assert len(left(spooled)) == before
    assert tenants.ask("DELETE", "/v1/adapters/byte/a", "bob").status_code == 200
    wait_for(lambda: push("c", "three").status_code == 200)


def test_a_restart(base: Path, made: dict[str, Any], tmp_path: Path) -> None:
    """What has a name is there again, and its files still go with it; what has none does not stay."""
    body = one_body(made["two"].folder)
    with live_server(base, state=tmp_path / "state") as server:
        assert put(server, "kept", body).status_code == 200
        server.ask("POST", "/v1/adapters", content=body, headers=SAFETENSORS)
        assert len(left(tmp_path / "state" / "pushed")) == 4
    with live_server(base, state=tmp_path / "state") as server:
        assert server.text("kept") == says(server, made["two"])
        assert sorted(left(tmp_path / "state" / "pushed")) == [CONFIG_FILE, WEIGHTS_FILE]
        assert put(server, "kept", one_body(made["one"].folder)).status_code == 200
        assert server.text("kept") == says(server, made["one"])
        wait_for(lambda: len(left(tmp_path / "state" / "pushed")) == 2)
        assert server.ask("DELETE", "/v1/adapters/kept").status_code == 200
        wait_for(lambda: left(tmp_path / "state" / "pushed") == [])
