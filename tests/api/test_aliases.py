"""Aliases through the routes: who gets which version, what is changed at once, and what cannot be."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import Any

import httpx
import pytest

from loraplex.server.config_adapters import AdaptersConfig
from loraplex.server.tenancy.tenants import Key
from tests.support.asking import COMPLETIONS, body_of
from tests.support.fake_serving import CONFIG, FakeServer, access_of, digest_of_source

A, B = (f"{name}@{digest_of_source(f'/{name}')[:12]}" for name in ("a", "b"))


def split(**weights: float) -> dict[str, Any]:
    return {"targets": [{"adapter": name, "weight": weight} for name, weight in weights.items()]}


@pytest.fixture
async def loaded(server: FakeServer) -> FakeServer:
    for name in ("a", "b", "acme/c", "byte/d"):
        await server.adapters.register(name, f"/{name}")
    return server


@pytest.fixture
async def asking(loaded: FakeServer) -> httpx.AsyncClient:
    return loaded.client()


async def ask(client: httpx.AsyncClient, model: str = "support", sticky: str = "", **fields: Any) -> str:
    """Who answered."""
    headers = {"x-loraplex-sticky": sticky} if sticky else {}
    answer = await client.post(COMPLETIONS, json=body_of(COMPLETIONS, model=model, **fields), headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-loraplex-adapter"]


async def put(client: httpx.AsyncClient, body: dict[str, Any], name: str = "support") -> httpx.Response:
    return await client.put(f"/v1/aliases/{name}", json=body)


async def test_a_split_is_kept_to_by_user(asking: httpx.AsyncClient) -> None:
    assert (await put(asking, split(a=95, b=5))).json()["revision"] == 1
    users = [f"user-{i}" for i in range(400)]
    before = {user: await ask(asking, user=user) for user in users}
    assert {user: await ask(asking, sticky=user) for user in users[:50]} == {user: before[user] for user in users[:50]}
    counts = Counter(before.values())
    assert (
        5 <= counts[B] <= 40
    )  # 20 expected; more than 4 standard deviations of 4.4 to either side are by chance never
    await put(asking, split(a=80, b=20))
    after = {user: await ask(asking, user=user) for user in users}
    assert 50 <= Counter(after.values())[B] <= 115
    assert all(after[user] == B for user in users if before[user] == B)  # a share that grows loses nobody
    assert {await ask(asking) for _ in range(60)} == {A, B}  # nobody's: each by itself


async def test_a_mix_is_a_name(asking: httpx.AsyncClient) -> None:
    body = {"kind": "mix", **split(a=0.7, b=0.3)}
    assert (await put(asking, body, "blend")).status_code == 200
    assert await ask(asking, "blend") == f"{A}*0.7+{B}*0.3"
    assert await ask(asking, "blend*2+a") == f"{A}*1.4+{B}*0.6+{A}*1"
    await put(asking, split(blend=1))
    assert await ask(asking) == f"{A}*0.7+{B}*0.3"


async def test_promoted_and_rolled_back_in_one_call(asking: httpx.AsyncClient) -> None:
    await put(asking, split(a=95, b=5))
    promoted = (await asking.post("/v1/aliases/support/promote", json={"expected": 1})).json()
    assert (promoted["revision"], promoted["targets"]) == (2, [{"adapter": "b", "weight": 1.0}])
    assert {await ask(asking) for _ in range(20)} == {B}
    back = (await asking.post("/v1/aliases/support/rollback", json={})).json()
    assert [each["weight"] for each in back["targets"]] == [95, 5]
    assert (await asking.post("/v1/aliases/support/promote", json={"target": "a"})).status_code == 200
    assert await ask(asking) == A
    lost = await asking.post("/v1/aliases/support/rollback", json={"expected": 1})
    assert (lost.status_code, lost.json()["error"]["present"]) == (409, "4")
    assert (await asking.delete("/v1/aliases/support")).status_code == 200
    assert (await asking.get("/v1/aliases/support")).status_code == 404


async def test_versions_are_written_out(asking: httpx.AsyncClient, loaded: FakeServer) -> None:
    found = await put(asking, {"targets": [{"adapter": A}]})
    assert found.json()["targets"] == [{"adapter": f"a@{digest_of_source('/a')}", "weight": 1.0}]
    listed = (await asking.get("/v1/models")).json()["data"]
    assert next(card["root"] for card in listed if card["id"] == "support").startswith("split a@")
    assert (await asking.get("/v1/models/support")).json()["id"] == "support"
    assert (await asking.get("/v1/aliases")).json()["data"] == [found.json()]


WRONG = {
    "nothing": {"targets": []},
    "no targets": {},
    "nobody": split(nobody=1),
    "no version": {"targets": [{"adapter": "a@abcabcabcabc"}]},
    "itself": split(support=1),
    "a circle": split(other=1),
    "no weight": split(a=0, b=0),
    "less than nothing": split(a=-1, b=2),
    "twice": {"targets": [{"adapter": "a"}, {"adapter": "a"}]},
    "too many": {"targets": [{"adapter": "a"}] * 9},
    "the base": split(base=1),
    "of no kind": {"kind": "other", **split(a=1)},
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_aliases_that_cannot_be(asking: httpx.AsyncClient, wrong: str) -> None:
    assert (await put(asking, split(a=1))).status_code == 200
    assert (await put(asking, split(support=1), "other")).status_code == 200
    answer = await put(asking, WRONG[wrong])
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["code"] in (
        "alias_refused",
        "invalid_value",
        "missing_required_parameter",
        "model_not_found",
    )
    assert (await asking.get("/v1/aliases/support")).json()["revision"] == 1


async def test_names_are_one_thing(asking: httpx.AsyncClient, loaded: FakeServer) -> None:
    assert (await put(asking, split(b=1), "a")).status_code == 400
    assert (await put(asking, split(b=1), "base")).status_code == 400
    await put(asking, split(b=1), "free")
    taken = await asking.post("/v1/load_lora_adapter", json={"lora_name": "free", "lora_path": "/x"})
    assert taken.status_code == 400
    assert "is an alias" in taken.json()["message"]


KEYS = {
    "root": Key("root", "ops", admin=True),
    "acme": Key("acme", "acme", ("acme/*", "shared", "a"), max_adapters=2),
    "byte": Key("byte", "byte", ("byte/*", "shared", "acme/*")),
}


async def test_an_alias_is_usable_where_its_targets_are(loaded: FakeServer) -> None:
    loaded.given["access"] = access_of(KEYS)
    root, acme, byte = loaded.clients("root", "acme", "byte")
    shared = {"targets": [{"adapter": "acme/c", "weight": 1}, {"adapter": "a", "weight": 1}]}
    assert (await put(root, shared, "shared")).status_code == 200
    assert (await ask(acme, "shared")).startswith(("acme/c@", "a@"))
    hidden = await byte.post(COMPLETIONS, json=body_of(COMPLETIONS, model="shared"))
    assert (hidden.status_code, "acme" in hidden.text, "shared" in hidden.text) == (404, False, True)
    for client, sees in ((acme, True), (byte, False)):
        assert ("shared" in (await client.get("/v1/models")).text) is sees
        assert ("shared" in (await client.get("/v1/aliases")).text) is sees
    assert (await put(acme, split(a=1), "shared")).status_code == 403
    assert (await put(acme, split(a=1), "byte/x")).status_code == 404
    assert (await put(acme, {"targets": [{"adapter": "byte/d"}]}, "acme/x")).status_code == 404
    for name, status in (("acme/x", 200), ("acme/y", 200), ("acme/z", 429), ("acme/x", 200)):
        assert (await put(acme, split(a=1), name)).status_code == status


def told(**options: Any) -> dict[str, Any]:
    return {"config": replace(CONFIG, adapters=AdaptersConfig(**options))}


@pytest.mark.parametrize("model", ["base", "", "alias"])
async def test_a_client_that_forgets_the_adapter(loaded: FakeServer, model: str) -> None:
    loaded.config = told(default_adapter="a")["config"]
    client = loaded.client()
    assert await ask(client, model) == A
    for fields in ({"model": "__base_model__"}, {"model": model, "adapter_id": "__base_model__"}):
        base = await client.post(COMPLETIONS, json=body_of(COMPLETIONS, **fields))
        assert (base.status_code, "x-loraplex-adapter" in base.headers) == (200, False)
    loaded.config = told(require_adapter=True)["config"]
    client = loaded.client()
    refused = await client.post(COMPLETIONS, json=body_of(COMPLETIONS, model=model))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "adapter_required")
    assert await ask(client, "b") == B
    base = await client.post(COMPLETIONS, json=body_of(COMPLETIONS, model="__base_model__"))
    assert base.status_code == 200


SET, OTHER_SET = "5e7" + "0" * 61, "07e" + "0" * 61


async def score(client: httpx.AsyncClient, name: str, score: float, golden: str = SET, **more: str) -> httpx.Response:
    return await client.put(f"/v1/adapters/{name}/scores/{golden}", json={"score": score, **more})


async def refusal(client: httpx.AsyncClient, **fields: Any) -> str | None:
    """The code of what promoting "support" is answered with; None: it is done."""
    answer = await client.post("/v1/aliases/support/promote", json=fields)
    assert answer.status_code in (200, 409), answer.text
    return answer.json()["error"]["code"] if answer.status_code == 409 else None


DEMANDING = {"requires": "eval >= previous", **split(a=95, b=5)}


async def test_a_promotion_needs_the_score_of_the_version_in_place(asking: httpx.AsyncClient) -> None:
    assert (await put(asking, DEMANDING)).json()["requires"] == "eval >= previous"
    assert await refusal(asking) == "promotion_refused"  # nobody was asked anything
    assert (await score(asking, "b", 0.9)).json()["digest"] == digest_of_source("/b")
    assert await refusal(asking) == "promotion_refused"  # nothing is known of a
    await score(asking, "a", 0.8, OTHER_SET)
    assert await refusal(asking) == "promotion_refused"  # other questions
    await score(asking, "a", 0.9001)
    assert await refusal(asking) == "promotion_refused"
    assert (await asking.get("/v1/aliases/support")).json()["revision"] == 1
    assert (await score(asking, "a", 0.9, version=digest_of_source("/a")[:12])).status_code == 200
    await score(asking, "b", 0.7, OTHER_SET)
    assert await refusal(asking) == "promotion_refused"  # each set that both were asked
    await score(asking, "b", 0.8, OTHER_SET)
    assert await refusal(asking) is None
    promoted = (await asking.get("/v1/aliases/support")).json()
    assert (promoted["requires"], promoted["targets"][0]["adapter"]) == ("eval >= previous", "b")
    [card] = (await asking.get("/v1/adapters/b")).json()["versions"]
    assert card["scores"] == {SET: 0.9, OTHER_SET: 0.8}


async def test_what_needs_no_score(asking: httpx.AsyncClient) -> None:
    await put(asking, DEMANDING)
    assert await refusal(asking, target="a") is None  # it is in place
    assert (await asking.post("/v1/aliases/support/rollback", json={})).status_code == 200
    await put(asking, split(a=95, b=5))
    assert await refusal(asking) is None


async def test_scores_that_cannot_be(asking: httpx.AsyncClient) -> None:
    for name, given, golden in (("a", 1.5, SET), ("a", -0.1, SET), ("a", 0.5, "abc"), ("a", 0.5, SET.upper())):
        assert (await score(asking, name, given, golden)).status_code == 400, given
    assert (await score(asking, "nobody", 0.5)).status_code == 404
    assert (await score(asking, "a", 0.5, version="abcabcabcabc")).status_code == 404
    mix = await put(asking, {**DEMANDING, "kind": "mix"})
    assert (mix.status_code, mix.json()["error"]["code"]) == (400, "alias_refused")


async def test_scores_are_recorded_by_who_manages_the_adapter(loaded: FakeServer) -> None:
    loaded.given["access"] = access_of(KEYS)
    root, acme, byte = loaded.clients("root", "acme", "byte")
    assert (await score(acme, "acme/c", 0.5)).status_code == 200
    assert (await score(acme, "a", 0.5)).status_code == 403
    assert (await score(acme, "byte/d", 0.5)).status_code == 404
    assert (await score(root, "a", 0.5)).status_code == 200
    assert (await score(byte, "acme/c", 0.9)).status_code == 403


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize("change", ["promote", "rollback"])
async def test_changes_are_only_posted(asking: httpx.AsyncClient, method: str, change: str) -> None:
    found = await asking.request(method, f"/v1/aliases/acme/support/{change}", json=split(a=1, b=1))
    assert (found.status_code, found.headers["allow"]) == (405, "POST")


def level(depth: int) -> list[str]:
    """Eight names."""
    return [f"l{depth}-{number}" for number in range(8)]


async def test_aliases_of_aliases_cost_nobody_anything(asking: httpx.AsyncClient) -> None:
    """Eight levels of eight aliases, each of all eight below: 16 million ways, and the loop stood still for all."""
    begun = time.thread_time()
    for depth in range(8):
        below = level(depth - 1) if depth else ["a"]
        for name in level(depth):
            assert (await put(asking, split(**dict.fromkeys(below, 1.0)), name)).status_code == 200
    assert (await put(asking, {"kind": "mix", **split(**dict.fromkeys(level(7), 1.0))}, "top")).status_code == 400
    assert (await asking.get("/v1/models")).status_code == 200
    assert (await asking.get("/v1/aliases")).status_code == 200
    assert await ask(asking, level(7)[0]) == A
    assert time.thread_time() - begun < 5  # 2 s would be 15 ms a request


async def test_a_mix_of_mixes_is_not_written_out(asking: httpx.AsyncClient) -> None:
    """Seven levels of mixes of eight: two million adapters, of which eight are possible."""
    for depth in range(7):
        for name in level(depth):
            body = {"kind": "mix", **split(**dict.fromkeys(level(depth - 1) if depth else ["a"], 1.0))}
            assert (await put(asking, body, name)).status_code == 200
    begun = time.thread_time()
    answer = await asking.post(COMPLETIONS, json=body_of(COMPLETIONS, model=level(6)[0]))
    assert (answer.status_code, "more than 8 adapters" in answer.text) == (400, True)
    assert time.thread_time() - begun < 0.5


async def test_aliases_do_not_grow_below_others(asking: httpx.AsyncClient) -> None:
    """Chains are bounded from their beginning, also where their end is what changes."""
    for chain in range(2):
        for depth in range(8):
            below = f"c{chain}-{depth - 1}" if depth else "a"
            assert (await put(asking, split(**{below: 1.0}), f"c{chain}-{depth}")).status_code == 200
    longer = await put(asking, split(**{"c1-7": 1.0}), "c0-0")
    assert (longer.status_code, "one behind the other" in longer.text) == (400, True)
    assert await ask(asking, "c0-7") == A
