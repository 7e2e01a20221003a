"""Domain errors to HTTP, in one place. Handlers raise; nobody else builds an error answer.

Every error body is OpenAI's {"error": {"message", "type", "param", "code"}}. The adapter routes speak vLLM's dialect:
its types ("InvalidUserInput", "NotFoundError"), and the same fields once more at the top level, where the controllers
that were written for older vLLM look for them.
"""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loraplex.adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterNotFound,
    AdapterRefused,
    AdapterUnavailable,
    InvalidAdapterName,
    VersionGone,
    VersionMoved,
    VersionUnclear,
)
from loraplex.adapters.sources.spool import NoRoom
from loraplex.server.catalog.alias_reach import AliasRefused
from loraplex.server.catalog.promotion import PromotionRefused
from loraplex.server.catalog.pushed import AdapterExpired, TooManyBytes
from loraplex.server.catalog.state_store import StateNotKept
from loraplex.server.engine.request import (
    ContextTooLong,
    DeadlineExceeded,
    EngineDead,
    EngineError,
    NotANumber,
    OutOfMemory,
    Overloaded,
    ShuttingDown,
)
from loraplex.server.tenancy.rate_limits import RateLimited

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """An answer with an error in it: status, OpenAI's four fields, `details` beside them, and headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | int | None = None,
        headers: dict[str, str] | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}
        self.details = details or {}

    def fields(self) -> dict[str, Any]:
        """The object under "error"."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code, **self.details}


class InvalidField(ApiError):
    """A field of the request that cannot be; `param` names it as a path: "messages[0].content"."""

    def __init__(self, param: str, message: str, code: str | None = "invalid_value") -> None:
        super().__init__(400, message, param=param, code=code)


class UnsupportedField(ApiError):
    """A field that would change the answer and that this server does not have: better no answer than another one."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(400, message, param=param, code="unsupported_parameter")


class ClientGone(Exception):
    """The client closed the connection before its answer was ready; nobody reads what is returned."""


def to_api_error(error: Exception, prompt_param: str | None = None) -> ApiError:
    """What the caller is told about `error` on an inference route; `prompt_param` is its field for the prompt."""
    match error:
        case ApiError():
            return error
        case AdapterNotFound():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case VersionGone():
            return ApiError(410, str(error), param="model", code="version_gone")
        case VersionUnclear():
            return ApiError(400, str(error), param="model", code="version_unclear")
        case AliasRefused():
            return ApiError(400, str(error), param="targets", code="alias_refused")
        case PromotionRefused():
            return ApiError(409, str(error), param="target", code="promotion_refused")
        case VersionMoved():
            present = {"present": error.present}
            return ApiError(409, str(error), param="expected", code="version_moved", details=present)
        case AdapterRefused():
            return ApiError(400, str(error), param="model", code=error.code)
        case AdapterUnavailable():
            return ApiError(503, str(error), type=SERVER, param="model", code="adapter_unavailable")
        case AdapterExpired():
            return ApiError(410, str(error), param="model", code="adapter_expired")
        case NoRoom():
            return ApiError(507, str(error), type=SERVER, code="no_room")
        case TooManyBytes():
            return ApiError(413, str(error), code="quota_exceeded")
        case AdapterError():
            return ApiError(400, str(error), param="model")
        case ContextTooLong():
            return ApiError(400, str(error), param=prompt_param, code="context_length_exceeded")
        case RateLimited():
            wait = {"Retry-After": str(math.ceil(error.retry_after)), **error.hint()}
            return ApiError(429, str(error), type="rate_limit_error", code="rate_limit_exceeded", headers=wait)
        case Overloaded():
            retry = {"Retry-After": str(max(1, round(error.retry_after)))}
            return ApiError(429, str(error), type="rate_limit_error", code="overloaded", headers=retry)
        case ShuttingDown():
            later = {"Retry-After": str(max(1, round(error.retry_after)))}
            return ApiError(503, str(error), type=SERVER, code="shutting_down", headers=later)
        case DeadlineExceeded():  # the official clients would ask again by themselves
            never = {"x-should-retry": "false"}
            return ApiError(504, str(error), type="timeout_error", param="timeout", code="timeout", headers=never)
        case OutOfMemory():
            return ApiError(503, str(error), type=SERVER, code="out_of_memory")
        case EngineDead():
            return ApiError(503, str(error), type=SERVER, code="engine_dead")
        case StateNotKept():
            return ApiError(507, str(error), type=SERVER, code="state_not_kept")
        case NotANumber() if error.with_adapter:  # no fault of the server's: nothing to alert of, or to ask again
            return ApiError(400, str(error), param="model", code="not_finite")
        case EngineError():
            return ApiError(500, str(error), type=SERVER)
        case RequestValidationError():
            where, what = error.errors()[0]["loc"][-1], error.errors()[0]["msg"]
            return InvalidField(str(where), f"{where}: {what[0].lower()}{what[1:]}")
        case HTTPException():
            return ApiError(error.status_code, _http_message(error), headers=dict(error.headers or {}))
    return ApiError(500, "the server failed on this request; its log says why", type=SERVER)


def logged(error: Exception, what: str) -> ApiError:
    """Translate what ended `what`, which has begun to be sent; log an error that nobody foresaw."""
    known = to_api_error(error)
    if known.status == 500:
        logger.error("%s failed", what, exc_info=error)
    return known


def to_adapter_route_error(error: Exception) -> ApiError:
    """The same for /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's words."""
    match error:
        case AdapterNotFound():
            return _vllm(404, str(error), "NotFoundError")
        case AdapterExists() | InvalidAdapterName():
            return _vllm(400, str(error), "InvalidUserInput")
        case AdapterRefused():
            return _vllm(400, str(error), "BadRequestError")
        case ApiError() if error.status == 400:
            return _vllm(400, error.message, "InvalidUserInput", error.param)
        case _:
            known = to_api_error(error)
            kind = "InternalServerError" if known.status >= 500 else known.type
            return ApiError(
                known.status, known.message, type=kind, code=known.status, headers=known.headers, details=known.details
            )


def _vllm(status: int, message: str, type: str, param: str | None = None) -> ApiError:
    return ApiError(status, message, type=type, param=param, code=status)


def error_response(error: ApiError, *, both_shapes: bool = False) -> JSONResponse:
    """`both_shapes` repeats the fields at the top level."""
    body: dict[str, Any] = {"error": error.fields()}
    if both_shapes:
        body = {"object": "error", **error.fields(), **body}
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def install(app: FastAPI) -> None:
    """Answer whatever a handler raises. A bug is told without its traceback, which the log gets (api/observe.py)."""

    async def answer(_: Request, error: Exception) -> Response:
        return error_response(to_api_error(error))

    async def nobody_there(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nginx's number for it, for whatever counts statuses on the way

    for kind in (ApiError, AdapterError, EngineError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientGone, nobody_there)
    app.add_exception_handler(Exception, answer)


def _http_message(error: HTTPException) -> str:
    if error.status_code == HTTPStatus.NOT_FOUND:
        return "no such route; GET /openapi.json lists them"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return "this route has another method; see the Allow header"
    return str(error.detail)
