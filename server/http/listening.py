"""The socket and the HTTP server on it: held early, so that a port in use is told at once, and opened late."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from loraplex.server.config import HttpConfig, RequestLimits
from loraplex.server.drain import TOLD_SECONDS
from loraplex.server.http.connections import ACCEPTED_AT_ONCE, Connections, max_connections
from loraplex.server.http.occasional import Occasional
from loraplex.server.startup import StartError, descriptors

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that wait in the kernel to be accepted; it takes fewer where net.core.somaxconn says so."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the port but does not listen yet. Raises StartError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # "localhost" is both: clients that try one only try the older
        family, kind, proto, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        held = socket.socket(family, kind, proto)
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        notice_dead_peers(held)
        held.bind(address)
        return held
    except OSError as error:
        held.close()
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}; --port moves it") from error


def notice_dead_peers(held: socket.socket) -> None:
    """Have the kernel end connections whose peer is gone or does not read; those accepted on `held` inherit it.

    A peer that has vanished without a word is otherwise noticed after two hours, or never.
    """
    held.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 30),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 60_000),  # ms that what was sent may stay unacknowledged, or unsent for want of a reader
    ):
        if hasattr(socket, name):  # not all systems have all
            held.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class ListeningServer(Protocol):
    """What make_server returns: a uvicorn.Server."""

    async def serve(self, sockets: list[socket.socket]) -> None: ...

    def close(self) -> None:
        """Have serve() close the listener, let answers end that are being sent, and return. From any thread."""
        ...


def make_server(
    app: FastAPI,
    on_listening: Callable[[int], None],
    http: HttpConfig | None = None,
    max_body_bytes: int = RequestLimits.max_body_bytes,
) -> ListeningServer:
    """A server for `serve(sockets=[bind(...)])`; `on_listening(port)` is called once it answers."""
    import uvicorn

    from loraplex.server.api.direct import offer_direct_body
    from loraplex.server.api.gate import gate_of
    from loraplex.server.http.bounds import Bounds
    from loraplex.server.http.protocol import BoundedProtocol

    http = http or HttpConfig()
    connections = Connections(max_connections(http.max_connections, descriptors()), gate_of(app))
    bounds = Bounds(http.head_bytes, http.header_count, max_body_bytes)

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # they are handled here (drain.Shutdown)

        def close(self) -> None:
            self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(_tell_of_accepts(loop))
            connections.now = loop.time()
            await super().startup(sockets)
            for each in sockets or ():  # asyncio listens for as many as it accepts in a turn
                each.listen(BACKLOG)
            on_listening(self.servers[0].sockets[0].getsockname()[1])

        async def on_tick(self, counter: int) -> bool:
            connections.now = asyncio.get_running_loop().time()
            if counter % 10 == 0:
                connections.sweep(self.server_state.connections)  # type: ignore[arg-type]  # all are BoundedProtocols
            return await super().on_tick(counter)

    return Server(
        uvicorn.Config(
            offer_direct_body(app),
            http=partial(BoundedProtocol, bounds, connections),  # type: ignore[arg-type]  # uvicorn calls it and no more
            ws="none",
            backlog=ACCEPTED_AT_ONCE,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=math.ceil(
                http.keep_alive
            ),  # longer than clients keep theirs, or they send into a closing one
            timeout_graceful_shutdown=math.ceil(TOLD_SECONDS),  # by then all answers are written, if not all read
        )
    )


def _tell_of_accepts(loop: asyncio.AbstractEventLoop) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """An exception handler: asyncio has a traceback for each connection that finds no descriptor."""
    exhausted = Occasional(logger, "no descriptor was left for a new connection, %d times; see ulimit -n")

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" in context.get("message", ""):
            exhausted()
        else:
            loop.default_exception_handler(context)

    return handle
