"""Server-sent events: a response whose status waits for the first event and which ends when its reader is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraplex.server.api.errors import ApiError, ClientGone, logged

T = TypeVar("T")

DONE = "[DONE]"

HEAD_SECONDS = 1.0
"""That the status waits for what may fail, from an adapter's files to the first token."""

COMMENT = b": keep-alive\n\n"
"""Nothing to who reads events (the specification's own means against silence)."""


class SseResponse(Response):
    """Sends each string of `events`, JSON, as one event, then [DONE] unless `done` is False.

    `named`: the dialect of /v1/responses, where each event is named after the type it holds.

    The status waits for the first event, but no longer than HEAD_SECONDS, so what fails until then is an ordinary error
    answer with its status. What fails later is an event {"error": ...}, since the status is out. Then a comment goes
    out every `keep_alive` seconds (0: never): who stands between cuts connections that are silent for a minute.
    `events` is closed in any case, at once when the client disconnects: its `finally` blocks are where work is given
    up.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        headers: dict[str, str] | None = None,
        *,
        done: bool = True,
        named: bool = False,
        keep_alive: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]  # of the empty body that Response counted
        self._events = events
        self._done = done
        self._named = named
        self._keep_alive = keep_alive
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises what the first event raises while the status is not out."""
        with suppress(ClientGone):
            await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        silence = asyncio.create_task(self._break_silence(send))
        try:
            try:
                async for event in self._events:
                    await self._start(send)
                    await self._send_event(send, event)
            except Exception as error:
                if not self._is_started:
                    raise
                await self._send_event(send, json.dumps(self._failure(logged(error, "a stream"))))
            await self._start(send)
            silence.cancel()
            end = encode_event(DONE) if self._done else b""
            await send({"type": "http.response.body", "body": end, "more_body": False})
        finally:
            silence.cancel()
            await self._events.aclose()

    def _failure(self, error: ApiError) -> dict[str, Any]:
        """The event of it; OpenAI's ResponseErrorEvent where events are named."""
        if not self._named:
            return {"error": error.fields()}
        return {
            "type": "error",
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "sequence_number": 0,
        }

    async def _start(self, send: Send) -> None:
        if not self._is_started:
            self._is_started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _break_silence(self, send: Send) -> None:
        """The head after HEAD_SECONDS, then a comment now and again, whether or not events go out between."""
        await asyncio.sleep(HEAD_SECONDS)
        await self._start(send)
        await send({"type": "http.response.body", "body": COMMENT, "more_body": True})
        while self._keep_alive > 0:
            await asyncio.sleep(self._keep_alive)
            await send({"type": "http.response.body", "body": COMMENT, "more_body": True})

    async def _send_event(self, send: Send, data: str) -> None:
        name = "" if not self._named else f"event: {json.loads(data)['type']}\n"
        await send({"type": "http.response.body", "body": name.encode() + encode_event(data), "more_body": True})


LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""Line ends to str.splitlines(), and so to iter_lines() of httpx and requests, but not to JSON, whose strings may hold
them: there they are escaped."""


def encode_event(data: str) -> bytes:
    """An event without a name, of JSON on one line."""
    for end, escaped in LINE_ENDS.items():
        if end in data:
            data = data.replace(end, escaped)
    return f"data: {data}\n\n".encode()


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; cancel it, wait for its end and raise ClientGone when the client disconnects first.

    The body must have been read: what is received from here on can only be the disconnect.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def answer_or_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """`until_disconnect` for a handler whose answer is sent in one piece."""
    return await until_disconnect(request.receive, work)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
