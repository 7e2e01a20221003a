"""Repositories of the Hub, played by a server that speaks its protocol: revisions, tokens, checksums, outages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.adapters.errors import AdapterError, AdapterNotFound, AdapterRefused, AdapterUnavailable
from loraplex.adapters.files import bounded_json
from loraplex.adapters.sources import fetch as fetch_module
from loraplex.adapters.sources.addresses import Reach
from loraplex.adapters.sources.downloads import Downloads
from loraplex.adapters.sources.sources import SourceAccess, parse_source
from tests.support.adapter_archives import CONFIG, FILES, WEIGHTS, weights
from tests.support.fake_hub import FakeHub, Repo, fake_hub
from tests.support.refusals import refused
from tests.support.web_server import Page

REPOSITORY = {**FILES, "README.md": b"# hi", "training_args.bin": b"a pickle"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(fetch_module, "PAUSE", 0.01)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
    with fake_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        server.repos["acme/sql"] = Repo()
        server.repos["acme/sql"].commit(REPOSITORY)
        yield server


@pytest.fixture
def downloads(hub: FakeHub, tmp_path: Path) -> Iterator[Downloads]:
    """The Hub's own address is the operator's word, so nothing has to be allowed; its content store's here is."""
    made = Downloads(tmp_path / "cache", reach=Reach(("localhost",)))
    yield made
    made.close()


def get(downloads: Downloads, text: str, access: SourceAccess | None = None, *, stale: bool = False) -> Path:
    return downloads.fetch(parse_source(text, access or SourceAccess()), stale=stale).result(30)


def test_only_config_and_safetensors_are_fetched(downloads: Downloads, hub: FakeHub) -> None:
    folder = get(downloads, "acme/sql")
    assert weights(folder) == WEIGHTS
    assert (folder / "adapter_config.json").read_bytes() == CONFIG
    fetched = [asked.path for asked in hub.web.requests]
    assert not any(name in path for path in fetched for name in ("README", "training_args"))
    count = len(fetched)
    assert get(downloads, "hf://acme/sql") == folder
    assert len(hub.web.requests) == count + 1, "asked for the commit alone"


def test_revisions_are_apart(downloads: Downloads, hub: FakeHub) -> None:
    repo = hub.repos["acme/sql"]
    old = repo.refs["main"]
    repo.commit({**REPOSITORY, "adapter_model.safetensors": b"new"})
    repo.commit({**REPOSITORY, "adapter_model.safetensors": b"branch"}, ref="refs/pr/1")
    assert weights(get(downloads, "acme/sql")) == b"new"
    assert weights(get(downloads, "acme/sql@refs/pr/1")) == b"branch"
    assert weights(get(downloads, f"acme/sql@{old}")) == WEIGHTS
    with pytest.raises(AdapterNotFound, match="no revision 'v9'"):
        get(downloads, "acme/sql@v9")


