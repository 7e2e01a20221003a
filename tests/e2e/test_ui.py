"""The page at /ui in a real browser, over a live server with keys, a tiny model and adapters made by PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from loraplex.server.config_access import AuthConfig
from loraplex.server.proof.receipt import Receipt
from loraplex.server.tenancy.keys_file import new_key
from tests.support.browser import Browser, chromium
from tests.support.live_server import TINY, LiveServer, live_server
from tests.support.peft_adapters import make_peft_adapter

PROMPT = "the quick brown fox jumps over the lazy dog"
NASTY = '<img src="x" onerror="document.title=1"><b>'


@dataclass(frozen=True)
class Served:
    live: LiveServer
    adapters: Path

    def ask(self, method: str, path: str, key: str = "root", **fields: Any) -> httpx.Response:
        answer = self.live.ask(method, path, key, **fields)
        assert answer.status_code == 200, answer.text
        return answer

    def load(self, name: str, folder: str) -> None:
        assert self.live.load(name, self.adapters / folder, "root").status_code == 200

    def answer(self, model: str) -> str:
        """What the API says without streaming, greedily."""
        messages = [{"role": "user", "content": PROMPT}]
        body = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
        return str(self.ask("POST", "/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])

    def overview(self, key: str = "root") -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", "/ui/overview", key).json()
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def served(browser: Browser, base: Path, oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two", "three")):
        make_peft_adapter(oracle, folder / name, seed=seed, r=8, target_modules=["q_proj", "v_proj", "up_proj"])
    keys = [
        new_key("root", "ops", admin=True),
        new_key("alice", "acme", adapters=["acme/*", "shared"], base=False),
    ]
    engine = replace(TINY, memory=48 << 20, max_num_seqs=8)
    with live_server(base, engine=engine, keys=keys, auth=AuthConfig(allowed_paths=(folder,))) as live:
        served = Served(live, folder)
        served.load("acme/one", "one")
        served.load("shared", "two")
        yield served


@pytest.fixture
def page(browser: Browser, served: Served, request: pytest.FixtureRequest) -> Iterator[Browser]:
    """The page as whoever the test is about sees it ("key", by default root); nothing may go wrong on it unseen."""
    name = getattr(request, "param", "root")
    browser.driver.get(f"{served.live.url}/ui/icon.svg")  # the same origin, and nothing of the page runs
    browser.run("sessionStorage.clear()")
    if name:
        browser.run("sessionStorage.setItem('loraplex.key', arguments[0])", served.live.keys[name])
    browser.collect()
    browser.asked.clear()
    browser.said.clear()
    browser.driver.get(f"{served.live.url}/ui")
    yield browser
    browser.collect()
    assert {urlsplit(url).netloc for url in browser.asked} == {urlsplit(served.live.url).netloc}
    assert [line for line in browser.said if " 401 " not in line and " 404 " not in line] == []  # these are asked for


def rows(page: Browser) -> dict[str, str]:
    """Name -> where it lives, as the table has it."""
    found = page.run(
        "return [...document.querySelectorAll('#rows tr')].map(r => [r.dataset.name, r.cells[1].textContent])"
    )
    return dict(found)


def legend(page: Browser) -> dict[str, int]:
    found = page.run("return [...document.querySelectorAll('#legend li')].map(i => [i.dataset.kind, +i.dataset.pages])")
    return dict(found)


def set_lanes(page: Browser, *models: str) -> None:
    page.wait(lambda: page.all("#rows tr"), "the table")
    page.run("document.querySelectorAll('.lane header button').forEach(button => button.click())")
    for model in models:
        page.one("#pick").send_keys(model)
        page.one("#add").click()
    assert [lane.get_attribute("data-model") for lane in page.all(".lane")] == list(models)


def send(page: Browser, *states: str) -> None:
    """Ask all lanes, and wait until they have ended as `states` say."""
    page.one("#prompt").clear()
    page.one("#prompt").send_keys(PROMPT)
    page.run("document.getElementById('max-tokens').value = 12")
    page.one("#send").click()
    page.wait(lambda: [lane.get_attribute("data-state") for lane in page.all(".lane")] == list(states), "the answers")


def test_adapters_are_shown_with_their_levels_and_come_as_they_are_loaded(page: Browser, served: Served) -> None:
    served.answer("acme/one")  # to the device
    page.wait(lambda: rows(page).get("acme/one") == "device", "the adapter on the device")
    assert "late" not in rows(page)
    served.load("late", "three")
    page.wait(lambda: "late" in rows(page), "the adapter that came")
    levels = {row["name"]: row["level"] for row in served.overview()["adapters"]["rows"]}
    assert rows(page) == levels
    served.answer("late")
    page.wait(lambda: rows(page)["late"] == "device", "its way to the device")
    page.one("#filter").send_keys("LAT")
    page.wait(lambda: list(rows(page)) == ["late"], "the filter")
    served.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": "late"})
    page.wait(lambda: not rows(page), "its end")


def test_versions_and_aliases_are_shown(page: Browser, served: Served) -> None:
    served.load("turn", "one")
    old = served.ask("GET", "/v1/adapters/turn").json()["digest"]
    assert served.live.load("turn", served.adapters / "two", "root", load_inplace=True, retain=1).status_code == 200
    assert served.live.load("turn", served.adapters / "three", "root", load_inplace=True, retain=1).status_code == 200
    versions = served.ask("GET", "/v1/adapters/turn").json()["versions"]
    assert [(each["state"], each["gone"]) for each in versions] == [
        ("serving", None),
        ("kept", None),
        ("gone", "replaced"),
    ]
    assert versions[2]["digest"] == old
    served.ask("PUT", "/v1/adapters/turn/labels/prod", json={"version": "previous"})
    targets = [{"adapter": "turn@prod", "weight": 95}, {"adapter": "turn", "weight": 5}]
    served.ask("PUT", "/v1/aliases/support", json={"targets": targets, "requires": "eval >= previous"})
    row = "return [...document.querySelectorAll('#rows tr')].find(r => r.dataset.name === 'turn')"
    new, kept = (each["digest"][:12] for each in versions[:2])

    def shown() -> list[str] | None:
        return page.run(
            f"{row}?.querySelector('.version') && (v => [v.textContent, v.title])({row[7:]}.querySelector('.version'))"
        )

    page.wait(lambda: shown() == [f"{new} +1", f"{new} serving\n{kept} prod kept"], "the versions")
    page.wait(lambda: page.texts("#alias-rows th") == ["support"], "the alias")
    assert page.texts("#alias-rows td") == [
        "split, requires eval >= previous",
        f"turn@{kept} 95 %, turn 5 %",
        "1",
    ]
    served.ask("DELETE", "/v1/aliases/support")
    page.wait(lambda: not page.one("#aliases").is_displayed(), "its end")
    served.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": "turn"})


def test_what_receipts_came_to_is_shown(page: Browser, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = served.ask("GET", "/v1/adapters/shared?wait=60").json()["proof"]["receipt"]

    def shown(name: str = "shared") -> tuple[str, str, bool]:
        find = "const r = [...document.querySelectorAll('#rows tr')].find(r => r.dataset.name === arguments[0])"
        take = "const s = r?.querySelector('.receipt'); return s ? [s.textContent, s.title, s.className] : ['', '', '']"
        text, words, style = page.run(f"{find}; {take}", name)
        return text, words, "wrong" in style

    page.wait(lambda: shown()[0].startswith("effect"), "the receipt")
    text, words, wrong = shown()
    found = re.fullmatch(r"effect (\S+) % · rounding (\S+) % · probe (\S+)", text)
    assert found is not None, text
    expected = (100 * proof["effect"]["relative"], 100 * proof["dtype"]["rounding"], proof["probe"]["adapter"])
    for told, value in zip(found.groups(), expected, strict=True):
        assert float(told) == pytest.approx(value, rel=0.05)  # two digits of it
    assert expected[0] > 0
    assert ("Frobenius" in words, "doubt" in words, wrong) == (True, False, False)
    monkeypatch.setattr(Receipt, "doubt", "its answers are off")
    page.wait(lambda: shown()[0] == f"{text} · in doubt", "the doubt")
    assert ("its answers are off" in shown()[1], shown()[2]) == (True, True)


def test_the_playground_streams_what_each_adapter_says(page: Browser, served: Served) -> None:
    expected = {model: served.answer(model) for model in ("tiny", "acme/one", "shared")}
    assert len(set(expected.values())) == 3
    set_lanes(page, *expected)
    send(page, "done", "done", "done")
    assert dict(zip(expected, page.texts(".lane .answer"), strict=True)) == expected
    assert page.texts(".lane .ending") == ["cut off"] * 3
    assert page.texts(".lane dl div:last-child dd") == ["12"] * 3
    assert all(text.endswith("s") for text in page.texts(".lane dl div:first-child dd"))
    posts = [
        url for url in page.run("return performance.getEntriesByType('resource').map(e => e.name)") if "chat" in url
    ]
    assert len(posts) == 3


def test_what_goes_wrong_is_said_in_its_place_and_never_read_as_html(page: Browser, served: Served) -> None:
    set_lanes(page, "shared", NASTY)
    send(page, "done", "failed")
    assert page.texts(".lane .answer")[0] == served.answer("shared")
    assert page.texts(".lane h3") == ["shared", NASTY]
    assert f"The model `{NASTY}` does not exist" in page.texts(".lane .wrong")[1]
    assert page.all(".lane img, .lane b") == []
    assert page.driver.title == "tiny · loraplex"


def test_a_stream_can_be_stopped(page: Browser, served: Served) -> None:
    set_lanes(page, "tiny")
    page.run("document.getElementById('max-tokens').value = 200")
    page.run(HANGING)
    page.one("#send").click()
    page.wait(lambda: page.one("#stop").is_enabled(), "the way to stop")
    page.one("#stop").click()
    page.wait(lambda: page.one(".lane").get_attribute("data-state") == "stopped", "the stop")
    page.wait(lambda: not page.one("#stop").is_enabled(), "the end")


def test_the_map_agrees_with_the_pool(page: Browser, served: Served) -> None:
    served.answer("acme/one")
    served.answer("shared")
    pool = served.live.parts.engine._scheduler.kv.pool
    page.wait(lambda: legend(page).get("adapter") == pool.used_by("adapter") > 0, "the adapters' pages")
    page.wait(lambda: legend(page).get("kv") == 0, "the end of the requests")
    assert legend(page)["prefix"] == pool.used_by("prefix") > 0
    assert legend(page)["free"] == pool.num_free
    held = served.live.parts.engine.stats().adapters.pages
    digests = {version.digest: version.name for version in served.live.parts.adapters.registry.list()}
    names = {page: digests[digest] for digest, pages in held.adapters.items() for page in pages}
    words = {None: "free", "prefix": "cached prefixes"}
    page.one("#map").click()  # the focus, and some page in the middle
    page.run("document.getElementById('map').blur(); document.getElementById('map').focus()")
    for number in range(12):
        page.one("#map").send_keys("\ue014")  # to the right
        whose = names.get(number) or words[held.owners[number]]
        assert page.text("#map-cell").startswith(f"Page {number}: {whose}, with "), number
    colours = page.run(PAINTED)
    assert colours >= 4  # free, prefixes, two adapters


@pytest.mark.parametrize("page", [""], indirect=True)
def test_without_a_key_it_asks_for_one_and_keeps_it_in_the_tab(page: Browser, served: Served) -> None:
    page.wait(lambda: page.one("#key-dialog").is_displayed(), "the question")
    assert rows(page) == {}
    page.one("#key-input").send_keys("lpx_mistaken\n")
    page.wait(lambda: "does not know" in page.text("#key-wrong"), "the refusal")
    page.one("#key-input").send_keys(f"{served.live.keys['alice']}\n")
    page.wait(lambda: rows(page), "what alice may see")
    assert set(rows(page)) == {"acme/one", "shared"}
    assert not page.one("#key-dialog").is_displayed()
    assert "tenant acme" in page.text("#about")
    kept = "return [sessionStorage.length, localStorage.length, document.cookie, location.href]"
    assert page.run(kept) == [1, 0, "", f"{served.live.url}/ui"]
    page.one("#key-button").click()
    page.one("#key-forget").click()
    page.wait(lambda: page.one("#key-dialog").is_displayed(), "the question again")
    assert page.run(kept)[0] == 0


@pytest.mark.parametrize("page", ["alice"], indirect=True)
def test_what_is_others_is_nobodys_by_name(page: Browser, served: Served) -> None:
    served.load("byte/secret", "three")
    served.answer("byte/secret")
    theirs = next(row for row in served.overview()["adapters"]["rows"] if row["name"] == "byte/secret")
    assert theirs["level"] == "device"
    page.wait(lambda: legend(page).get("other"), "pages of others")
    assert set(rows(page)) == {"acme/one", "shared"}
    assert "secret" not in page.run("return document.documentElement.outerHTML")
    served.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": "byte/secret"})


@pytest.mark.parametrize(("width", "scheme"), [(1400, "dark"), (1400, "light"), (390, "dark")])
def test_it_fits_and_can_be_read(page: Browser, width: int, scheme: str) -> None:
    """On a phone nothing has to be moved sideways; each theme has the contrast that WCAG asks for (4.5)."""
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.command("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500)
    try:
        page.wait(lambda: page.all("#rows tr"), "the table")
        assert page.run("return document.documentElement.scrollWidth") <= width
        for selector in ("h1", ".tile h2", "#about", "#rows th", ".legend li", ".controls label", ".lane dt"):
            text, ground = page.run(COLOURS, selector)
            assert contrast(text, ground) >= 4.5, selector
        ground = page.run(COLOURS, "h1")[1]
        assert (luminance(ground) < 0.1) == (scheme == "dark")
    finally:
        page.command("Emulation.clearDeviceMetricsOverride")
        page.command("Emulation.setEmulatedMedia", features=[])


HANGING = """
const real = window.fetch;
window.fetch = (path, options) => {
  if (!String(path).includes("chat")) return real(path, options);
  return new Promise((_, refuse) => {
    options.signal.addEventListener("abort", () => refuse(options.signal.reason));
  });
};
"""
"""A server that takes chats and never answers."""

PAINTED = """
const map = document.getElementById("map");
const data = map.getContext("2d").getImageData(0, 0, map.width, map.height).data;
const found = new Set();
for (let i = 0; i < data.length; i += 4) found.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
return found.size;
"""
"""How many colours the map has."""

COLOURS = """
const rgb = (colour) => {
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
};
let node = document.querySelector(arguments[0]);
const text = rgb(getComputedStyle(node).color);
while (rgb(getComputedStyle(node).backgroundColor)[3] < 255) node = node.parentElement;
return [text, rgb(getComputedStyle(node).backgroundColor)];
"""
"""Of an element's text, and of the ground under it: [r, g, b, alpha], 0 to 255."""


def luminance(colour: list[int]) -> float:
    """WCAG 2's."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG 2's, 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
