"""How much one connection may bring before anybody looks at it, and how long that may take (protocol.py)."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.server.config import HttpConfig, RequestLimits

MAX_TARGET = 8192
"""Bytes of a request's target, as Apache and nginx have it."""

HEAD_SECONDS = 10.0
"""From the first byte of a head, or the connection, to the head's end."""

BODY_SECONDS, BODY_RATE = 10.0, 500
"""A body brings so many bytes a second, looked at after each of these times. Apache's bound."""

READ_SECONDS, READ_RATE = 60.0, 500
"""The same for what is sent: the kernel ends who reads nothing for so long (listening.py), not who reads a byte."""

FREE_PIPELINED, MAX_PIPELINED = 4, 32
"""Requests that wait behind the one that is answered; the first few may have heads as large as any, all together one of
SMALL_HEAD. 256 KiB that come at once hold 14,000 requests, each 10 us and 2 KB."""

SMALL_HEAD = 8192
"""Bytes of a head that every connection may send; see connections.MAX_LARGE for the others."""

FREE_PIECES, PIECE_BYTES = 4096, 64
"""Chunks of a body, and the mean size of those beyond: each is a call of Python's, 256 KiB of single bytes 40 ms."""

PROBES = frozenset({"/health", "/ready", "/ping", "/startup"})
"""What is answered before all else: asked for by who would end a server that is slow to answer."""

LINGER_SECONDS, LINGER_BYTES = 2.0, 1 << 20
"""What still comes after the last answer is dropped for so long: closing at once would take the answer with it."""


@dataclass(frozen=True)
class Bounds:
    """What one request may be before it reaches the application."""

    head_bytes: int = HttpConfig.head_bytes
    header_count: int = HttpConfig.header_count
    body_bytes: int = RequestLimits.max_body_bytes