def test_private_ones_need_the_callers_own_token(
    downloads: Downloads, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["acme/sql"].token = "hf_alice"
    folder = get(downloads, "acme/sql", SourceAccess("hf_alice"))
    assert weights(folder) == WEIGHTS
    for access in (SourceAccess(), SourceAccess("hf_bob"), SourceAccess(ambient=False)):
        with pytest.raises(AdapterNotFound, match="private and needs a token") as caught:
            get(downloads, "acme/sql", access, stale=True)
        assert "hf_" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")  # the server's own, for who may use it
    assert weights(get(downloads, "acme/sql")) == WEIGHTS
    with pytest.raises(AdapterNotFound):
        get(downloads, "acme/sql", SourceAccess(ambient=False))
    sent = [asked for asked in hub.web.requests if asked.path.startswith("/store/")]
    assert sent
    assert {asked.headers.get("Authorization") for asked in sent} <= {"Bearer hf_alice"}  # one host plays both here


def test_tokens_do_not_follow_to_the_content_store(downloads: Downloads, hub: FakeHub) -> None:
    hub.repos["acme/sql"].token = "hf_alice"
    place = hub.web.url("/elsewhere", "127.0.0.1")
    resolve = f"/acme/sql/resolve/{hub.repos['acme/sql'].refs['main']}/adapter_model.safetensors"
    hub.web.pages[resolve] = Page(status=302, headers={"Location": place})
    hub.web.pages["/elsewhere"] = Page(WEIGHTS)
    downloads = Downloads(downloads._cache._root, reach=Reach(("localhost", "127.0.0.1")))
    assert weights(get(downloads, "acme/sql", SourceAccess("hf_alice"))) == WEIGHTS
    assert [asked.headers.get("Authorization") for asked in hub.web.requests if asked.path == "/elsewhere"] == [None]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_bytes_that_are_not_the_commits_are_refused(downloads: Downloads, hub: FakeHub, name: str) -> None:
    """LFS files have a sha256, the others git's own hash: of the same size, one bit off."""
    wrong = bytes([FILES[name][0] ^ 1]) + FILES[name][1:]
    hub.web.pages[f"/acme/sql/resolve/{hub.repos['acme/sql'].refs['main']}/{name}"] = Page(wrong)
    with refused("bad_file", "checksum"):
        get(downloads, "acme/sql")


def test_half_a_file_of_other_bytes_is_found_out(downloads: Downloads, hub: FakeHub, tmp_path: Path) -> None:
    path = f"/acme/sql/resolve/{hub.repos['acme/sql'].refs['main']}/adapter_model.safetensors"
    hub.web.pages[path] = Page(WEIGHTS, cuts=[1000] + [0] * 20)
    with pytest.raises(AdapterUnavailable):
        get(downloads, "acme/sql")
    (half,) = (tmp_path / "cache").glob("partial/*/*.safetensors")
    half.write_bytes(bytes(1000))
    del hub.web.pages[path]
    assert weights(get(downloads, "acme/sql")) == WEIGHTS


@pytest.mark.parametrize(
    ("repo", "files", "error", "match"),
    [
        ("acme/none", None, AdapterNotFound, "no such repository"),
        (
            "acme/full",
            {"adapter_config.json": CONFIG, "model.safetensors": b""},
            AdapterRefused,
            "it has adapter_config",
        ),
        ("acme/old", {"adapter_config.json": CONFIG, "adapter_model.bin": b""}, AdapterRefused, "pickles can run code"),
        ("acme/empty", {}, AdapterRefused, "it has nothing"),
    ],
)
def test_repositories_that_are_no_adapter(
    downloads: Downloads, hub: FakeHub, repo: str, files: dict[str, bytes] | None, error: type[AdapterError], match: str
) -> None:
    if files is not None:
        hub.repos[repo] = Repo()
        hub.repos[repo].commit(files)
    with pytest.raises(error, match=match) as caught:
        get(downloads, repo)
    assert "\n" not in str(caught.value)


def test_an_outage(downloads: Downloads, hub: FakeHub) -> None:
    folder = get(downloads, "acme/sql")
    hub.down = True
    with pytest.raises(AdapterUnavailable, match="503"):
        get(downloads, "acme/sql")
    assert get(downloads, "acme/sql", stale=True) == folder
    hub.web.stop()
    with pytest.raises(AdapterUnavailable, match="cannot be reached"):
        get(downloads, "acme/sql")


def test_a_listing_of_any_length_is_not_read(
    downloads: Downloads, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has a repository says how many files there are, and what they are called."""
    parsed: list[int] = []
    real = bounded_json.json.loads
    monkeypatch.setattr(bounded_json.json, "loads", lambda text, **k: (parsed.append(len(text)), real(text, **k))[1])
    many = {f"{'deep/' * 20}file-{i}": b"" for i in range(30_000)}
    for name, files in (("acme/many", many), ("acme/odd", {**REPOSITORY, "[{," * 100_000: b""})):
        hub.repos[name] = Repo()
        hub.repos[name].commit(files)
        with pytest.raises(AdapterRefused, match=r"too many files|values or more") as caught:
            get(downloads, name)
        assert caught.value.code in ("too_large", "bad_source")
    assert parsed == []
    hub.repos["acme/some"] = Repo()
    hub.repos["acme/some"].commit({**REPOSITORY, **dict(list(many.items())[:5000])})
    assert weights(get(downloads, "acme/some")) == WEIGHTS


@pytest.mark.parametrize(
    "answer", [b"{}", b"[]", b"<html>", b'{"sha": 1, "siblings": []}', b'{"sha": "a", "siblings": [1]}']
)
def test_what_is_no_hub_s_answer(downloads: Downloads, hub: FakeHub, answer: bytes) -> None:
    hub.web.pages["/api/models/acme/sql?blobs=True"] = hub.web.pages["/api/models/acme/sql"] = Page(answer)
    with pytest.raises((AdapterUnavailable, AdapterRefused), match="acme/sql: "):
        get(downloads, "acme/sql")


def test_gated_ones_say_so(downloads: Downloads, hub: FakeHub) -> None:
    page = Page(status=403, headers={"X-Error-Code": "GatedRepo"})
    hub.web.pages["/api/models/acme/sql?blobs=True"] = hub.web.pages["/api/models/acme/sql"] = page
    with pytest.raises(AdapterNotFound, match="is gated; ask for access"):
        get(downloads, "acme/sql")
