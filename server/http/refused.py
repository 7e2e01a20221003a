"""A request that is refused before it is one: there is no route yet that could say so in its own words."""

from __future__ import annotations

from collections.abc import Iterable

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from loraplex.server.api.errors import INVALID, SERVER, ApiError, error_response

_CODES = {
    400: "invalid_http",
    408: "timeout",
    413: "request_too_large",
    414: "target_too_long",
    429: "overloaded",
    431: "head_too_large",
    503: "overloaded",
}


class Refused(Exception):
    """Raised through the parser, which stops there."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self._status, self._reason = status, reason

    def answer(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The whole answer, in OpenAI's shape, with which the connection ends; `headers` are those of every answer."""
        kind = SERVER if self._status >= 500 else INVALID
        found = error_response(ApiError(self._status, self._reason, type=kind, code=_CODES[self._status]))
        fields = [*headers, *found.raw_headers, (b"connection", b"close")]
        head = b"".join(b"%s: %s\r\n" % field for field in fields)
        return b"%s%s\r\n%s" % (STATUS_LINE[self._status], head, found.body)
