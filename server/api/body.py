"""From the bytes of a request to a checked record. Every fault is a 400 (413 for the size) that names the field."""

from __future__ import annotations

from typing import Any, TypeVar, Union

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
from loraplex.server.config import RequestLimits

T = TypeVar("T", bound=Incoming)


async def read_record(request: Request, kind: type[T], limits: RequestLimits) -> T:
    """The body as a `kind`, whatever its content type says (curl -d says it is a form).

    Raises ApiError, ClientGone.
    """
    return parse_record(await read_bytes(request, limits), kind, limits)


def parse_record(body: bytes, kind: type[T], limits: RequestLimits) -> T:
    """Raises ApiError."""
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


async def read_bytes(request: Request, limits: RequestLimits) -> bytes:
    """The body, decoded. Raises ApiError (413, 415, and 400 where it is not in its Content-Encoding), ClientGone."""
    limit = limits.max_body_bytes
    decoder = BodyDecoder(request.headers.get("content-encoding", ""), limit)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large(f"{declared} bytes", limit)
    chunks = bytearray()
    try:
        async for chunk in request.stream():
            chunks += decoder.feed(chunk)
            if len(chunks) > limit:
                raise too_large(f"more than {limit} bytes", limit)
    except ClientDisconnect:
        raise ClientGone from None
    decoder.end()
    return bytes(chunks)


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
