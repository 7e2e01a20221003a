"""Content-Digest as RFC 9530 has it."""

from __future__ import annotations

import pytest

from loraplex.server.api.content_digest import ContentDigest
from loraplex.server.api.errors import ApiError

HELLO = b'{"hello": "world"}'
RFC = {  # RFC 9530, appendices B.1 and D, of HELLO and of HELLO with a line feed
    "sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:": HELLO,
    "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:": HELLO + b"\n",
}


@pytest.mark.parametrize("header", RFC)
def test_the_examples_of_the_rfc(header: str) -> None:
    digest = ContentDigest(header)
    for at in range(0, len(RFC[header]), 5):
        digest.take(RFC[header][at : at + 5])
    digest.check()
    digest.take(b"more")
    with pytest.raises(ApiError) as caught:
        digest.check()
    assert (caught.value.status, caught.value.code) == (400, "digest_mismatch")


def test_nothing_is_promised() -> None:
    digest = ContentDigest("")
    digest.take(b"anything")
    digest.check()


def test_every_known_one_counts() -> None:
    digest = ContentDigest(f"md5=:AAAA:, {next(iter(RFC))}, sha-512=:{'A' * 86}==:")
    digest.take(HELLO)
    with pytest.raises(ApiError, match="sha-512"):
        digest.check()


@pytest.mark.parametrize(
    "header",
    [
        "sha-256=abc",
        "sha-256=:abc:",
        "sha-256=:YWJj:",
        "md5=:AAAA:",
        "nonsense",
        ", ".join(RFC),
    ],
)
def test_what_cannot_be_verified_is_refused(header: str) -> None:
    with pytest.raises(ApiError) as caught:
        ContentDigest(header)
    assert (caught.value.status, caught.value.code) == (400, "invalid_digest")
