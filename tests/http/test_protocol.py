"""What a connection may bring before anybody looks at it, given to the protocol in pieces; the clock is the test's."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from loraplex.server.api.gate import Gate
from loraplex.server.http.bounds import (
    BODY_RATE,
    BODY_SECONDS,
    FREE_PIPELINED,
    HEAD_SECONDS,
    LINGER_BYTES,
    LINGER_SECONDS,
    MAX_PIPELINED,
    MAX_TARGET,
    READ_RATE,
    READ_SECONDS,
    SMALL_HEAD,
    Bounds,
)
from loraplex.server.http.connections import REFUSALS, STARTS, Connections
from loraplex.server.http.protocol import BoundedProtocol
from loraplex.server.tenancy.access import Access
from loraplex.server.tenancy.tenants import owners_keyring
from tests.support.waiting import turns

BOUNDS = Bounds(head_bytes=65_536, header_count=256, body_bytes=1000)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        super().__init__()
        self.written = b""
        self.unsent = 0
        self.ended = self.closed = self.aborted = self.paused = False
        self._protocol = protocol

    def write(self, data: Any) -> None:
        assert not self.ended
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.aborted = True
        self.close()

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Served:
    """Connections to an application that notes what it is asked and answers with the length of the body."""

    def __init__(self, most: int = 100, refusals: Gate | None = None) -> None:
        self.scopes: list[Scope] = []
        self.bodies: list[bytes | None] = []  # None: the client left
        self.gate = asyncio.Event()
        self.gate.set()
        self.reads = True
        self.refusals = refusals or Gate()
        self.others = Connections(most, self.refusals)
        self.state = ServerState()
        self._config = uvicorn.Config(
            self._app, interface="asgi3", http="httptools", ws="none", log_config=None, access_log=False
        )

    def connect(self) -> tuple[BoundedProtocol, Transport]:
        protocol = BoundedProtocol(
            BOUNDS, self.others, config=self._config, server_state=self.state, app_state={}, _loop=None
        )
        transport = Transport(protocol)
        protocol.connection_made(transport)
        return protocol, transport

    async def send(self, data: bytes) -> tuple[BoundedProtocol, Transport]:
        """On a connection of its own, and all that can be done about it is done."""
        protocol, transport = self.connect()
        protocol.data_received(data)
        await turns()
        return protocol, transport

    def at(self, seconds: float) -> None:
        self.others.now = seconds
        self.others.sweep(self.state.connections)  # type: ignore[arg-type]

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await self.gate.wait()
        body: bytes | None = b""
        while self.reads and body is not None:
            message = await receive()
            body = None if message["type"] == "http.disconnect" else body + message["body"]
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        content = b"%d" % len(body or b"")
        head = [(b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": content})


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    served = Served()
    yield served
    for connection in list(served.state.connections):
        connection.transport.abort()
    await turns()


def statuses(transport: Transport) -> list[int]:
    return [int(part[:3]) for part in transport.written.split(b"HTTP/1.1 ")[1:]]


def head(*fields: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


TOO_MUCH = {
    "one more field": (head(*[b"a: b"] * 257), 431),
    "many short fields": (head(*[b"a:"] * 300_000), 431),
    "a byte more": (head(b"a: " + b"x" * 65_536), 431),
    "a long field that never ends": (b"GET / HTTP/1.1\r\na: " + b"x" * 400_000, 431),
    "a long name that never ends": (b"GET / HTTP/1.1\r\n" + b"x" * 400_000, 431),
    "a long target": (b"GET /" + b"x" * MAX_TARGET + b" HTTP/1.1\r\n\r\n", 414),
    "many parameters": (b"GET /?" + b"&a" * MAX_TARGET + b" HTTP/1.1\r\n\r\n", 414),
    "one more parameter": (b"GET /?" + b"&a" * 256 + b" HTTP/1.1\r\n\r\n", 414),
    "a long target that never ends": (b"GET /" + b"x" * 400_000, 414),
    "trailers": (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 300, 431),
    "a trailer that never ends": (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\na: " + b"x" * 400_000, 413),
    "a chunk extension": (POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 400_000, 413),
    "chunks of a byte": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 5000, 413),
    "chunks to upgrade with": (
        POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        400,
    ),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
}


@pytest.mark.parametrize("piece", [1 << 18, 50_000, 999])
@pytest.mark.parametrize("name", TOO_MUCH)
async def test_too_much(served: Served, name: str, piece: int) -> None:
    """Told once, whatever the pieces it comes in; nothing behind it is read, and nothing of it is served."""
    sent, status = TOO_MUCH[name]
    served.gate.clear()
    protocol, transport = served.connect()
    read = 0
    while read < len(sent) and not transport.ended:
        protocol.data_received(sent[read : read + piece])
        read += piece
    assert statuses(transport) == [status]
    assert b"connection: close\r\n" in transport.written
    fields = json.loads(transport.written.partition(b"\r\n\r\n")[2])["error"]
    assert fields["message"]
    assert set(fields) == {"message", "type", "param", "code"}
    assert transport.ended
    assert read <= 65_536 + 2 * piece + (1 << 18)
    protocol.data_received(GET)
    served.gate.set()
    await turns()
    assert statuses(transport) == [status]
    assert set(served.bodies) <= {None}
    served.at(LINGER_SECONDS)
    assert transport.aborted


async def test_as_much_as_may_be(served: Served) -> None:
    fields = [b"a: b"] * 255
    fields.append(b"c: " + b"x" * (65_536 - 255 * 6 - 5 - 1))
    protocol, transport = served.connect()
    protocol.data_received(head(*fields) + head(*fields))
    protocol.data_received(b"GET /" + b"x" * (MAX_TARGET - 1) + b" HTTP/1.1\r\n\r\n")
    await turns()
    assert statuses(transport) == [200, 200, 200]
    assert len(served.scopes[0]["headers"]) == 256


async def test_what_is_dropped_is_bounded(served: Served) -> None:
    protocol, transport = served.connect()
    protocol.data_received(b"GET /" + b"x" * MAX_TARGET)
    for _ in range(LINGER_BYTES >> 18):
        protocol.data_received(b"x" * (1 << 18))
    assert not transport.aborted
    protocol.data_received(b"x")
    assert transport.aborted


async def test_a_head_behind_an_answer_waits_for_it(served: Served) -> None:
    """The answer that is under way is not broken by what is wrong behind it."""
    served.gate.clear()
    _, transport = await served.send(GET + head(*[b"a:"] * 300))
    assert not transport.written
    assert transport.paused
    served.gate.set()
    await turns()
    assert statuses(transport) == [200]
    assert b"connection: close" in transport.written
    assert transport.ended


async def test_a_body_behind_an_answer_waits_for_it(served: Served) -> None:
    served.gate.clear()
    protocol, transport = await served.send(GET + POST + b"Content-Length: 900\r\n\r\nx")
    served.at(BODY_SECONDS)
    protocol.flow.resume_reading()  # as an application does that waits for its client to leave
    served.at(2 * BODY_SECONDS)
    served.at(3 * BODY_SECONDS)
    assert not transport.written
    served.gate.set()
    await turns()
    assert statuses(transport) == [200]
    assert transport.ended
    assert len(served.scopes) == 1


async def test_whoever_leaves_is_gone_for_the_request_before_the_last(served: Served) -> None:
    """uvicorn tells the last one alone: an answer before it was generated to its end."""
    left = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        assert (await receive())["type"] == "http.disconnect"
        left.set()

    served._config = uvicorn.Config(app, interface="asgi3", http="httptools", ws="none", log_config=None)
    _, transport = await served.send(GET + GET)
    assert not left.is_set()
    transport.abort()
    async with asyncio.timeout(30):
        await left.wait()


async def test_requests_that_wait_are_bounded(served: Served) -> None:
    served.gate.clear()
    protocol, transport = served.connect()
    protocol.data_received(GET * 5000)
    served.gate.set()
    await turns(2000)
    assert statuses(transport) == [200] * (MAX_PIPELINED + 1)
    assert transport.ended


async def test_large_requests_that_wait_are_few(served: Served) -> None:
    served.gate.clear()
    protocol, transport = served.connect()
    protocol.data_received(head(b"a: " + b"x" * (SMALL_HEAD // 3)) * 20)
    served.gate.set()
    await turns(2000)
    assert statuses(transport) == [200] * (FREE_PIPELINED + 1)
    assert transport.ended


async def test_connections_with_large_heads_are_few(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 with 64 KiB each would be 256 MiB. Whoever has sent one has it counted until the connection ends."""
    monkeypatch.setattr("loraplex.server.http.connections.MAX_LARGE", 2)
    large = head(b"a: " + b"x" * SMALL_HEAD)
    whole, part, refused, small = (served.connect() for _ in range(4))
    whole[0].data_received(large)
    part[0].data_received(large[:-4] + b"x" * 2 * SMALL_HEAD)
    refused[0].data_received(large)
    small[0].data_received(GET)
    await turns()
    assert [statuses(transport) for _, transport in (whole, part, refused, small)] == [[200], [], [503], [200]]
    part[1].abort()
    await turns()
    whole[0].data_received(large)
    small[0].data_received(large)
    await turns()
    assert [statuses(transport) for _, transport in (whole, small)] == [[200, 200], [200, 200]]


