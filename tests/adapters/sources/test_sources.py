"""From what a caller writes to a source: kinds, names for the same thing, and nothing secret in what is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused
from loraplex.adapters.sources.sources import SourceAccess, find_folder, parse_source, redact, resolve
from tests.support.refusals import refused


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for text in (str(folder), f"file://{folder}"):
        source = parse_source(text)
        assert (source.text, source.is_remote) == (str(folder), False)
        assert resolve(text) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")  # a folder comes before a repository of the same name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize("text", ["acme/sql", "hf://acme/sql", "huggingface://acme/sql", "HF://acme/sql"])
def test_one_repository_has_one_name(text: str) -> None:
    source = parse_source(text)
    assert (source.text, source.kind, source.place, source.revision) == ("hf://acme/sql", "hub", "acme/sql", None)
    with pytest.raises(AdapterNotFound, match="no folder"):
        resolve(text)


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "0123456789abcdef0123456789abcdef01234567"])
def test_revisions(revision: str) -> None:
    source = parse_source(f"acme/sql@{revision}")
    assert (source.text, source.revision) == (f"hf://acme/sql@{revision}", revision)


@pytest.mark.parametrize(
    ("text", "kind", "place", "archive"),
    [
        ("s3://models/a/b", "s3", "models/a/b", False),
        ("s3://models/a/b/", "s3", "models/a/b", False),
        ("gs://models/a.tar.gz", "gs", "models/a.tar.gz", True),
        ("https://example.org/a/", "https", "https://example.org/a", False),
        ("https://example.org/a.TGZ?x=1", "https", "https://example.org/a.TGZ?x=1", True),
        ("acme/sql.tar", "hub", "acme/sql.tar", False),
    ],
)
def test_kinds(text: str, kind: str, place: str, archive: bool) -> None:
    source = parse_source(text)
    assert (source.kind, source.place, source.is_archive) == (kind, place, archive)


@pytest.mark.parametrize(
    "text",
    [
        "./nowhere",
        "/nowhere/at/all",
        "nowhere",
        "a/b/c",
        "../x/y",
        "",
        " ",
        "a\0b",
        "x" * 5000,
        "s3://bucket",
        "s3:///a",
        *("s3://bucket/../x", "https://", "https:///a", "https://a b/c", "https://h:0/x", "https://h/%2e%2e/x"),
        *(
            "https://[::1/x",
            "https://h:port/x",
            "hf://acme",
            "hf://acme/sql@",
            "hf://../x",
            "acme/sql@../../x",
            "gs://b/",
        ),
    ],
)
def test_what_is_no_source_is_not_found(text: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        find_folder(parse_source(text).text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("scheme", ["ftp", "gopher", "ssh", "data", "az"])
def test_other_schemes_are_refused_by_name(scheme: str) -> None:
    with refused("unsupported_kind", rf"{scheme}:// is not supported; give .*s3://"):
        parse_source(f"{scheme}://host/x")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterNotFound, match=r"is a file.*folder"):
        resolve(str(tmp_path / "adapter_model.safetensors"))


SECRETS = ["hunter2", "AKIA123", "f00dcafe", "hf_token"]
URL = "https://user:hunter2@example.org:8443/a/sql.tar?X-Amz-Credential=AKIA123&X-Amz-Signature=f00dcafe"


def test_secrets_are_never_shown() -> None:
    assert redact(URL) == "https://example.org:8443/a/sql.tar?..."
    sources = [
        parse_source(URL),
        parse_source("acme/sql", SourceAccess("hf_token")),
        parse_source("acme/sql", SourceAccess("x")),
    ]
    for source in sources:
        shown = f"{source.text} {source!r} {source}"
        assert not any(secret in shown for secret in SECRETS)
    assert sources[0].text.startswith("https://example.org:8443/a/sql.tar?...#")
    assert sources[0].place.endswith("f00dcafe")
    for text in (
        f"https://user:hunter2@/x?{URL}",
        "s3://user:hunter2@bucket/a?sig=f00dcafe",
        "ftp://u:hunter2@h/f00dcafe",
    ):
        with pytest.raises((AdapterNotFound, AdapterRefused)) as caught:
            parse_source(text)
        assert not any(secret in str(caught.value) for secret in SECRETS)


def test_what_differs_in_secrets_or_rights_is_another_source() -> None:
    accesses = [SourceAccess(), SourceAccess("a"), SourceAccess("b"), SourceAccess(ambient=False)]
    texts = [parse_source("acme/sql", access).text for access in accesses]
    texts += [parse_source(url).text for url in (URL, URL + "0", "https://example.org/a", "https://example.org/b")]
    texts += [parse_source("s3://b/a").text, parse_source("s3://b/a", SourceAccess(ambient=False)).text]
    assert len(set(texts)) == len(texts)
    assert [parse_source("acme/sql", access).text for access in accesses] == texts[:4]
    assert parse_source("s3://b/a", SourceAccess("a")).text == "s3://b/a", (
        "a bucket is told nothing of tokens for the Hub"
    )


@pytest.mark.parametrize(
    "text",
    [
        "s3://169.254.169.254/x",
        "gs://127.0.0.1/latest/meta-data",
        "s3://0xa9.254.169.254/x",
        "s3://0251.0376.0251.0376/x",
        "s3://127.1/x",
        "hf://169.254.169.254/x",
        "169.254.169.254/x@main",
    ],
)
def test_addresses_are_no_buckets_and_no_organisations(text: str) -> None:
    """Refused as they are read: nobody is asked anything about them."""
    with refused("forbidden", "has an address in place of a name"):
        parse_source(text)


@pytest.mark.parametrize("text", ["s3://123456789012/x", "s3://my.bucket.1/x", "s3://1.2.3.4.5/x", "1x.2/y", "v1.5/x"])
def test_names_with_numbers_in_them(text: str) -> None:
    assert parse_source(text).is_remote


@pytest.mark.parametrize(
    "text",
    ["x" * 300, "/" + "x" * 300, "~nosuch/x", "~nosuch", "file://~nosuch", "/proc/self/mem/x", "\ud800", "/\udcff"],
)
def test_what_no_file_system_takes_is_not_found(text: str) -> None:
    """Each of them was a failure of the server's: OSError, RuntimeError, UnicodeEncodeError."""
    with pytest.raises(AdapterNotFound) as caught:
        find_folder(parse_source(text).place)
    str(caught.value).encode()
