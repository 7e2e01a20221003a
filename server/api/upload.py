"""The body of a request that brings an adapter: from the connection to the spool, a MiB at a time.

What is decoded, hashed, parsed and written is done in threads of their own: a disk that hangs, or a megabyte of gzip,
would hold up every stream. Nothing of it is in memory but the piece that comes.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request

from loraplex.adapters.sources.remote import CONFIG_FILE, WEIGHTS_FILE
from loraplex.adapters.sources.spool import SpooledAdapter
from loraplex.server.api.content_digest import ContentDigest
from loraplex.server.api.encodings import BodyDecoder, too_large
from loraplex.server.api.errors import ApiError, ClientGone
from loraplex.server.api.multipart import MultipartReader

SAFETENSORS, MULTIPART = "application/vnd.safetensors", "multipart/form-data"

PARTS = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE}
"""The parts of a multipart body -> the files they become."""

PIECE = 1 << 20
"""Bytes handed to a thread at once: 10 MB take 10 turns of 0.1 ms at the event loop."""

PACKED_PIECE = 1024
"""Bytes of a compressed body that are unpacked at once: 1 MiB at most, as deflate packs 1,032 to 1."""


class Upload:
    """One body. `take` and `end` are for one thread at a time; what they raise ends it."""

    def __init__(self, headers: Headers, spooled: SpooledAdapter, most: int) -> None:
        """most: bytes of the adapter, decoded. Raises ApiError (400, 413, 415)."""
        kind = headers.get("content-type", "")
        self._parts = MultipartReader(kind, PARTS) if _media_type(kind) == MULTIPART else None
        self._digest = ContentDigest(", ".join(headers.getlist("content-digest")))
        self._decoder = BodyDecoder(headers.get("content-encoding", ""), most)
        self._is_packed = _is_packed(headers)
        self._spooled = spooled
        self._most = most
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise too_large(f"{declared} bytes", most, "of this adapter")

    def take(self, data: bytes) -> None:
        """Add what came. Raises ApiError (400, 413), NoRoom."""
        self._digest.take(data)
        if not self._is_packed:
            self._store(data)
            return
        for at in range(0, len(data), PACKED_PIECE):
            self._store(self._decoder.feed(data[at : at + PACKED_PIECE]))

    def end(self) -> str:
        """Return the source of the whole adapter. Raises ApiError (400), AdapterRefused, NoRoom."""
        self._decoder.end()
        if self._parts is not None:
            self._parts.end()
        self._digest.check()
        return self._spooled.finish()

    def _store(self, data: bytes) -> None:
        if self._spooled.size + len(data) > self._most:
            raise too_large(f"more than {self._most} bytes", self._most, "of this adapter")
        if self._parts is None:
            self._spooled.write(WEIGHTS_FILE, data)
            return
        for part, content in self._parts.feed(data):
            self._spooled.write(PARTS[part], content)


async def receive(request: Request, spooled: SpooledAdapter, most: int, threads: Executor) -> str:
    """Write the body to `spooled` as it comes, and return its source.

    most: bytes, decoded. Raises ApiError (400, 413, 415), AdapterRefused, NoRoom, ClientGone; `spooled` is the
    caller's to discard then.
    """
    if _media_type(request.headers.get("content-type", "")) not in (SAFETENSORS, MULTIPART):
        raise ApiError(
            415,
            f"Content-Type is {request.headers.get('content-type', '')[:100]!r}; expected {SAFETENSORS} with the "
            f"config in its metadata, or {MULTIPART} with the parts {' and '.join(PARTS)}",
            code="unsupported_media_type",
        )
    upload, loop = Upload(request.headers, spooled, most), asyncio.get_running_loop()
    held = bytearray()
    writing: asyncio.Future[None] | None = None  # the piece before, while this one comes
    try:
        async for chunk in request.stream():
            held += chunk
            if len(held) >= PIECE:
                if writing is not None:
                    await writing
                writing = loop.run_in_executor(threads, upload.take, bytes(held))
                writing.add_done_callback(_seen)
                held.clear()
        if writing is not None:
            await writing
    except ClientDisconnect:
        raise ClientGone from None

    def end() -> str:
        upload.take(bytes(held))
        return upload.end()

    return await loop.run_in_executor(threads, end)


def _seen(writing: asyncio.Future[None]) -> None:
    """Who has left is told nothing of what became of it."""
    if not writing.cancelled():
        writing.exception()


def _media_type(header: str) -> str:
    return header.partition(";")[0].strip().lower()


def _is_packed(headers: Headers) -> bool:
    return headers.get("content-encoding", "").strip().lower() not in ("", "identity")
