"""A multipart/form-data body (RFC 7578) read while it comes: a part's bytes go on at once and are never held whole."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from loraplex.server.api.errors import ApiError

MAX_PART_HEAD = 8192
"""Bytes of a part's fields, and of what stands before the first part."""

_BOUNDARY = re.compile(r"""boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))""", re.IGNORECASE)
_NAME = re.compile(r"""(?:^|;)\s*name=(?:"([^"]*)"|([^\s;"]*))""", re.IGNORECASE)


class MultipartReader:
    """One body: `feed` every piece, then `end`."""

    def __init__(self, content_type: str, parts: Collection[str]) -> None:
        """parts: the names that may come, each once. Raises ApiError (400) without a boundary."""
        found = _BOUNDARY.search(content_type)
        if found is None:
            raise _wrong("Content-Type has no boundary")
        self._delimiter = b"\r\n--" + (found[1] or found[2]).encode("latin-1", "replace")
        self._allowed = parts
        self._held = bytearray(b"\r\n")  # the first delimiter has no line before it
        self._seen: set[str] = set()
        self._part: str | None = None  # whose bytes come
        self._in_head = self._is_over = False

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """Yield (part, bytes of it) of what `data` adds. Raises ApiError (400)."""
        self._held += data
        while not self._is_over:
            if self._in_head:
                if not self._read_head():
                    return
                continue
            at = self._held.find(self._delimiter)
            known = at if at >= 0 else max(0, len(self._held) - len(self._delimiter) + 1)
            if self._part is None:
                if known > MAX_PART_HEAD:
                    raise _wrong(f"there is no part within {MAX_PART_HEAD} bytes")
            elif known:
                yield self._part, bytes(self._held[:known])
                del self._held[:known]
                at -= known
            if at < 0:
                return
            del self._held[: at + len(self._delimiter)]
            self._in_head, self._part = True, None
        self._held.clear()

    def end(self) -> None:
        """Raise ApiError (400) unless the last delimiter came."""
        if not self._is_over:
            raise ApiError(400, "the multipart body ends before its last boundary", code="incomplete_upload")

    def _read_head(self) -> bool:
        """Take what stands behind a delimiter. False: more has to come."""
        if self._held.startswith(b"--"):
            self._is_over = True
            return True
        end = self._held.find(b"\r\n\r\n")
        if end < 0 or end > MAX_PART_HEAD:
            if len(self._held) > MAX_PART_HEAD:
                raise _wrong(f"a part's fields have more than {MAX_PART_HEAD} bytes")
            return False
        self._part = self._name(bytes(self._held[:end]))
        del self._held[: end + 4]
        self._in_head = False
        return True

    def _name(self, head: bytes) -> str:
        """Return the part's name. Raises ApiError."""
        lines = head.decode("latin-1").split("\r\n")
        given = [line.partition(":")[2] for line in lines if line.lower().startswith("content-disposition:")]
        found = _NAME.search(given[0]) if len(given) == 1 else None
        name = (found[1] or found[2] or "") if found is not None else ""
        if name not in self._allowed:
            expected = " and ".join(repr(each) for each in self._allowed)
            raise ApiError(
                400, f"a part is called {name[:100]!r}; expected {expected}", param=name[:100], code="unknown_part"
            )
        if name in self._seen:
            raise ApiError(400, f"the part {name!r} is there twice", param=name, code="duplicate_part")
        self._seen.add(name)
        return name


def _wrong(why: str) -> ApiError:
    return ApiError(400, f"the body is not multipart/form-data: {why}", code="invalid_multipart")
