"""The page at /ui: what it is made of, what comes with it, and what each key gets to see on it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.receipt import Measured
from loraplex.adapters.tiers.stats import AdapterPlace, PageOwners
from loraplex.server.api.page.page_map import KV, OTHER
from loraplex.server.api.page.ui import FOLDER, page_files
from loraplex.server.engine.stats import EngineStats
from loraplex.server.proof.prover import Prover
from loraplex.server.proof.receipt import BaseIdentity, Probe, Receipt
from loraplex.server.telemetry.recent import Recent
from loraplex.server.tenancy.tenants import Key
from tests.support.clock import Clock
from tests.support.fake_serving import FakeServer, access_of, digest_of_source

ALICE, ROOT, SEER = "lpx_alice-secret", "lpx_root-secret", "lpx_seer-secret"
KEYS = {
    ALICE: Key("alice", "acme", ("acme/*", "shared"), base=False),
    ROOT: Key("root", "ops", admin=True),
    SEER: Key("seer", "ops", (), base=False, metrics=True),
}
RECEIPT = Receipt(
    Measured("ab" * 32, "lora", 8, 8, (), ("bfloat16",), "bfloat16", 4, 0, (), 0.01, 1e-3, 0.0, 1, None),
    BaseIdentity(("base",), "cd" * 32, "bfloat16"),
    Probe(11, 0.01, float("nan")),
)


def decode(runs: list[int]) -> list[int]:
    return [owner for owner, pages in zip(runs[::2], runs[1::2], strict=True) for _ in range(pages)]


async def overview(client: httpx.AsyncClient, key: str = "", **query: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = await client.get("/ui/overview", params=query, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    found: dict[str, Any] = answer.json()
    return found


# ---- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(page_files()))
async def test_files_come_with_their_type_their_tag_and_the_policy(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.status_code == 200
    assert answer.content == page_files()[path].read_bytes()
    assert answer.headers["content-type"] == f"{kinds[page_files()[path].suffix[1:]]}; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    policy = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert not {"script-src", "style-src", "connect-src", "img-src"} & policy.keys()  # nothing widens it
    head = await client.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", answer.headers["etag"])


async def test_a_file_that_is_the_same_is_not_sent_again(client: httpx.AsyncClient) -> None:
    tags = set()
    for path in page_files():
        tag = (await client.get(path)).headers["etag"]
        tags.add(tag)
        for known in (tag, f'"other", W/{tag}', "*"):
            again = await client.get(path, headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert (await client.get(path, headers={"If-None-Match": '"other"'})).status_code == 200
    assert len(tags) == len(page_files())


class Tags(HTMLParser):
    """All elements with their attributes, and the text within scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in ("script", "style") and data.strip():
            self.inline.append(data)


def test_the_page_has_all_it_needs_from_this_server_alone() -> None:
    page = Tags((FOLDER / "index.html").read_text(encoding="utf-8"))
    assert page.inline == []
    named = []
    for tag, attributes in page.elements:
        assert tag != "style"
        assert not [name for name in attributes if name == "style" or name.startswith("on")], (tag, attributes)
        named += [value for name, value in attributes.items() if name in ("src", "href") and value[:1] != "#"]
    assert {f"/{name}" for name in named} <= page_files().keys()  # relative: it works under a prefix too
    assert "ui/app.js" in named
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8").replace('"http://www.w3.org/2000/svg"', "")  # a name, not an address
        assert "//" not in re.sub(r"^\s*//.*$|\s// .*$", "", text, flags=re.MULTILINE), file.name
        assert not re.search(r"url\(|@import", text), file.name
        imported = re.findall(r'^import .* from "\./(.*)";$', text, flags=re.MULTILINE)
        assert {f"/ui/{name}" for name in imported} <= page_files().keys()
        assert len(text.splitlines()) < 300


def test_nothing_that_comes_from_elsewhere_is_ever_read_as_html() -> None:
    sinks = (
        "innerHTML|outerHTML|insertAdjacentHTML|document.write|setHTML|DOMParser|createContextualFragment|eval|srcdoc"
    )
    for file in FOLDER.glob("*.js"):
        assert not re.search(rf"\b({sinks})\b", file.read_text(encoding="utf-8")), file.name


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def guarded(server: FakeServer) -> AsyncIterator[httpx.AsyncClient]:
    """With keys, and acme's, byte's and a shared adapter in memory, two pages each."""
    for name in ("acme/sql", "byte/poet", "shared", "merged/of-two"):
        await server.adapters.register(name, f"/adapters/{name}")
    digests = [digest_of_source(f"/adapters/{name}") for name in ("acme/sql", "byte/poet", "merged/of-two")]
    pages = {digest: [1 + 2 * i, 2 + 2 * i] for i, digest in enumerate(digests)}
    server.hold(
        *(
            AdapterPlace(name, on_device=name != "shared", pinned=name == "acme/sql")
            for name in ("acme/sql", "byte/poet", "merged/of-two", "shared")
        ),
        pages=PageOwners(("kv", *["adapter"] * 6, None), pages),
    )
    return server.client(access=access_of(KEYS))


