"""uvicorn's HTTP/1.1 with bounds: how much may come before anybody looks at it, and how long it may take to come.

uvicorn's parser takes heads of any size and waits for ever. Here a head is refused by its bytes, its fields and its
target while it is read (431, 414), a body by its pieces, and whoever does not go on is told so (408) and closed, in
OpenAI's shape: what is refused here has no route yet.

Trailers are dropped: uvicorn would add them to the fields of a request that is being answered. Cookies, too: nobody
here reads them, and FastAPI would take them apart for every request.
"""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from loraplex.server.api.gate import Refusal
from loraplex.server.http.bounds import (
    BODY_RATE,
    BODY_SECONDS,
    FREE_PIPELINED,
    HEAD_SECONDS,
    LINGER_BYTES,
    LINGER_SECONDS,
    MAX_PIPELINED,
    PROBES,
    READ_RATE,
    READ_SECONDS,
    SMALL_HEAD,
    Bounds,
)
from loraplex.server.http.connections import Connections
from loraplex.server.http.refused import Refused, end_cycle, refused_by, written
from loraplex.server.http.request_meter import RequestMeter


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, bounds: Bounds, others: Connections, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self.due = self.read_due = math.inf
        self._unsent = 0  # bytes, when that was last looked at
        self._bounds, self._others = bounds, others
        self._deaf = False  # nothing that comes is read any more
        self._is_large = False  # it has sent a large head
        self._answered: RequestResponseCycle | None = None  # the request that is not queued behind another
        self._room = LINGER_BYTES
        self._next_request()

    def _next_request(self) -> None:
        self._meter = RequestMeter(self._bounds)
        self._in_head = self._in_body = False
        self._marked = 0  # of the body's bytes, when it was last looked at

    # ------------------------------------------------------------------------------------------------- the connection

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.due = self._others.now + HEAD_SECONDS
        if not self._others.admit(self):
            self._tell(Refused(503, "This server has as many connections as it may have; try again."))
            self._hear_no_more()
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._others.leave(self)
        self._deaf = True
        if self._is_large:
            self._others.give_back_large()
        self._unset_keepalive_if_required()  # uvicorn's, which would keep a connection that was reset for so long
        if self._answered is not None and not self._answered.response_complete:
            self._leave(self._answered)  # uvicorn tells the last request alone, which may wait behind this one
        super().connection_lost(exc)

    def give_way(self) -> None:
        self.transport.abort()

    def overdue(self, now: float) -> None:
        if self._deaf:
            self.transport.abort()
        elif self._in_body:
            waits_for_us = self.flow.read_paused or self.cycle.waiting_for_100_continue
            if not waits_for_us and self._meter.body - self._marked < BODY_SECONDS * BODY_RATE:
                self._refuse(Refused(408, f"The body came too slowly: expected {BODY_RATE} bytes a second."))
                return
            self.due, self._marked = now + BODY_SECONDS, self._meter.body
        elif self._is_answering():
            self.due = now + HEAD_SECONDS
        elif self._in_head:
            self._refuse(Refused(408, f"The head did not end within {HEAD_SECONDS:g} seconds."))
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.read_due = self._others.now + READ_SECONDS
        self._unsent = self.transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.read_due = math.inf

    def unread(self, now: float) -> None:
        unsent = self.transport.get_write_buffer_size()
        if self._unsent - unsent < READ_SECONDS * READ_RATE:
            self.transport.abort()
        self.read_due, self._unsent = now + READ_SECONDS, unsent

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self._room -= len(data)
            if self._room < 0:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        if self.due == math.inf:  # also what is no head, such as empty lines
            self.due = self._others.now + HEAD_SECONDS
        try:
            while data and not self._deaf:  # heads in pieces: what begins in one is counted from the next one on
                piece = data if self._in_body else data[:SMALL_HEAD]
                self._feed(piece)
                data = data[len(piece) :]
        except (Refused, httptools.HttpParserError) as error:
            self._refuse(refused_by(error))

    def _feed(self, data: bytes) -> None:
        if self._meter.raw:
            data = self._feed_raw(data)
        if not data or self._deaf:
            return
        before, self._began = self._meter.body, False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._feed(data[upgrade.args[0] :])
            return
        if self._began:  # nobody knows where in `data` that was
            return
        if self._in_head:
            self._meter.add_unfinished(len(data))
            self._claim_large()
        elif self._in_body:
            self._meter.add_framing(len(data) - (self._meter.body - before))

    def _feed_raw(self, data: bytes) -> bytes:
        """What is left of `data` behind the body."""
        meter = self._meter
        piece, rest = data[: meter.raw], data[meter.raw :]
        meter.raw -= len(piece)
        self.on_body(piece)
        if not meter.raw:
            self.on_message_complete()
        return rest

    # -------------------------------------------------------------------------------------------- the parser's reports

    def on_message_begin(self) -> None:
        self._next_request()
        self._in_head = self._began = True
        self.due = self._others.now + HEAD_SECONDS
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._meter.add_target(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._meter.add_field(name, value)
        self._claim_large()
        if not self._in_head:
            return
        if len(name) == 14 and name.lower() == b"content-length":
            self._meter.declared = int(value)
        elif len(name) == 6 and name.lower() == b"cookie":
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= FREE_PIPELINED and not self._may_queue():
            raise Refused(429, "Too many requests wait on this connection.")  # nobody is told: it just closes
        self._meter.check_parameters(self.url)
        if self.parser.should_upgrade() and any(name == b"transfer-encoding" for name, _ in self.headers):
            raise Refused(400, "A request to upgrade cannot have a chunked body here.")
        super().on_headers_complete()
        self._in_head, self._in_body = False, True
        self.due = self._others.now + BODY_SECONDS
        self._others.set_busy(self)
        if self._meter.declared > self._bounds.body_bytes:
            self._is_last(self.cycle)
        if self.parser.should_upgrade():  # there is nothing to upgrade to: the body is a body, which llhttp leaves out
            self._meter.raw = self._meter.declared

    def on_body(self, body: bytes) -> None:
        self._meter.add_piece(len(body))
        if self._meter.body > self._bounds.body_bytes:
            if self.cycle.response_complete:
                raise Refused(413, "The body is too large.")
            self._is_last(self.cycle)  # whoever reads it says so
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._meter.raw:
            return
        self._in_body = False
        # What came behind its answer has ended uvicorn's time for idle connections
        answered = self.cycle.response_complete
        self.due = self._others.now + self.timeout_keep_alive if answered else math.inf
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        begin = super()._start_asgi_task
        self._answered = cycle
        scope, refusal = cycle.scope, None
        if not self.flow.write_paused:  # a task would wait until the answers before have been read
            refusal = self._others.gate.refuse(scope["method"], scope["path"], list(scope["headers"]))
        if refusal is not None:
            self._others.refuse(partial(self._answer, cycle, refusal))
        elif scope["path"] in PROBES and not self._meter.declared:
            begin(cycle, app)
        else:  # unless nobody waits any more when its turn has come
            self._others.begin(lambda: None if cycle.disconnected else begin(cycle, app))

    def _answer(self, cycle: RequestResponseCycle, refusal: Refusal) -> None:
        """End `cycle` with an answer that no application gives."""
        if cycle.disconnected:
            return
        end_cycle(cycle, refusal, self.server_state.default_headers)
        self.on_response_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_answering():
            self._others.set_idle(self)
            if self._deaf and self._is_endless():
                self.flow.pause_reading()
        elif self._deaf:  # until the last answer, since what is dropped is counted
            self.flow.pause_reading()

    # ------------------------------------------------------------------------------------------------------ the end

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _claim_large(self) -> None:
        if self._meter.largest > SMALL_HEAD and not self._is_large:
            if not self._others.claim_large():
                raise Refused(503, f"Too many connections have heads of more than {SMALL_HEAD} bytes; try again.")
            self._is_large = True

    def _may_queue(self) -> bool:
        fields = [field for cycle, _ in self.pipeline for field in cycle.scope["headers"]]
        size = sum(len(name) + len(value) for name, value in fields)
        return len(self.pipeline) < MAX_PIPELINED and size + self._meter.head <= SMALL_HEAD

    def _refuse(self, refused: Refused) -> None:
        """Answer and end the connection. Where an answer is under way, that one is the last."""
        known: Any = self.scope if self._in_body else {}  # of a head that has not ended nothing is sure
        self._others.gate.note_early(refused.status, known.get("method", "-"), known.get("path", "-"))
        if self._in_body and self.pipeline:  # it has not begun, and will not
            self.pipeline.popleft()
            self._in_body = False
            self.cycle = self.pipeline[0][0] if self.pipeline else self._answered  # type: ignore[assignment]
        if not self._in_body and self._is_answering():
            self._is_last(self.cycle)
            self._hear_no_more()
            self.flow.pause_reading()
            return
        if not self._in_body or not self.cycle.response_started:
            self._tell(refused)
        if self._in_body:
            self._leave(self.cycle)
        self._close()

    def _leave(self, cycle: RequestResponseCycle) -> None:
        """Tell who answers it that nobody reads that."""
        cycle.disconnected = True
        cycle.message_event.set()

    def _tell(self, refused: Refused) -> None:
        self.transport.write(written(refused.answer(), self.server_state.default_headers))

    def _is_last(self, cycle: RequestResponseCycle) -> None:
        """The connection ends with this answer, though its client may not have ended."""
        cycle.keep_alive = False
        cycle.transport = SimpleNamespace(  # type: ignore[assignment]  # what uvicorn uses of one; closing is ours
            write=self.transport.write, close=self._close, is_closing=self.transport.is_closing
        )

    def _hear_no_more(self) -> None:
        self._deaf = True
        self.due = math.inf
        self._unset_keepalive_if_required()

    def _close(self) -> None:
        """Once all is sent. Drops for a while what still comes: an unread byte would reset the connection."""
        self._hear_no_more()
        if self.transport.is_closing():
            return
        self.due = self._others.now + LINGER_SECONDS
        self._others.set_idle(self)
        if self._is_endless():
            self.flow.pause_reading()
        else:
            self.flow.resume_reading()
        self.transport.write_eof()

    def _is_endless(self) -> bool:
        """Whether more comes of the body than would be dropped: reading 1 MiB of it takes 0.9 ms of the loop."""
        return self._meter.declared - self._meter.body > self._room
