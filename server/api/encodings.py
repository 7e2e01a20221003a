"""A request's body out of its Content-Encoding (RFC 9110, 8.4), bounded by what it decodes to."""

from __future__ import annotations

import zlib
from typing import Protocol

from loraplex.server.api.errors import ApiError

DECODED = ("gzip", "deflate")
"""Of the encodings that HTTP names; "br" and "zstd" would need libraries, and no client sends them unasked."""


MAX_MEMBERS = 256
"""Of gzip, one after the other: bgzip's have 64 KiB each. An empty one (20 bytes) costs 5 us and a copy of the rest."""


class _Inflater(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = 0, /) -> bytes: ...


class BodyDecoder:
    """Of one body: `feed` every piece, then `end`."""

    def __init__(self, header: str, limit: int) -> None:
        """header: Content-Encoding's value. limit: bytes, decoded. Raises ApiError (415)."""
        names = [name for part in header.split(",") if (name := part.strip().lower()) not in ("", "identity")]
        for name in names:
            if name not in (*DECODED, "x-gzip"):
                raise ApiError(
                    415,
                    f"Content-Encoding {name[:40]!r} is not supported: expected {', '.join(DECODED)}, or none",
                    code="unsupported_encoding",
                )
        if len(names) > 1:
            raise ApiError(415, "Content-Encoding: a body encoded twice is not taken", code="unsupported_encoding")
        self._name = names[0] if names else None
        self._limit = limit
        self._inflater: _Inflater | None = None
        self._size = 0
        self._members = 0

    def feed(self, data: bytes) -> bytes:
        """What `data` adds. Raises ApiError (400, 413)."""
        if self._name is None:
            return data
        out = bytearray()
        while data:
            if self._inflater is None:
                self._inflater = self._open(data)
            try:  # a bomb is told by one byte too many, and never unpacked further
                out += self._inflater.decompress(data, self._limit + 1 - self._size - len(out))
            except zlib.error as error:
                raise self._wrong(str(error)) from None
            if self._size + len(out) > self._limit:
                raise too_large(f"more than {self._limit} bytes when decoded", self._limit)
            if not self._inflater.eof:
                break
            data = self._inflater.unused_data
            if self._name == "deflate":
                if data:
                    raise self._wrong("there is more behind its end")
            else:
                self._inflater = None  # several gzip members are one body
        self._size += len(out)
        return bytes(out)

    def end(self) -> None:
        """Raises ApiError (400) where something is missing."""
        if self._inflater is not None and not self._inflater.eof:
            raise self._wrong("it ends in the middle")

    def _open(self, data: bytes) -> _Inflater:
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise self._wrong(f"it has more than {MAX_MEMBERS} members")
        if self._name != "deflate":
            return zlib.decompressobj(16 + zlib.MAX_WBITS)
        # RFC 9110: zlib's format; some send the bare stream, and always have
        has_header = data[0] & 0x0F == 8 and (len(data) < 2 or (data[0] << 8 | data[1]) % 31 == 0)
        return zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)

    def _wrong(self, reason: str) -> ApiError:
        message = f"the body is not {self._name}, though Content-Encoding says so: {reason}"
        return ApiError(400, message, code="invalid_encoding")


def too_large(found: str, limit: int, where: str = "here (--max-body)") -> ApiError:
    """The answer to a body with `found` in it."""
    message = f"the body has {found}, at most {limit} are taken {where}; send it in several requests"
    return ApiError(413, message, code="request_too_large")
