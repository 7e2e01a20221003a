"""From the bytes of a request to a checked record. Every fault is a 400 (413 for the size) that names the field."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, Union
from weakref import WeakValueDictionary

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from loraplex.server.api.chat_schemas import ChatRequest
from loraplex.server.api.encodings import BodyDecoder, too_large
from loraplex.server.api.errors import ApiError, ClientGone, InvalidField
from loraplex.server.api.fields import check_unknown
from loraplex.server.api.limits import check_limits
from loraplex.server.api.openapi import inlined
from loraplex.server.api.schemas import GenerationFields, Incoming
from loraplex.server.api.structure import check_structure
from loraplex.server.config import RequestLimits
from loraplex.server.engine.request import Overloaded
from loraplex.server.tenancy.tenants import current_key

T = TypeVar("T", bound=Incoming)
R = TypeVar("R")

SMALL_BODY = 16 << 10
"""Bytes that are read whatever others send, and parsed at once: 5 ms at the worst, 0.1 ms of a conversation."""

MAX_HELD = 64 << 20
"""Bytes of all larger ones together, and twice those of one tenant."""

MAX_PAUSE = 0.1
"""Seconds after a body was parsed: what took longer was kept from the processor."""

NAMES_BODY = 64 << 10
"""Bytes of a body that has nothing but names in it: those of the routes that manage."""


class Bodies:
    """The bodies of one server's requests. Loop thread only.

    Large ones are bounded together, and parsed on a thread of their own, one at a time, with a pause as long as the
    parsing after each: parsers keep the GIL, so who sends many of them would take it from everybody. A tenant has one
    of its bodies in the line at a time.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._held: Counter[str] = Counter()  # bytes of large bodies by tenant: those that come and those that wait
        self._tenants: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._line = asyncio.Lock()
        self._pause_until = 0.0
        self._thread = ThreadPoolExecutor(1, "bodies")

    async def read(self, request: Request, kind: type[T], most: int | None = None) -> T:
        """The body as a `kind`, whatever its content type says (curl -d says it is a form).

        most: bytes, where it is less than --max-body. Raises ApiError, Overloaded, ClientGone.
        """
        return await self.read_as(request, lambda body, limits: parse_record(body, kind, limits), most)

    async def read_as(self, request: Request, parse: Callable[[bytes, RequestLimits], R], most: int | None = None) -> R:
        """What `parse` makes of the body, on whatever thread. Raises what it raises, too."""
        held = _BodyRoom(self._held, current_key().tenant)
        try:
            body = await self._receive(request, most, held)
            if len(body) <= SMALL_BODY:
                return parse(body, self._limits)
            tenant = self._tenants.setdefault(held.tenant, asyncio.Lock())
            async with tenant, self._line:
                await asyncio.sleep(self._pause_until - time.monotonic())
                if await request.is_disconnected():
                    raise ClientGone
                return await self._parse_aside(parse, body)
        finally:
            held.give_back()

    async def _parse_aside(self, parse: Callable[[bytes, RequestLimits], R], body: bytes) -> R:
        start = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, parse, body, self._limits)
        finally:
            now = time.monotonic()
            self._pause_until = now + min(now - start, MAX_PAUSE)

    async def _receive(self, request: Request, most: int | None, held: _BodyRoom) -> bytes:
        """The body, decoded. Raises ApiError (413, 415, and 400 where it is not in its encoding), and as `read`."""
        limit = self._limits.max_body_bytes
        where = "here (--max-body)"
        if most is not None and most < limit:
            limit, where = most, "by this route"
        decoder = BodyDecoder(request.headers.get("content-encoding", ""), limit)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large(f"{declared} bytes", limit, where)
        chunks = bytearray()
        try:
            async for chunk in request.stream():
                chunks += decoder.feed(chunk)
                if len(chunks) > limit:
                    raise too_large(f"more than {limit} bytes", limit, where)
                held.grow(len(chunks))
        except ClientDisconnect:
            raise ClientGone from None
        decoder.end()
        return bytes(chunks)


@dataclass
class _BodyRoom:
    """What one request has of the room for large bodies."""

    all: Counter[str]
    tenant: str
    bytes: int = 0

    def grow(self, size: int) -> None:
        """Raises Overloaded."""
        more = size - self.bytes
        if size <= SMALL_BODY:
            return
        if self.all.total() + more > MAX_HELD or (self.tenant and self.all[self.tenant] + more > MAX_HELD // 2):
            raise Overloaded(f"large bodies of {MAX_HELD >> 20} MiB are being read; try again, or send less", 1.0)
        self.all[self.tenant] += more
        self.bytes = size

    def give_back(self) -> None:
        """All of it."""
        self.all[self.tenant] -= self.bytes
        if not self.all[self.tenant]:
            del self.all[self.tenant]


def parse_record(body: bytes, kind: type[T], limits: RequestLimits) -> T:
    """Raises ApiError."""
    check_structure(body, limits)
    try:
        record = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0]) from None
    check_limits(record, limits)
    return record


def ignored_fields(record: GenerationFields) -> list[str]:
    """Fields nobody knows, as paths: they are ignored and named. Raises UnsupportedField where they may not be."""
    ignored = check_unknown(record.model_extra or {})
    if record.stream_options is not None:
        ignored += [f"stream_options.{name}" for name in record.stream_options.model_extra or {}]
    if isinstance(record, ChatRequest):
        for i, message in enumerate(record.messages):
            ignored += _message_extras(message.model_extra or {}, f"messages[{i}]")
        for i, tool in enumerate(record.tools or ()):
            ignored += [f"tools[{i}].{name}" for name in tool.model_extra or {}]
            ignored += [f"tools[{i}].function.{name}" for name in tool.function.model_extra or {}]
    return ignored


def body_schema(*kinds: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads one of `kinds`."""
    schema = inlined(Union[kinds], "validation")  # noqa: UP007 (there is no operator for a list of types)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _message_extras(extras: dict[str, Any], where: str) -> list[str]:
    if extras.get("function_call"):
        raise InvalidField(f"{where}.function_call", f"{where}.function_call: use tool_calls, which replaced it")
    if extras.get("audio"):
        raise InvalidField(f"{where}.audio", f"{where}.audio: only text goes in and out")
    return [f"{where}.{name}" for name, value in extras.items() if value is not None]


def _explain(error: ErrorDetails) -> ApiError:
    """One of pydantic's errors in the caller's terms: path, what was wrong, what was found."""
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {error['ctx']['error']}", code="invalid_json")
    if not error["loc"]:
        return ApiError(400, "the body must be a JSON object", code="invalid_json")
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])[1:]
    path = path[:200]  # keys of objects are the caller's and may be anything
    if error["type"] == "missing":
        return InvalidField(path, f"{path}: this field is required", code="missing_required_parameter")
    message = error["msg"].removeprefix("Value error, ")
    found = error["input"]
    shown = f" (found {found!r})" if isinstance(found, int | float | str) and len(repr(found)) <= 40 else ""
    code = "invalid_type" if error["type"].endswith("_type") else "invalid_value"
    return InvalidField(path, f"{path}: {message[0].lower()}{message[1:]}{shown}", code=code)
