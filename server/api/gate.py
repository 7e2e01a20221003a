"""Refuse a request where its connection is read: without a task, a middleware or a second write.

One server has one Gate. It answers who has no known key, which the HTTP server asks for every request, and keeps the
counts and the lines of whatever is refused before the application sees it (server/http). A refusal by the middlewares
took 230 us of a core on a kept connection, and a thousand of them a second doubled another client's p99.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from fastapi import FastAPI
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.server.api.auth import Dialect, dialect_of, given_keys, is_open, refusal, unauthorized
from loraplex.server.api.observe import HEADER
from loraplex.server.telemetry.logs import RefusalLines
from loraplex.server.telemetry.request_context import request_id
from loraplex.server.tenancy.access import Access

EARLY = (400, 408, 413, 414, 429, 431, 503)
"""The statuses of requests that the HTTP server refuses before they have come."""


Field = tuple[bytes, bytes]
"""The name and value of a header."""

_HEADER = HEADER.encode()
_PREFLIGHT = frozenset({b"origin", b"access-control-request-method"})
_ANSWER = "loraplex.answer"


@dataclass(frozen=True)
class Refusal:
    """One answer, complete."""

    status: int
    headers: list[Field]
    body: bytes


class Gate:
    """What a server refuses before its application, and how many are connected. Loop thread only."""

    def __init__(self, access: Access | None = None, cors: Callable[[ASGIApp], ASGIApp] | None = None) -> None:
        """access: the keys; None: every request passes.

        cors: makes the middleware that adds the headers by which web pages read a refusal; it waits for `send` alone.
        """
        self.connections = self.max_connections = 0  # both are the HTTP server's to write
        self.refused_connections = 0
        self._access = access
        self._cors = None if cors is None else cors(_begin_answer)
        self._early = Counter(dict.fromkeys(EARLY, 0))
        self._lines = RefusalLines()
        self._answers = {dialect: refusal(dialect, unauthorized()) for dialect in Dialect}

    def refuse(self, method: str, path: str, headers: Sequence[Field]) -> Refusal | None:
        """Return the answer to a request without a known key; None: the application answers it.

        headers: with names in small letters, as ASGI has them.
        """
        access = self._access
        if access is None or is_open(access, method, path) or self._is_preflight(method, headers):
            return None
        if not access.refuses(given_keys(headers)):
            return None
        id_ = request_id(next((value.decode("latin-1") for name, value in headers if name == _HEADER), None))
        self._lines.tell(method, path, 401, id_)
        answer = self._answers[dialect_of(path)]
        told = [*answer.raw_headers, (_HEADER, id_.encode())]
        if self._cors is not None:
            told = _with_cors(self._cors, method, headers, told)
        return Refusal(answer.status_code, told, b"" if method == "HEAD" else bytes(answer.body))

    def _is_preflight(self, method: str, headers: Sequence[Field]) -> bool:
        """Return whether a browser asks what pages may send, for which it has no key: the CORS middleware answers."""
        return self._cors is not None and method == "OPTIONS" and {name for name, _ in headers} >= _PREFLIGHT

    def note_early(self, status: int, method: str, path: str) -> None:
        """Count and log a request that the HTTP server has refused with `status`, one of EARLY, before it had come."""
        self._early[status] += 1
        self._lines.tell(method, path, status, "")

    def collector(self) -> Collector:
        """Return what tells the server's metrics of this gate."""
        return _GateCollector(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        yield GaugeMetricFamily("loraplex:connections", "Connections that are open.", self.connections)
        yield GaugeMetricFamily("loraplex:max_connections", "Connections that may be.", self.max_connections)
        yield CounterMetricFamily(
            "loraplex:connections_refused", "Connections beyond that, answered with 503.", self.refused_connections
        )
        early = CounterMetricFamily(
            "loraplex:requests_refused_early", "Requests refused before they had come.", labels=("status",)
        )
        for status, count in self._early.items():
            early.add_metric((str(status),), count)
        yield early


async def _begin_answer(scope: Scope, receive: Receive, send: Send) -> None:
    await send(scope[_ANSWER])


def _with_cors(cors: ASGIApp, method: str, asked: Sequence[Field], told: list[Field]) -> list[Field]:
    """Return the headers `told` as `cors` sends them: with those by which the page that asked may read the answer."""
    message: Message = {"type": "http.response.start", "headers": told}

    async def receive() -> Message:
        raise NotImplementedError

    async def sent(message: Message) -> None: ...

    adding = cors({"type": "http", "method": method, "headers": list(asked), _ANSWER: message}, receive, sent)
    with suppress(StopIteration):
        adding.__await__().send(None)
    return list(message["headers"])


class _GateCollector(Collector):
    """Collect the metrics of a Gate at scrape time."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        return self._gate.collect()


def gate_of(app: FastAPI) -> Gate:
    """Return the gate that create_app() made for `app`; one without keys for another application."""
    found = getattr(getattr(app, "state", None), "gate", None)
    return found if isinstance(found, Gate) else Gate()
