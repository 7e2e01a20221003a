"""Multipart bodies in whatever pieces they come."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.api.errors import ApiError
from loraplex.server.api.multipart import MultipartReader
from tests.support.pushing import form

NAMES = ("config", "weights")


def read(content_type: str, body: bytes, piece: int) -> dict[str, bytes]:
    reader, found = MultipartReader(content_type, NAMES), defaultdict(bytes)
    for at in range(0, len(body), piece):
        for name, data in reader.feed(body[at : at + piece]):
            found[name] += data
    reader.end()
    return dict(found)


@given(
    config=st.binary(max_size=40),
    weights=st.binary(max_size=200) | st.sampled_from([b"\r\n--b0undar", b"\r\n--b0undarx--\r\n", b"\r\n\r\n--"]),
    piece=st.integers(1, 400),
)
def test_any_bytes_in_any_pieces(config: bytes, weights: bytes, piece: int) -> None:
    headers, body = form(("weights", weights), ("config", config), boundary="b0undary-of-the-test")
    found = read(headers["content-type"], body + b"an epilogue", piece)
    assert found.get("config", b"") == config
    assert found.get("weights", b"") == weights


def test_what_other_clients_write() -> None:
    fields = b"content-disposition: form-data; name=config\r\nContent-Type: application/json"
    body = b"before\r\n--x y\r\n" + fields + b"\r\n\r\n{}\r\n--x y--"
    assert read('Multipart/Form-Data; charset=x; BOUNDARY="x y"', body, 7) == {"config": b"{}"}


CASES = {
    "no boundary": ("multipart/form-data", b"", "invalid_multipart"),
    "nothing": ("multipart/form-data; boundary=x", b"", "incomplete_upload"),
    "no part": ("multipart/form-data; boundary=x", b"y" * 9000, "invalid_multipart"),
    "endless fields": ("multipart/form-data; boundary=x", b"--x\r\nA: " + b"y" * 9000, "invalid_multipart"),
    "no name": ("multipart/form-data; boundary=x", b"--x\r\nA: b\r\n\r\n", "unknown_part"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_none(case: str) -> None:
    kind, body, code = CASES[case]
    with pytest.raises(ApiError) as caught:
        read(kind, body, 512)
    assert (caught.value.status, caught.value.code) == (400, code)


@pytest.mark.parametrize(
    ("names", "end", "code"),
    [
        (("config", "config"), True, "duplicate_part"),
        (("config", "tokenizer"), True, "unknown_part"),
        (("config", "weights"), False, "incomplete_upload"),
    ],
)
def test_parts_that_cannot_be(names: tuple[str, ...], end: bool, code: str) -> None:
    headers, body = form(*((name, b"data") for name in names), end=end)
    with pytest.raises(ApiError) as caught:
        read(headers["content-type"], body, 64)
    assert caught.value.code == code
