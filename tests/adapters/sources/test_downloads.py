"""Downloads over https: resumed, checked, bounded, once for all who ask, whole or not there; nobody else harmed."""

from __future__ import annotations

import base64
import errno
import gzip
import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable
from loraplex.adapters.sources import downloads as downloads_module
from loraplex.adapters.sources import fetch as fetch_module
from loraplex.adapters.sources.addresses import Reach
from loraplex.adapters.sources.downloads import DownloadLimits, Downloads
from loraplex.adapters.sources.sources import Source, parse_source
from tests.support.adapter_archives import CONFIG, FILES, WEIGHTS, tar, weights
from tests.support.ordinary_user import ordinary_user, reachable_folder
from tests.support.refusals import refused
from tests.support.waiting import LIMIT, wait_for
from tests.support.web_server import Page, WebServer, web_server

WEIGHTS_PATH = "/sql/adapter_model.safetensors"

Make = Callable[..., Downloads]


@pytest.fixture
def web() -> Iterator[WebServer]:
    with web_server() as server:
        put(server, "/sql")
        yield server


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """other.localhost is this machine, too; not every resolver knows."""
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **options: Any) -> Any:
        return real("localhost" if host == "other.localhost" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.fixture
def make(web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Downloads that may reach the server; arguments are those of DownloadLimits."""
    monkeypatch.setattr(fetch_module, "PAUSE", 0.01)
    made: list[Downloads] = []

    def build(
        folder: str = "cache", reach: Reach = Reach(("localhost",)), in_use: set[str] | None = None, **limits: float
    ) -> Downloads:
        chosen = DownloadLimits(**{"stall_seconds": 5.0, **limits})  # type: ignore[arg-type]
        made.append(Downloads(tmp_path / folder, chosen, reach, lambda: in_use or set(), web.tls))
        return made[-1]

    yield build
    for each in made:
        each.close()


def put(web: WebServer, path: str, weights: bytes = WEIGHTS, config: bytes = CONFIG) -> None:
    web.pages[f"{path}/adapter_config.json"] = Page(config)
    web.pages[f"{path}/adapter_model.safetensors"] = Page(weights)


def get(downloads: Downloads, source: Source | str, *, stale: bool = False) -> Path:
    found = parse_source(source) if isinstance(source, str) else source
    return downloads.fetch(found, stale=stale).result(LIMIT)


def content(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "adapter_config.json").read_bytes(), weights(folder)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in (folder / "partial").rglob("*") if path.suffix != ".lock"]


# ---- what comes ------------------------------------------------------------------------------------------------------


def test_a_folder_is_fetched_once_and_asked_again(make: Make, web: WebServer, tmp_path: Path) -> None:
    downloads = make()
    folder = get(downloads, web.url("/sql"))
    assert content(folder) == (CONFIG, WEIGHTS)
    assert downloads.locate(web.url("/sql")) == folder
    assert get(downloads, web.url("/sql/")) == folder, "asked, and found unchanged"
    assert (web.count(WEIGHTS_PATH), web.count(WEIGHTS_PATH, "HEAD")) == (1, 2)
    put(web, "/sql", b"other weights")
    new = get(downloads, web.url("/sql"))
    assert content(new) == (CONFIG, b"other weights")
    assert downloads.locate(web.url("/sql")) == new
    assert not folder.exists()
    assert leftovers(tmp_path / "cache") == []


def test_what_was_fetched_outlives_the_process_and_the_source(make: Make, web: WebServer) -> None:
    folder = get(make(), web.url("/sql"))
    web.pages.clear()
    web.fallback = lambda asked: Page(status=500)
    downloads = make()
    assert downloads.locate(web.url("/sql")) == folder
    with pytest.raises(AdapterUnavailable, match="500"):
        get(downloads, web.url("/sql"))
    assert get(downloads, web.url("/sql"), stale=True) == folder
    web.fallback = lambda asked: Page(status=404)
    with pytest.raises(AdapterNotFound):  # it is gone, and not out of reach
        get(downloads, web.url("/sql"), stale=True)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_archives(make: Make, web: WebServer, name: str) -> None:
    data = tar({"x/adapter_config.json": CONFIG, "x/adapter_model.safetensors": WEIGHTS, "x/README.md": b"hi"})
    web.pages[f"/{name}"] = Page(data if name.endswith(".tar") else gzip.compress(data))
    assert content(get(make(), web.url(f"/{name}"))) == (CONFIG, WEIGHTS)


def test_a_server_that_tells_nothing(make: Make, web: WebServer) -> None:
    for page in web.pages.values():
        page.etag, page.length, page.ranges = None, False, False
    downloads = make()
    first = get(downloads, web.url("/sql"))
    second = get(downloads, web.url("/sql"))
    assert content(second) == (CONFIG, WEIGHTS)
    assert not first.exists(), "it may have changed, so it was fetched again"


def test_signed_urls_that_allow_get_alone(make: Make, web: WebServer) -> None:
    for page in web.pages.values():
        page.heads = False
    folder = get(make(), web.url("/sql") + "?sig=s3cr3t")
    assert content(folder) == (CONFIG, WEIGHTS)
    assert all("sig=s3cr3t" in asked.path for asked in web.requests)


def test_user_and_password_go_to_their_host_alone(make: Make, web: WebServer) -> None:
    login = "Basic " + base64.b64encode(b"ann:hunter 2").decode()
    body = tar(FILES)
    web.pages["/a.tar"] = Page(status=302, headers={"Location": web.url("/b.tar", "other.localhost")})
    web.pages["/b.tar"] = Page(body)
    url = web.url("/a.tar").replace("https://", "https://ann:hunter%202@")
    assert content(get(make(reach=Reach(("localhost", "*.localhost"))), url)) == (CONFIG, WEIGHTS)
    sent = {(asked.path, asked.headers.get("Authorization")) for asked in web.requests}
    assert sent == {("/a.tar", login), ("/b.tar", None)}


# ---- what breaks -----------------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_is_gone_on_with(make: Make, web: WebServer) -> None:
    web.pages[WEIGHTS_PATH].cuts = [200_000, 300_000, 0, 1]
    assert content(get(make(), web.url("/sql"))) == (CONFIG, WEIGHTS)
    ranges = [
        asked.headers.get("Range") for asked in web.requests if asked.path == WEIGHTS_PATH and asked.method == "GET"
    ]
    assert ranges == [None, "bytes=200000-", "bytes=500000-", "bytes=500000-", "bytes=500001-"]


def test_what_changes_on_the_way_is_begun_again(make: Make, web: WebServer) -> None:
    """The rest of another file is never put behind the start of this one."""
    other = os.urandom(len(WEIGHTS))
    page = web.pages[WEIGHTS_PATH]
    page.cuts = [200_000]
    web.pages[WEIGHTS_PATH].allow = lambda headers: exchange(headers)

    def exchange(headers: dict[str, str]) -> bool:
        if headers.get("Range"):
            page.body = other
        return True

    assert content(get(make(), web.url("/sql")))[1] == other


def test_a_server_that_breaks_off_for_ever(make: Make, web: WebServer) -> None:
    web.pages[WEIGHTS_PATH].cuts = [1000] + [0] * 100
    with pytest.raises(AdapterUnavailable, match="broke off"):
        get(make(), web.url("/sql"))
    assert web.count(WEIGHTS_PATH) == fetch_module.ATTEMPTS


@pytest.mark.parametrize("drip", [True, False])
def test_a_download_ends_in_time(make: Make, web: WebServer, drip: bool) -> None:
    """Whether nothing comes or a byte now and then."""
    web.pages[WEIGHTS_PATH].gate = None if drip else threading.Event()
    web.pages[WEIGHTS_PATH].drip = 0.02 if drip else None
    began = time.monotonic()
    with pytest.raises(AdapterUnavailable, match=r"--download-timeout|does not answer"):
        get(make(max_seconds=0.6, stall_seconds=30.0), web.url("/sql"))
    assert time.monotonic() - began < 60  # the whole of it would take hours


def test_a_silent_server_is_given_up(make: Make, web: WebServer) -> None:
    web.pages["/sql/adapter_config.json"].gate = threading.Event()
    with pytest.raises(AdapterUnavailable, match="does not answer"):
        get(make(stall_seconds=0.05, max_seconds=60), web.url("/sql"))


def test_sizes_are_bounded(make: Make, web: WebServer) -> None:
    with refused("too_large", r"700000 bytes, at most .*--max-adapter-size"):
        get(make(max_bytes=500_000), web.url("/sql"))
    assert web.count(WEIGHTS_PATH) == 0
    web.pages[WEIGHTS_PATH].length = False
    web.pages[WEIGHTS_PATH].etag = None
    with refused("too_large"):
        get(make(max_bytes=500_000), web.url("/sql"))
    put(web, "/big", config=bytes(2 << 20))
    with refused("too_large"):
        get(make(), web.url("/big"))
    web.pages["/bomb.tgz"] = Page(gzip.compress(tar({"x": bytes(20 << 20)}), 9))
    with refused("too_large"):
        get(make(max_bytes=1 << 20), web.url("/bomb.tgz"))


def test_a_certificate_of_nobody_is_refused(web: WebServer, tmp_path: Path) -> None:
    downloads = Downloads(tmp_path, reach=Reach(("localhost",)))
    with pytest.raises(AdapterUnavailable, match="certificate is not trusted"):
        get(downloads, web.url("/sql"))
    assert web.requests == []


# ---- where it may go -------------------------------------------------------------------------------------------------


def test_private_hosts_are_refused(make: Make, web: WebServer) -> None:
    for url in (web.url("/sql"), web.url("/sql", "127.0.0.1"), f"https://[::1]:{web.port}/sql", "https://0x7f.1/sql"):
        with refused("forbidden", "--allow-host"):
            get(make(reach=Reach()), url)
    assert web.requests == []


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("https://other.localhost:{port}/sql", "forbidden"),
        ("https://169.254.169.254/latest/meta-data", "forbidden"),
        ("http://localhost:{port}/sql", "forbidden"),
        ("file:///etc/passwd", "bad_source"),
        ("gopher://localhost/", "bad_source"),
        ("//127.0.0.1:{port}/x", "forbidden"),
        ("/sql/adapter_config.json?again", "bad_source"),  # more than five times
    ],
)
def test_redirects_are_checked_like_the_first_address(make: Make, web: WebServer, target: str, code: str) -> None:
    location = target.format(port=web.port)
    web.pages["/sql/adapter_config.json"] = Page(status=302, headers={"Location": location})
    with refused(code):
        get(make(), web.url("/sql"))
    assert {asked.path.partition("?")[0] for asked in web.requests} == {"/sql/adapter_config.json"}
    assert (len(web.requests) > 5) == target.endswith("again")


def test_plain_http_only_where_the_operator_allows_it(make: Make) -> None:
    with web_server(secure=False) as plain:
        put(plain, "/sql")
        url = plain.url("/sql")
        with refused("forbidden", "is not https"):
            get(make(reach=Reach(("10.0.0.0/8",))), url)
        assert plain.requests == []
        assert content(get(make(), url)) == (CONFIG, WEIGHTS)


# ---- many ------------------------------------------------------------------------------------------------------------


def test_a_hundred_who_ask_for_one_have_it_fetched_once(make: Make, web: WebServer) -> None:
    gate = web.pages[WEIGHTS_PATH].gate = threading.Event()
    downloads = make()
    asked = [downloads.fetch(parse_source(web.url("/sql"))) for _ in range(100)]
    for each in asked[:50]:
        each.cancel()
    gate.set()
    folders = {each.result(LIMIT) for each in asked[50:]}
    assert len(folders) == 1
    assert web.count(WEIGHTS_PATH) == 1


def test_hosts_that_hang_keep_nobody_waiting(
    make: Make, web: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with web_server(secure=False) as slow:
        put(slow, "/x")
        slow.pages["/x/adapter_config.json"].gate = gate = threading.Event()
        downloads = make(reach=Reach(("localhost", "127.0.0.1")), max_seconds=60, stall_seconds=60)
        stuck = [downloads.fetch(parse_source(slow.url(f"/x?{i}", "127.0.0.1"))) for i in range(40)]
        assert content(get(downloads, web.url("/sql"))) == (CONFIG, WEIGHTS)
        threads = [thread for thread in threading.enumerate() if thread.name == "adapter-download"]
        assert len(threads) == downloads_module.PER_HOST
        assert not any(each.done() for each in stuck)
        gate.set()
        assert len(wait(stuck, LIMIT).done) == 40


def test_too_many_that_wait_are_refused(make: Make, web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads_module, "MAX_QUEUED", 3)
    gate = web.pages["/sql/adapter_config.json"].gate = threading.Event()
    downloads = make()
    asked = [downloads.fetch(parse_source(web.url(f"/sql?{i}"))) for i in range(downloads_module.PER_HOST + 4)]
    with pytest.raises(AdapterUnavailable, match="3 downloads wait already"):
        asked[-1].result(LIMIT)
    downloads.close()
    with pytest.raises(AdapterUnavailable, match="shutting down"):
        asked[-2].result(LIMIT)
    gate.set()


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_the_longest_unused_goes_and_what_is_in_use_stays(make: Make, web: WebServer) -> None:
    used: set[str] = set()
    downloads = make(in_use=used, cache_bytes=2_500_000)
    folders = {}
    for name in "abc":
        put(web, f"/{name}", os.urandom(700_000))
        folders[name] = get(downloads, web.url(f"/{name}"))
        os.utime(folders[name], (ord(name), ord(name)))
        for file in folders[name].iterdir():
            os.utime(file, (ord(name), ord(name)))
        os.utime(folders[name].parent, (ord(name), ord(name)))
    downloads.locate(web.url("/a"))  # a use
    get(downloads, web.url("/sql"))
    assert [name for name in "abc" if folders[name].exists()] == ["a", "c"]
    used.update(web.url(f"/{name}") for name in ("a", "c", "sql"))
    with pytest.raises(AdapterUnavailable, match="--download-cache"):
        get(downloads, web.url("/b"))
    assert folders["a"].exists()
    used.clear()
    get(downloads, web.url("/b"))


def test_several_processes_share_a_folder(make: Make, web: WebServer) -> None:
    one, other = make(), make()
    gate = web.pages[WEIGHTS_PATH].gate = threading.Event()
    futures: list[Future[Path]] = [each.fetch(parse_source(web.url("/sql"))) for each in (one, other)]
    wait_for(lambda: web.count(WEIGHTS_PATH) > 0)
    time.sleep(0.05)  # for one that would not wait; nothing hangs on it
    gate.set()
    assert len({each.result(LIMIT) for each in futures}) == 1
    assert web.count(WEIGHTS_PATH) == 1


KILLED = """
import sys, ssl
from pathlib import Path
from loraplex.adapters.sources.addresses import Reach
from loraplex.adapters.sources.downloads import Downloads
from loraplex.adapters.sources.sources import parse_source
tls = ssl.create_default_context(cafile=sys.argv[3])
downloads = Downloads(Path(sys.argv[1]), reach=Reach(("localhost",)), tls=tls)
downloads.fetch(parse_source(sys.argv[2])).result()
"""


def test_kill_in_the_middle_leaves_nothing_that_is_served(make: Make, web: WebServer, tmp_path: Path) -> None:
    """And the next process goes on from there."""
    certificate = tmp_path / "ca.pem"
    web.authority.cert_pem.write_to_path(certificate)
    page = web.pages[WEIGHTS_PATH]
    page.drip = 0.0005
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "cache"), web.url("/sql"), str(certificate)]
    )
    try:
        partial = tmp_path / "cache" / "partial"
        wait_for(lambda: any(path.stat().st_size for path in partial.glob("*/*.safetensors")))
    finally:
        process.kill()
        process.wait()
    page.drip = None
    assert list((tmp_path / "cache" / "ready").rglob("*.safetensors")) == []
    (half,) = (tmp_path / "cache").glob("partial/*/*.safetensors")
    have = half.stat().st_size
    assert 0 < have < len(WEIGHTS)
    downloads = make()
    assert content(downloads.locate(web.url("/sql"))) == (CONFIG, WEIGHTS)
    assert web.requests[-1].headers["Range"] == f"bytes={have}-"
    assert leftovers(tmp_path / "cache") == []


def test_what_is_half_there_is_not_trusted(make: Make, web: WebServer, tmp_path: Path) -> None:
    """Of other bytes than the source's own, the size gives it away; with a checksum all does (test_hub)."""
    page = web.pages[WEIGHTS_PATH]
    page.cuts = [1000] + [0] * 10
    downloads = make()
    with pytest.raises(AdapterUnavailable):
        get(downloads, web.url("/sql"))
    page.cuts.clear()
    (half,) = (tmp_path / "cache").glob("partial/*/*.safetensors")
    half.write_bytes(half.read_bytes() + bytes(len(WEIGHTS)))  # longer than it can be
    assert content(get(downloads, web.url("/sql"))) == (CONFIG, WEIGHTS)


# ---- secrets ---------------------------------------------------------------------------------------------------------


def test_secrets_are_in_no_log_and_no_error(make: Make, web: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    downloads = make()
    secret = web.url("/sql").replace("https://", "https://ann:hunter2@") + "?sig=f00dcafe"
    source = parse_source(secret)
    folder = get(downloads, source)
    assert downloads.locate(source.text) == folder
    errors = []
    for path, page in {
        "/gone": Page(status=404),
        "/private": Page(status=403),
        "/broken": Page(status=500),
        "/away": Page(status=302, headers={"Location": "http://x/?sig=f00dcafe"}),
        "/off": Page(b"x" * 10, cuts=[1] * 20),
    }.items():
        web.pages[f"{path}/adapter_config.json"] = page
        with pytest.raises((AdapterNotFound, AdapterRefused, AdapterUnavailable)) as caught:
            get(downloads, secret.replace("/sql", path))
        errors.append(f"{caught.value} {caught.value!r} {caught.value.__context__!r}")
    stored = " ".join(str(path) for path in folder.parents[3].rglob("*"))
    told = caplog.text + " ".join(errors) + stored
    assert "hunter2" not in told
    assert "f00dcafe" not in told
    forgetful = make()
    with pytest.raises(AdapterNotFound, match="load it again"):
        forgetful.locate(parse_source(secret + "0").text)


def test_the_digest_of_a_key_tells_sources_apart() -> None:
    assert downloads_module.key_of("a") == hashlib.sha256(b"a").hexdigest()[:32] != downloads_module.key_of("b")


# ---- a folder that cannot take it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", ["os.open", "os.mkdir", "os.write", "os.fsync", "os.rename", "os.utime", "shutil.rmtree", "os.scandir"]
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_folder_that_fails_in_any_call(
    make: Make, web: WebServer, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """Whichever call it is: the server is at fault, says so, and has it once the folder is well again."""
    downloads = make()
    web.pages["/archive.tar"] = Page(tar(FILES))
    module = {"os": os, "shutil": shutil}[call.partition(".")[0]]
    name = call.partition(".")[2]
    real = getattr(module, name)

    def fail(*args: Any, **options: Any) -> Any:
        if threading.current_thread().name != "adapter-download":
            return real(*args, **options)
        raise OSError(code, os.strerror(code))

    for url in (web.url("/sql"), web.url("/archive.tar")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, fail)
            outcome = downloads.fetch(parse_source(url)).exception(LIMIT)
        assert outcome is None or isinstance(outcome, AdapterUnavailable)
        assert outcome is None or os.strerror(code) in str(outcome) or "no room" in str(outcome)
        assert content(get(downloads, url)) == (CONFIG, WEIGHTS)


def test_a_folder_that_is_another_users(web: WebServer) -> None:
    with reachable_folder() as place:
        (place / "cache").mkdir(mode=0o755)
        downloads = Downloads(place / "cache", reach=Reach(("localhost",)), tls=web.tls)
        with ordinary_user(), pytest.raises(AdapterUnavailable, match=r"Permission denied; --download-dir"):
            get(downloads, web.url("/sql"))
        assert content(get(downloads, web.url("/sql"))) == (CONFIG, WEIGHTS)
        downloads.close()


def test_a_disk_that_is_full(web: WebServer, tmp_path: Path) -> None:
    """The kernel's own word, from a process that may write 300,000 bytes to a file."""
    script = """
import resource, signal, ssl, sys
from pathlib import Path
from loraplex.adapters.sources.addresses import Reach
from loraplex.adapters.sources.downloads import Downloads
from loraplex.adapters.errors import AdapterUnavailable
from loraplex.adapters.sources.sources import parse_source
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
downloads = Downloads(Path(sys.argv[1]), reach=Reach(("localhost",)))
for url in sys.argv[2:]:
    try:
        downloads.fetch(parse_source(url)).result(60)
    except AdapterUnavailable as error:
        print(error)
"""
    with web_server(secure=False) as plain:
        put(plain, "/sql")
        plain.pages["/z.tar.gz"] = Page(
            gzip.compress(tar({"adapter_config.json": CONFIG, "adapter_model.safetensors": bytes(900_000)}))
        )
        urls = [plain.url("/sql"), plain.url("/z.tar.gz")]
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), *urls], capture_output=True, text=True, check=True
        )
    told = done.stdout.splitlines()
    assert len(told) == 2
    assert all("File too large" in line for line in told), told
