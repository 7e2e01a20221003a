"""Who may come in: every request but those for OPEN routes brings a key, once the server has any.

A middleware around all routes, so that a new route is closed until it is named here. It knows the caller from the
headers alone, before a byte of the body is read, and answers 401 and 429 in the shape of the API that was called.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.server.api.errors import ApiError, error_response, to_api_error
from loraplex.server.api.page.ui import page_files
from loraplex.server.telemetry.request_context import current_request_context
from loraplex.server.tenancy.access import Access
from loraplex.server.tenancy.rate_limits import RateLimited
from loraplex.server.tenancy.tenants import Caller, calling

OPEN = frozenset({"/", "/health", "/ready", "/startup", "/ping", "/version", "/load", "/get_load", *page_files()})
"""What load balancers, kubelets and routers ask, and the files of the page: GET, and /ping also POST. They tell nothing
of any tenant."""

METRICS = "/metrics"

LORAX = frozenset({"/", "/generate", "/generate_stream", "/info", "/embed", "/classify", "/classify_batch"})
"""Routes that tell errors as LoRAX does."""

UNCOUNTED = ("/abort_request", "/v1/unload_lora_adapter", "/unload_lora_adapter", "/cancel")
"""Ends of the paths of POSTs that only give something back: a key at its limits may still do that."""

MAX_KEY = 512
"""Characters; nothing longer is hashed."""


class KeyMiddleware:
    """ASGI middleware: nobody without a key, and nobody beyond what their key allows."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or is_open(self._access, scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        caller = await self._access.find(given_keys(scope["headers"]))
        if caller is None:
            await refusal(dialect_of(scope["path"]), unauthorized())(scope, receive, send)
            return
        if (context := current_request_context()) is not None:
            context.tenant = caller.key.tenant
        with calling(caller):
            await self._pass(caller, scope, receive, send)

    async def _pass(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == METRICS and not caller.key.may_scrape:
            error = ApiError(403, "this key may not read metrics", type="permission_error", code="forbidden")
            await refusal(dialect_of(path), error)(scope, receive, send)
            return
        if scope["method"] != "POST" or path.endswith(UNCOUNTED):
            await self._app(scope, receive, send)
            return

        async def send_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(caller.limit_headers())
            await send(message)

        try:
            caller.admit()
        except RateLimited as error:
            await refusal(dialect_of(path), to_api_error(error))(scope, receive, send_limits)
            return
        with caller.at_work():
            await self._app(scope, receive, send_limits)


class Dialect(Enum):
    """Whose words and shape an error is told in."""

    OPENAI = auto()
    VLLM = auto()
    LORAX = auto()


def dialect_of(path: str) -> Dialect:
    """Return the dialect of the API that `path` belongs to."""
    if path in LORAX:
        return Dialect.LORAX
    return Dialect.VLLM if path.endswith(("load_lora_adapter", "_from_tensors")) else Dialect.OPENAI


def is_open(access: Access, method: str, path: str) -> bool:
    """Return whether a request needs no key."""
    if path == METRICS:
        return access.open_metrics
    return path in OPEN and (method in ("GET", "HEAD") or path == "/ping")


def given_keys(headers: Sequence[tuple[bytes, bytes]]) -> list[str]:
    """Return what may be a key: x-api-key, and the token of a Bearer header. One that is known is enough."""
    found = [value for name, value in headers if name == b"x-api-key"]
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            if scheme.lower() == b"bearer":
                found.append(token)
    stripped = [value.decode("latin-1").strip() for value in found[:4]]  # nobody tries a thousand keys at once
    return [value for value in stripped if 0 < len(value) <= MAX_KEY]


def refusal(dialect: Dialect, error: ApiError) -> Response:
    """Return `error` as an answer in `dialect`."""
    if dialect is Dialect.LORAX:
        kind = "overloaded" if error.status == 429 else "authentication"
        body: dict[str, Any] = {"error": error.message, "error_type": kind}
        return JSONResponse(body, status_code=error.status, headers=error.headers)
    return error_response(error, both_shapes=dialect is Dialect.VLLM)


def unauthorized() -> ApiError:
    """Return the error of who has no known key.

    Nothing that was given is repeated: a mistyped key is nearly a key. Clients know OpenAI's first words.
    """
    message = "Incorrect API key provided, or none; send yours as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
