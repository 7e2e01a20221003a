"""The socket and the HTTP server on it: held early, so that a port in use is told at once, and opened late."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from loraplex.server.config import HttpConfig
from loraplex.server.drain import TOLD_SECONDS
from loraplex.server.startup import StartError

if TYPE_CHECKING:
    from fastapi import FastAPI


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
    app: FastAPI, on_listening: Callable[[int], None], keep_alive: float = HttpConfig.keep_alive
) -> ListeningServer:
    """A server for `serve(sockets=[bind(...)])`; `on_listening(port)` is called once it answers."""
    import uvicorn

    from loraplex.server.api.direct import offer_direct_body

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # they are handled here (drain.Shutdown)

        def close(self) -> None:
            self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_listening(self.servers[0].sockets[0].getsockname()[1])

    return Server(
        uvicorn.Config(
            offer_direct_body(app),
            http="httptools",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=math.ceil(
                keep_alive
            ),  # longer than clients keep theirs, or they send into a closing one
            timeout_graceful_shutdown=math.ceil(TOLD_SECONDS),  # by then all answers are written, if not all read
        )
    )