async def test_files_need_no_key_and_what_they_show_does(guarded: httpx.AsyncClient) -> None:
    for path in page_files():
        assert (await guarded.get(path)).status_code == 200
        assert (await guarded.post(path)).status_code == 401
    for path in ("/ui/overview", "/ui/overview/", "/ui/../ui/overview", "/ui/nothing.js", "/ui/"):
        assert (await guarded.get(path)).status_code == 401, path
    assert (await guarded.get("/ui/overview", headers={"Authorization": "Bearer lpx_wrong"})).status_code == 401
    assert (await guarded.get("/ui/../ui/index.html", headers={"x-api-key": ROOT})).status_code == 404


async def test_a_tenant_sees_its_own_and_what_is_shared(guarded: httpx.AsyncClient) -> None:
    found = await overview(guarded, ALICE)
    assert "poet" not in str(found)
    assert "merged" not in str(found)
    rows = {row["name"]: row for row in found["adapters"]["rows"]}
    assert list(rows) == ["acme/sql", "shared"]
    assert (rows["acme/sql"]["level"], rows["shared"]["level"]) == ("device", "host")
    assert (rows["acme/sql"]["pinned"], rows["shared"]["pinned"]) == (True, False)
    assert found["adapters"]["levels"] == {"device": 1, "host": 1, "disk": 0}
    assert rows["acme/sql"]["requests"] == 0
    assert [rows["shared"][name] for name in ("in_use", "requests", "tokens", "loads")] == [
        None
    ] * 4  # others use it too
    assert found["arena"]["names"] == ["acme/sql"]
    assert decode(found["arena"]["runs"]) == [KV, OTHER + 1, OTHER + 1, OTHER, OTHER, OTHER, OTHER, 0]
    assert (found["server"]["may_use_base"], found["server"]["tenant"]) == (False, "acme")
    assert found["server"]["formats"] == "Q4_1 + Q8_0, inputs a8, float32"


async def test_what_receipts_came_to_is_told_and_none_is_begun(server: FakeServer) -> None:
    versions = [await server.adapters.register(name, f"/{name}") for name in ("made", "pending", "failed", "none")]
    state = dict(zip((each.uid for each in versions), (RECEIPT, "pending", "failed", None), strict=True))
    prover = Mock(spec=Prover)  # a call of begin, wait or offer would answer with no JSON
    prover.known = lambda version: state[version.uid] if version.name == "made" else None
    prover.is_under_way = lambda version: state[version.uid] == "pending"
    prover.failure = lambda version: "the disk" if state[version.uid] == "failed" else None
    server.given["prover"] = prover
    proofs = {row["name"]: row["proof"] for row in (await overview(server.client()))["adapters"]["rows"]}
    assert proofs.pop("made") == {
        "status": "made",
        "effect": 0.01,
        "rounding": 1e-3,
        "probe": None,
        "probe_base": 0.01,
        "doubt": RECEIPT.doubt,
        "remark": RECEIPT.remark,
    }
    assert RECEIPT.doubt is not None
    assert {name: proof.pop("status") for name, proof in proofs.items()} == {name: name for name in proofs}
    assert not any(proofs.values())
    assert not prover.method_calls


@pytest.mark.parametrize("key", [ROOT, SEER])
async def test_who_may_see_all_sees_all_but_what_requests_brought(guarded: httpx.AsyncClient, key: str) -> None:
    found = await overview(guarded, key)
    assert [row["name"] for row in found["adapters"]["rows"]] == ["acme/sql", "byte/poet", "shared"]
    assert all(row["loads"] == 0 for row in found["adapters"]["rows"])
    assert found["arena"]["names"] == ["acme/sql", "byte/poet"]
    assert decode(found["arena"]["runs"]) == [KV, OTHER + 1, OTHER + 1, OTHER + 2, OTHER + 2, OTHER, OTHER, 0]
    assert found["arena"]["slots"] == 3


async def test_looking_is_neither_limited_nor_logged(
    guarded: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="loraplex.access"):
        for _ in range(3):
            await overview(guarded, ROOT)
    assert caplog.messages == []


# ---- what is shown --------------------------------------------------------------------------------------------------