async def test_cookies_and_trailers_are_nobodys(served: Served) -> None:
    served.gate.clear()
    protocol, transport = served.connect()
    protocol.data_received(
        POST + b"Cookie: a=b\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Api-Key: k\r\n\r\n"
    )
    served.gate.set()
    await turns()
    assert statuses(transport) == [200]
    assert [name for name, _ in served.scopes[0]["headers"]] == [b"host", b"transfer-encoding"]


@pytest.mark.parametrize("protocol_name", [b"h2c", b"websocket"])
@pytest.mark.parametrize("piece", [1, 7, 1000])
async def test_a_body_to_upgrade_with_is_a_body(served: Served, protocol_name: bytes, piece: int) -> None:
    """Java's client sends its first request so. Read as the next request, a body would pass whoever stands before."""
    body = b"GET /inner HTTP/1.1\r\n\r\n"
    sent = POST + b"Connection: Upgrade\r\nUpgrade: %s\r\nContent-Length: %d\r\n\r\n" % (protocol_name, len(body))
    protocol, _ = served.connect()
    for start in range(0, len(sent + body + GET), piece):
        protocol.data_received((sent + body + GET)[start : start + piece])
    await turns()
    assert served.bodies == [body, b""]
    assert [scope["path"] for scope in served.scopes] == ["/", "/"]
    assert [scope["type"] for scope in served.scopes] == ["http", "http"]


