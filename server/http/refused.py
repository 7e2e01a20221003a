"""A request that is refused before it is one: there is no route yet that could say so in its own words."""

from __future__ import annotations

from collections.abc import Iterable

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from loraplex.server.api.errors import INVALID, SERVER, ApiError, error_response
from loraplex.server.api.gate import Refusal

CLOSE = (b"connection", b"close")

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
        self.status, self._reason = status, reason

    def answer(self) -> Refusal:
        """Return the whole answer, in OpenAI's shape; the connection ends with it."""
        kind = SERVER if self.status >= 500 else INVALID
        found = error_response(ApiError(self.status, self._reason, type=kind, code=_CODES[self.status]))
        return Refusal(self.status, [*found.raw_headers, CLOSE], bytes(found.body))


def written(refusal: Refusal, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the bytes of an answer whose first fields are `headers`, those of every answer."""
    head = b"".join([b"%s: %s\r\n" % field for field in (*headers, *refusal.headers)])
    return b"%s%s\r\n%s" % (STATUS_LINE[refusal.status], head, refusal.body)


def refused_by(error: Exception) -> Refused:
    """Return why reading ended: httptools wraps what its callbacks raise, and all else is no HTTP."""
    for found in (error, error.__context__):
        if isinstance(found, Refused):
            return found
    return Refused(400, "Found no request of HTTP/1.1: expected a method, a target and fields.")


def end_cycle(cycle: RequestResponseCycle, refusal: Refusal, headers: list[tuple[bytes, bytes]]) -> None:
    """Write `refusal` as the answer to `cycle`, as its send() does of an application's; `headers`: of every answer."""
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    cycle.transport.write(written(refusal, headers if cycle.keep_alive else [*headers, CLOSE]))
    if not cycle.keep_alive:
        cycle.transport.close()
