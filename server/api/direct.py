"""A streamed body's next part written in any callback of the event loop: no task is woken and no middleware asked.

An ASGI extension of our own (see the specification's "Extensions"), offered around the whole application where its
server is uvicorn; elsewhere there is none, and all parts go the ordinary way. Middlewares that read or change parts of
bodies would be passed by: there are none.
"""

from __future__ import annotations

from typing import Any, Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

EXTENSION = "loraplex.direct_body"


class _FlowControl(Protocol):
    write_paused: bool


class _Cycle(Protocol):
    """What is used of uvicorn's request and answer, of either of its HTTP/1.1 protocols."""

    flow: _FlowControl
    disconnected: bool
    response_started: bool
    response_complete: bool


class DirectBody:
    """The body of one answer. Loop thread only."""

    def __init__(self, cycle: _Cycle, send: Send) -> None:
        self._cycle = cycle
        self._send = send

    @property
    def is_ready(self) -> bool:
        """Whether the answer is under way and its reader keeps up: no more than uvicorn allows is waiting for it."""
        cycle = self._cycle
        begun = cycle.response_started and not cycle.response_complete
        return begun and not cycle.disconnected and not cycle.flow.write_paused

    def write(self, content: bytes) -> None:
        """Write more of the body. Raises RuntimeError unless it is_ready."""
        sending = self._send({"type": "http.response.body", "body": content, "more_body": True})
        try:
            sending.__await__().send(None)
        except StopIteration:
            return
        raise RuntimeError("the connection's reader does not keep up; ask is_ready before each write")


def offer_direct_body(app: ASGIApp) -> ASGIApp:
    """`app` with the extension in the scope of its requests, where its server can."""

    async def offering(scope: Scope, receive: Receive, send: Send) -> None:
        cycle: Any = getattr(send, "__self__", None)
        if scope["type"] == "http" and all(hasattr(cycle, name) for name in _Cycle.__annotations__):
            extensions = {**(scope.get("extensions") or {}), EXTENSION: DirectBody(cycle, send)}
            scope = {**scope, "extensions": extensions}
        await app(scope, receive, send)

    return offering


def direct_body(scope: Scope) -> DirectBody | None:
    """Of the request with this scope; None: its server has none."""
    found = (scope.get("extensions") or {}).get(EXTENSION)
    return found if isinstance(found, DirectBody) else None
