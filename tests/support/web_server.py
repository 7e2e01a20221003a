"""A web server of the test's own, with a certificate of its own, that can be slow, break off, lie and redirect.

with web_server() as web:
    web.pages["/a/b"] = Page(b"...")
    web.url("/a/b"), web.tls, web.requests
"""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import trustme


@dataclass
class Page:
    """What a path answers."""

    body: bytes = b""
    status: int = 200
    etag: str | None = ""  # "": of the body; None: none
    length: bool = True  # whether it tells its length
    ranges: bool = True  # whether it can begin in the middle
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    gate: threading.Event | None = None  # the body waits for it
    drip: float | None = None  # seconds between the bytes of the body
    headers: dict[str, str] = field(default_factory=dict)
    allow: Callable[[dict[str, str]], bool] = lambda headers: True  # else it is 403
    heads: bool = True  # whether HEAD is allowed


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]


class WebServer:
    """Pages by path, without the query."""

    def __init__(self, secure: bool, host: str) -> None:
        self.pages: dict[str, Page] = {}
        self.requests: list[Asked] = []
        self.fallback: Callable[[Asked], Page | None] = lambda asked: None
        self._stopping = threading.Event()
        self._server = ThreadingHTTPServer((host, 0), self._handler())
        self._server.daemon_threads = True
        self._secure = secure
        self._host = host
        self.authority = trustme.CA()
        self.tls = ssl.create_default_context()
        self.authority.configure_trust(self.tls)
        if secure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.authority.issue_cert("localhost", "other.localhost", host).configure_cert(context)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def url(self, path: str, host: str = "localhost") -> str:
        return f"{'https' if self._secure else 'http'}://{host}:{self.port}{path}"

    def count(self, path: str, method: str = "GET") -> int:
        return sum(urlsplit(asked.path).path == path and asked.method == method for asked in self.requests)

    def stop(self) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web._answer(self)

            def do_HEAD(self) -> None:
                web._answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        return Handler

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = Asked(handler.command, handler.path, dict(handler.headers.items()))
        self.requests.append(asked)
        page = self.pages.get(urlsplit(handler.path).path) or self.fallback(asked) or Page(status=404)
        if not page.allow(asked.headers) or (handler.command == "HEAD" and not page.heads):
            page = Page(status=403)
        handler.close_connection = True
        body, start = page.body, 0
        etag = f'"{hashlib.md5(page.body).hexdigest()}"' if page.etag == "" else page.etag
        wanted = asked.headers.get("Range", "")
        fits = asked.headers.get("If-Range", etag) == etag
        if wanted and page.ranges and page.status == 200 and fits:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            handler.send_response(page.status)
        for name, value in page.headers.items():
            handler.send_header(name, value)
        if etag is not None and page.status == 200:
            handler.send_header("ETag", etag)
        if page.length:
            handler.send_header("Content-Length", str(len(body) - start))
        handler.send_header("Connection", "close")
        try:
            handler.end_headers()
            if handler.command == "GET":
                self._send(handler, page, body[start:])
        except OSError:  # the client has left
            pass

    def _send(self, handler: BaseHTTPRequestHandler, page: Page, body: bytes) -> None:
        while page.gate is not None and not page.gate.wait(0.05):
            if self._stopping.is_set():
                return
        if page.drip is not None:
            for byte in body:
                handler.wfile.write(bytes([byte]))
                if self._stopping.wait(page.drip):
                    return
            return
        handler.wfile.write(body[: page.cuts.pop(0)] if page.cuts else body)


@contextmanager
def web_server(*, secure: bool = True, host: str = "127.0.0.1") -> Iterator[WebServer]:
    server = WebServer(secure, host)
    try:
        yield server
    finally:
        server.stop()
