"""The outermost middleware: every request gets an id, a line in the log and, where they are on, a trace; every answer
says which versions of which adapters wrote it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.server.api.errors import error_response, to_api_error
from loraplex.server.telemetry.logs import log_access
from loraplex.server.telemetry.request_context import RequestContext, in_request_context, request_id

if TYPE_CHECKING:
    from loraplex.server.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

HEADER = "x-request-id"

STICKY_HEADER = "x-loraplex-sticky"
"""Says whose requests an alias shall treat alike."""

MAX_STICKY = 256
"""Characters of it that count."""

WORN_HEADER = "x-loraplex-adapter"
"""Says which versions wrote an answer, also one with an error in it: "sql@3fa9c1d20b44", or the terms of a mix."""


class ObserveMiddleware:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None = None) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. What a handler raises before it has answered is answered here, where the id is known."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        context = RequestContext(request_id(headers.get(HEADER)), scope["method"], scope["path"], on_end=log_access)
        if headers.get(HEADER) != context.request_id:  # further in there is only the one it has
            others = [(name, value) for name, value in scope["headers"] if name != HEADER.encode()]
            scope = {**scope, "headers": [*others, (HEADER.encode(), context.request_id.encode())]}
        context.sticky = headers.get(STICKY_HEADER, "")[:MAX_STICKY]
        if self._tracing is not None:
            self._tracing.begin(context, headers)

        async def send_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                answered = MutableHeaders(scope=message)
                answered[HEADER] = context.request_id
                if worn := context.worn():
                    answered[WORN_HEADER] = worn
            await send(message)

        with in_request_context(context):
            try:
                await self._app(scope, receive, send_id)
            except Exception as error:
                if context.status:  # half an answer is out: the connection has to break
                    raise
                logger.exception("%s %s failed", context.method, context.path[:200])
                await error_response(to_api_error(error))(scope, receive, send_id)