async def test_the_last_minute_is_counted_as_requests_are_answered(server: FakeServer) -> None:
    clock = Clock()
    metrics = server.services.metrics
    metrics.recent = Recent(clock)
    server.engine.current = EngineStats(running=3, waiting=2, waiting_for_adapters=1)
    await server.adapters.register("sql", "/adapters/sql")
    client = server.client(metrics=metrics)
    body = {"model": "sql", "prompt": "the question", "max_tokens": 3}
    usage = (await client.post("/v1/completions", json=body)).json()["usage"]
    assert usage["completion_tokens"] == 3
    assert sum((await overview(client))["minute"]["tokens"]) == 0  # the second is not over
    clock.now += 1
    found = await overview(client)
    clock.now += 5
    later = await overview(client)
    assert found["minute"]["tokens"] == [0] * 59 + [3]
    assert later["minute"]["tokens"] == [0] * 54 + [3] + [0] * 5
    assert found["minute"]["prompt_tokens"][-1] == usage["prompt_tokens"]
    assert found["minute"]["first_token"]["count"] == 1
    assert found["minute"]["next_token"]["count"] == 2
    assert found["requests"] == {"running": 3, "max_running": 8, "waiting": 2, "waiting_for_adapters": 1}
    (row,) = found["adapters"]["rows"]
    assert (row["requests"], row["tokens"], row["in_use"], row["level"]) == (1, 3, 0, "disk")
    assert [part["name"] for part in found["memory"]] == ["weights", "arena"]


async def test_what_holds_an_adapter_shows_while_it_lasts(client: httpx.AsyncClient, server: FakeServer) -> None:
    await server.adapters.register("sql", "/adapters/sql")
    with server.adapters.registry.lease("sql"):
        assert (await overview(client))["adapters"]["rows"][0]["in_use"] == 1
    assert (await overview(client))["adapters"]["rows"][0]["in_use"] == 0


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("column", ["name", "level", "rank", "pages", "bytes", "in_use", "requests", "tokens", "loads"])
async def test_hundreds_of_adapters_come_in_order_page_by_page(
    client: httpx.AsyncClient, server: FakeServer, column: str, order: str
) -> None:
    registry = server.adapters.registry
    for i in range(300):
        registry.register(f"a{i * 79 % 300:03}", "/x", AdapterInfo(i % 7, (), i % 11, i * 31 % 997))
    server.hold(*(AdapterPlace(f"a{i:03}", on_device=i % 3 > 0, pinned=False) for i in range(0, 60)))
    rows = []
    for offset in range(0, 300, 100):
        page = (await overview(client, sort=column, order=order, offset=offset, limit=100))["adapters"]
        assert (page["total"], page["found"], page["offset"], len(page["rows"])) == (300, 300, offset, 100)
        rows += page["rows"]
    assert len({row["name"] for row in rows}) == 300
    values = [("device", "host", "disk").index(row["level"]) if column == "level" else row[column] for row in rows]
    assert values == sorted(values, reverse=order == "desc")
    if column != "name":  # equals: by name
        assert all(
            a["name"] < b["name"] for a, b, x, y in zip(rows, rows[1:], values, values[1:], strict=False) if x == y
        )


async def test_rows_are_narrowed_by_name_and_by_place(client: httpx.AsyncClient, server: FakeServer) -> None:
    for name in ("acme/SQL", "acme/poet", "sql-2"):
        await server.adapters.register(name, f"/adapters/{name}")
    server.hold(AdapterPlace("sql-2", on_device=True, pinned=False))

    async def names(**query: str) -> list[str]:
        adapters = (await overview(client, **query))["adapters"]
        assert adapters["found"] == len(adapters["rows"])
        assert (adapters["total"], adapters["levels"]) == (3, {"device": 1, "host": 0, "disk": 2})
        return [row["name"] for row in adapters["rows"]]

    assert await names() == ["sql-2", "acme/SQL", "acme/poet"]
    assert await names(filter="Sql") == ["sql-2", "acme/SQL"]
    assert await names(filter="sql", level="disk") == ["acme/SQL"]
    assert await names(filter=".*") == []
    assert await names(level="host") == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"sort": "digest"}, "sort"),
        ({"level": "cloud"}, "level"),
        ({"order": "up"}, "order"),
        ({"offset": "-1"}, "offset"),
        ({"limit": "many"}, "limit"),
        ({"limit": "9" * 30}, "limit"),
    ],
)
async def test_a_query_that_cannot_be_is_400(client: httpx.AsyncClient, query: dict[str, str], param: str) -> None:
    answer = await client.get("/ui/overview", params=query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