async def test_a_declared_body_beyond_the_limit_ends_the_connection(served: Served) -> None:
    served.reads = False  # as a handler that refuses it by its length
    protocol, transport = await served.send(POST + b"Content-Length: 1001\r\n\r\nabc")
    assert statuses(transport) == [200]
    assert b"connection: close" in transport.written
    assert transport.ended
    assert not transport.closed  # until what is sent meanwhile is dropped
    protocol.data_received(b"x" * 998 + GET)
    await turns()
    assert len(served.scopes) == 1
    served.at(LINGER_SECONDS)
    assert transport.aborted


@pytest.mark.parametrize(("more", "is_read"), [(LINGER_BYTES, True), (LINGER_BYTES + 1, False)])
async def test_what_would_not_be_dropped_to_its_end_is_not_read(served: Served, more: int, is_read: bool) -> None:
    served.reads = False
    _, transport = await served.send(POST + b"Content-Length: %d\r\n\r\nabc" % (3 + more))
    assert statuses(transport) == [200]
    assert transport.ended
    assert transport.paused is not is_read
    served.at(LINGER_SECONDS)
    assert transport.aborted


async def test_a_body_goes_on_behind_its_answer_within_the_limit(served: Served) -> None:
    served.reads = False
    protocol, transport = await served.send(POST + b"Content-Length: 1000\r\n\r\nabc")
    protocol.data_received(b"x" * 997 + GET)
    await turns()
    assert statuses(transport) == [200, 200]
    protocol.data_received(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
    await turns()
    protocol.data_received(b"3e8\r\n" + b"x" * 1000)
    assert statuses(transport) == [200, 200, 200]
    assert transport.ended


async def test_a_head_has_a_deadline(served: Served) -> None:
    silent, slow, empty, idle = (served.connect() for _ in range(4))
    idle[0].data_received(GET)
    slow[0].data_received(GET)
    await turns()
    served.at(HEAD_SECONDS - 1)
    slow[0].data_received(b"GET / HTTP/1.1\r\n")
    empty[0].data_received(b"\r\n")
    assert not any(transport.closed for _, transport in (silent, slow, empty, idle))
    served.at(HEAD_SECONDS)
    assert silent[1].closed
    assert empty[1].closed
    assert not silent[1].written
    for second in range(1, 10):
        served.at(HEAD_SECONDS - 1 + second)
        slow[0].data_received(b"a: b\r\n")
    assert not slow[1].ended
    served.at(2 * HEAD_SECONDS - 1)
    assert statuses(slow[1]) == [200, 408]
    assert slow[1].ended
    assert not idle[1].closed


async def test_a_body_has_to_come_on(served: Served) -> None:
    _, transport = await served.send(POST + b"Content-Length: 1000\r\n\r\n")
    served.at(BODY_SECONDS)
    assert statuses(transport) == [408]
    await turns()
    assert served.bodies == [None]


async def test_a_body_may_come_slowly(served: Served) -> None:
    protocol, transport = served.connect()
    protocol._bounds = Bounds(body_bytes=1 << 20)
    size = 3 * int(BODY_SECONDS) * BODY_RATE
    protocol.data_received(POST + b"Content-Length: %d\r\n\r\n" % size)
    for second in range(0, 3 * int(BODY_SECONDS)):
        served.at(second)
        protocol.data_received(b"x" * BODY_RATE)
        await turns(3)
    await turns()
    assert statuses(transport) == [200]
    assert served.bodies == [b"x" * size]


async def test_who_waits_for_the_server_has_no_deadline(served: Served) -> None:
    """An answer that takes long; a body that the server does not read yet; one that waits to be asked for."""
    served.gate.clear()
    answering, full, asking = (served.connect() for _ in range(3))
    answering[0].data_received(GET + b"\r\n")
    full[0].data_received(POST + b"Content-Length: 900000\r\n\r\n" + b"x" * 70_000)
    asking[0].data_received(POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    for minute in range(5):
        served.at(60.0 * minute)
        await turns(3)
    assert not any(t.written or t.closed or t.ended for _, t in (answering, full, asking))


async def test_the_longest_idle_makes_room(served: Served) -> None:
    served.others = Connections(3, served.refusals)
    served.gate.clear()
    working, older, newer = (served.connect() for _ in range(3))
    working[0].data_received(GET)
    older[0].data_received(b"GET / HT")  # a part of a head is no work
    fourth = served.connect()
    await turns()
    assert (working[1].closed, older[1].closed, newer[1].closed, fourth[1].closed) == (False, True, False, False)
    for protocol, _ in (newer, fourth):
        protocol.data_received(GET)
    await turns()
    fifth = served.connect()
    assert statuses(fifth[1]) == [503]
    assert fifth[1].closed
    assert (served.refusals.connections, served.refusals.refused_connections) == (4, 1)
    served.gate.set()
    await turns()
    assert all(statuses(transport) == [200] for _, transport in (working, newer, fourth))
    assert len(served.state.connections) == served.refusals.connections == 3
    sixth = served.connect()
    await turns()
    assert not sixth[1].written
    assert working[1].aborted


async def test_a_reset_leaves_nothing_behind(served: Served) -> None:
    """uvicorn's timer for idle connections would hold one that was reset for --keep-alive's ten minutes."""
    protocol, _ = await served.send(GET)
    timer = protocol.timeout_keep_alive_task
    assert timer is not None
    protocol.connection_lost(ConnectionResetError())
    assert timer.cancelled()
    assert not served.state.connections


async def test_many_at_once_leave_turns_to_others(served: Served) -> None:
    """However many requests come together, a few begin in a turn of the loop; a probe begins before all of them."""
    turn, began = 0, []

    async def count() -> None:
        nonlocal turn
        while len(began) < 101:
            turn += 1
            await asyncio.sleep(0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        began.append((turn, scope["path"]))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    served.others = Connections(200, served.refusals)
    served._config = uvicorn.Config(app, interface="asgi3", http="httptools", ws="none", log_config=None)
    counting = asyncio.create_task(count())
    left, _ = served.connect()
    connected = [served.connect() for _ in range(100)]
    for protocol, _ in connected:
        protocol.data_received(GET)
    left.data_received(GET)
    left.connection_lost(None)
    probe, _ = served.connect()
    probe.data_received(b"GET /health HTTP/1.1\r\n\r\n")
    async with asyncio.timeout(30):
        await counting
    assert [path for _, path in began].index("/health") <= STARTS
    assert len(began) == 101  # and not who had left
    assert max(Counter(turn for turn, _ in began).values()) <= STARTS + 1
    assert all(statuses(transport) == [204] for _, transport in connected)


async def test_an_answer_has_to_be_read(served: Served) -> None:
    """Whoever reads a byte now and then has all of it kept; who is slow may be."""
    slow, dripping, quick = (served.connect() for _ in range(3))
    least = int(READ_SECONDS * READ_RATE)
    for protocol, transport in (slow, dripping, quick):
        protocol.data_received(GET)
        await turns()
        transport.unsent = 10 * least
        protocol.pause_writing()
    quick[0].resume_writing()
    for minute in range(1, 10):
        slow[1].unsent -= least
        dripping[1].unsent -= 60
        served.at(READ_SECONDS * minute)
    await turns()
    assert (slow[1].aborted, dripping[1].aborted, quick[1].aborted) == (False, True, False)


# ---- without a key --------------------------------------------------------------------------------------------------


@pytest.fixture
async def closed() -> Served:
    """It has keys, of which none is brought."""
    return Served(refusals=Gate(Access(owners_keyring(["right"]))))


async def test_who_has_no_key_reaches_no_application(closed: Served) -> None:
    protocol, transport = closed.connect()
    for _ in range(3):
        protocol.data_received(GET.replace(b"GET /", b"GET /v1/models"))
        await turns()
    protocol.data_received(b"GET /v1/models HTTP/1.1\r\nx-api-key: right\r\n\r\n")
    await turns()
    assert statuses(transport) == [401, 401, 401, 200]
    assert [scope["path"] for scope in closed.scopes] == ["/v1/models"]
    assert not transport.closed
    assert protocol in closed.others._idle
    assert closed.state.total_requests == 4


@pytest.mark.parametrize("piece", [1 << 18, 7])
async def test_a_body_behind_a_refusal_is_dropped(closed: Served, piece: int) -> None:
    """As one behind any other answer: the connection goes on, and what the body holds is no request."""
    body = b"x" * 800
    sent = b"POST /v1/x HTTP/1.1\r\nContent-Length: 800\r\n\r\n" + body + GET.replace(b"GET /", b"GET /v1/models")
    protocol, transport = closed.connect()
    for start in range(0, len(sent), piece):
        protocol.data_received(sent[start : start + piece])
        await turns()
    assert statuses(transport) == [401, 401]
    assert closed.scopes == []
    assert protocol in closed.others._idle


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /v1/x HTTP/1.0\r\n\r\n",
        b"GET /v1/x HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"POST /v1/x HTTP/1.1\r\nContent-Length: 1001\r\n\r\n",
    ],
)
async def test_a_refusal_ends_a_connection_that_is_not_kept(closed: Served, request_head: bytes) -> None:
    _, transport = await closed.send(request_head)
    assert statuses(transport) == [401]
    assert transport.written.count(b"connection: close\r\n") == 1
    assert transport.closed or transport.ended


async def test_refusals_wait_for_a_reader(closed: Served) -> None:
    """Of who reads nothing, no more is kept than the answers to what came before the buffer was full."""
    protocol, transport = closed.connect()
    protocol.pause_writing()
    for _ in range(FREE_PIPELINED):
        protocol.data_received(GET.replace(b"GET /", b"GET /v1/models"))
        await turns()
    assert transport.written == b""
    assert transport.paused
    protocol.connection_lost(None)
    await turns()


async def test_refusals_leave_turns_and_come_behind_nobody(closed: Served) -> None:
    clients = [closed.connect() for _ in range(3 * REFUSALS)]
    for protocol, _ in clients:
        protocol.data_received(GET.replace(b"GET /", b"GET /v1/models"))
    protocol, transport = closed.connect()
    protocol.data_received(b"GET /v1/models HTTP/1.1\r\nx-api-key: right\r\n\r\n")
    left = clients[-1][0]
    left.connection_lost(None)
    answered = []
    for _ in range(4):
        await asyncio.sleep(0)
        answered.append(sum(bool(other.written) for _, other in clients))
    assert answered[0] == REFUSALS
    assert all(now - before <= REFUSALS for before, now in pairwise(answered))
    assert statuses(transport) == [200]
    await turns()
    assert sum(bool(other.written) for _, other in clients) == len(clients) - 1


async def test_refusals_of_one_connection_leave_turns_as_well(closed: Served) -> None:
    """One request begins where the one before it is refused, so that the queue is empty each time."""
    protocol, transport = closed.connect()
    protocol.data_received(GET.replace(b"GET /", b"GET /v1/models") * 3 * REFUSALS)
    answered = [0]
    while answered[-1] < 3 * REFUSALS:
        await asyncio.sleep(0)
        answered.append(len(statuses(transport)))
    assert all(now - before <= REFUSALS for before, now in pairwise(answered))


@pytest.mark.parametrize("key", [b"right", b"wrong"])
async def test_a_body_that_was_to_be_asked_for_is_not_waited_for_once_there_is_an_answer(
    closed: Served, key: bytes
) -> None:
    closed.reads = False
    protocol, transport = closed.connect()
    fields = b"Expect: 100-continue\r\nContent-Length: 800\r\nx-api-key: "
    protocol.data_received(b"POST /v1/x HTTP/1.1\r\n" + fields + key + b"\r\n\r\n")
    await turns()
    assert statuses(transport) == [200 if key == b"right" else 401]
    closed.at(BODY_SECONDS)
    assert transport.ended


@pytest.mark.parametrize("key", [b"right", b"wrong"])
async def test_a_connection_whose_body_came_behind_its_answer_is_closed_when_it_has_been_idle(
    closed: Served, key: bytes
) -> None:
    closed.reads = False
    protocol, transport = await closed.send(
        b"POST /v1/x HTTP/1.1\r\nContent-Length: 800\r\nx-api-key: " + key + b"\r\n\r\n"
    )
    assert len(statuses(transport)) == 1
    protocol.data_received(b"x" * 800)
    closed.at(protocol.timeout_keep_alive - 1)
    assert not transport.closed
    closed.at(protocol.timeout_keep_alive)
    assert transport.closed


async def test_a_connection_whose_body_came_behind_its_answer_goes_on(closed: Served) -> None:
    protocol, transport = await closed.send(b"POST /v1/x HTTP/1.1\r\nContent-Length: 800\r\n\r\n")
    closed.gate.clear()
    protocol.data_received(b"x" * 800 + b"GET /v1/x HTTP/1.1\r\nx-api-key: right\r\n\r\n")
    for seconds in range(0, int(3 * protocol.timeout_keep_alive), int(BODY_SECONDS)):
        closed.at(seconds)
    await turns()
    assert not transport.closed
    closed.gate.set()
    await turns()
    assert statuses(transport) == [401, 200]


async def test_what_is_refused_early_has_a_line_and_is_counted(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loraplex.access")
    for sent in (
        b"GET /secret/" + b"x" * MAX_TARGET,
        b"NO\r\n\r\n",
        POST.replace(b" /", b" /v1/x?key=secret") + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 5000,
    ):
        protocol, _ = served.connect()
        protocol.data_received(sent)
        await turns()
    told = [record.__dict__["fields"] for record in caplog.records]
    assert [(line["method"], line["path"], line["status"]) for line in told] == [
        ("-", "-", 414),
        ("-", "-", 400),
        ("POST", "/v1/x", 413),
    ]
    assert "secret" not in caplog.text
    assert {labels["status"]: value for labels, value in early(served) if value} == {"400": 1, "413": 1, "414": 1}


def early(served: Served) -> list[tuple[dict[str, str], float]]:
    [family] = [each for each in served.refusals.collect() if each.name == "loraplex:requests_refused_early"]
    return [(sample.labels, sample.value) for sample in family.samples]
