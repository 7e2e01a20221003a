"""Adapters by wire: PUT and DELETE /v1/adapters/{name}, and POST /v1/adapters for those without a name.

The body is the adapter's safetensors file, or a multipart body with its two files (api/upload.py). It is complete and
checked before a name moves; whatever is wrong with it, what the name stood for is served on and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused, InvalidAdapterName
from loraplex.adapters.sources.spool import CONFIG_KEY, SpooledAdapter
from loraplex.adapters.version import AdapterVersion
from loraplex.server.api.answer_schemas import AdapterReceipt
from loraplex.server.api.catalog import receipt_of
from loraplex.server.api.errors import ApiError, InvalidField
from loraplex.server.api.manage import asking, check_may_load, check_may_unload, counting_adapters, push_owner
from loraplex.server.api.names import not_found
from loraplex.server.api.openapi import AdapterDeleted, answers
from loraplex.server.api.proof import prove
from loraplex.server.api.services import Services
from loraplex.server.api.upload import MULTIPART, SAFETENSORS, receive
from loraplex.server.catalog.on_demand import is_hidden
from loraplex.server.catalog.pushed import Pushed, PushOwner
from loraplex.server.catalog.saved import LoadTerms
from loraplex.server.engine.pausing import Pace
from loraplex.server.tenancy.tenants import current_key

logger = logging.getLogger(__name__)

DEFAULT_TTL = 3600.0
"""Seconds that an adapter without a name stays where nothing else was asked for."""

WARM_SECONDS = 1.0
"""Copies of 10 MiB a step, while streams decode: 160 MiB at 60 ms a step."""

MAX_TTL = 30 * 86_400.0

DELETE = (401, 403, 404, 410, 507)
PUSH = (400, 401, 403, 409, 413, 415, 429, 503, 507)

_BINARY = {"type": "string", "format": "binary"}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": f"The safetensors file, with adapter_config.json as text under '{CONFIG_KEY}' of its "
        "__metadata__; or both files as the parts 'config' and 'weights'. Content-Digest (RFC 9530) is verified.",
        "content": {
            SAFETENSORS: {"schema": _BINARY},
            MULTIPART: {"schema": {"type": "object", "properties": {"config": _BINARY, "weights": _BINARY}}},
        },
    }
}


def _query(**described: tuple[dict[str, Any], str]) -> dict[str, Any]:
    """Make the `parameters` of a route."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema, "description": text}
            for name, (schema, text) in described.items()
        ]
    }


TTL = ({"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TTL}, "Seconds after which it goes by itself.")

TERMS: dict[str, tuple[dict[str, Any], str]] = {
    "expected": ({"type": "string"}, "The digest that the name has, or 12 digits or more of it; empty: no such name."),
    "retain": ({"type": "integer", "minimum": 0, "maximum": 1000}, "Versions before this one that can be asked for."),
}


def make_router(services: Services) -> APIRouter:
    """Make the routes, working with `services`."""
    router = APIRouter()

    @router.put(
        "/v1/adapters/{name:path}",
        openapi_extra=BODY | _query(ttl=TTL, **TERMS),
        **answers(AdapterReceipt, errors=PUSH),
    )
    async def put_adapter(request: Request, name: str) -> Response:
        """Serve the adapter in the body under this name, in place of the one that has it."""
        version = await push(services, request, name)
        return JSONResponse(receipt_of(services, version, await prove(services, version)).model_dump())

    @router.post("/v1/adapters", openapi_extra=BODY | _query(ttl=TTL), **answers(AdapterReceipt, errors=PUSH))
    async def post_adapter(request: Request) -> Response:
        """Serve the adapter in the body without a name: `model` is "@sha256:" and the digest in the answer's `id`."""
        version = await push(services, request, None)
        return JSONResponse(receipt_of(services, version, await prove(services, version)).model_dump())

    @router.delete("/v1/adapters/{name:path}", **answers(AdapterDeleted, errors=DELETE))
    async def delete_adapter(name: str) -> Response:
        """Take an adapter away; requests that wear it finish."""
        pushed = services.pushed.find(name, push_owner()) if name.startswith("@") else None
        try:
            if pushed is not None:
                services.pushed.remove(pushed)
            else:
                check_may_unload(name)
                await services.adapters.unregister(name, asking())
        except AdapterNotFound:
            raise not_found(name, "name") from None
        logger.info("adapter %s unloaded", name)
        return JSONResponse({"id": name, "object": "adapter", "deleted": True})

    return router


async def push(services: Services, request: Request, name: str | None) -> AdapterVersion:
    """Receive the body, check all of it, and give it `name` (None: none).

    Raises ApiError, AdapterError, RateLimited, Overloaded, StateNotKept, ClientGone; nothing of it is left then.
    """
    pushed, owner, ttl, query = services.pushed, push_owner(), _ttl(request), request.query_params
    if name is None:
        if not owner.tenant and not current_key().admin:
            raise ApiError(403, "this key may not push adapters", type="permission_error", code="forbidden")
    else:
        check_pushed_name(services, name)
    services.drain.check()
    with receiving(pushed, owner) as (spooled, most):
        source = await receive(request, spooled, most, pushed.threads)
    if name is not None:
        return await enter(
            services, source, owner, name, LoadTerms(query.get("expected"), _retain(request, owner), ttl)
        )
    with pushed.claimed(source, owner), _about_what_came(Path(source)), counting_adapters():
        version = await pushed.add(source, owner, ttl or DEFAULT_TTL)
    await _warm(services, version)
    return version


async def enter(
    services: Services,
    source: str,
    owner: PushOwner,
    name: str,
    terms: LoadTerms,
    *,
    replace: bool = True,
    pinned: bool = False,
) -> AdapterVersion:
    """Check all of what came whole at `source`, and give it `name`, as AdapterManager.register does.

    Raises ApiError, AdapterError, RateLimited, StateNotKept; nothing of it is left then.
    """
    pushed, quota = services.pushed, services.on_demand.quota
    about = _about_what_came(Path(source))
    with pushed.claimed(source, owner), about, counting_adapters() as counted, quota.loading(counted, name):
        version = await services.adapters.register(
            name, source, replace=replace, pinned=pinned, who=asking(), terms=terms, what="push"
        )
        if version.source != source:
            pushed.drop(source)  # it has a copy of its own
    await _warm(services, version)
    logger.info("adapter %s pushed: %s", version.name, version.info.size)
    return version


async def _warm(services: Services, version: AdapterVersion) -> None:
    """Wait until it is on the device, so that its first request waits for nothing; but not for long."""
    if services.engine.pace is Pace.RUNNING:
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(services.engine.warm_adapter(version)), WARM_SECONDS)


@contextmanager
def receiving(pushed: Pushed, owner: PushOwner) -> Iterator[tuple[SpooledAdapter, int]]:
    """Have room for what comes, as Pushed.coming(). Raises what that and the block raise, about the body."""
    with pushed.coming(owner) as (spooled, most), _about_what_came(spooled.folder):
        try:
            yield spooled, most
        except ApiError as error:
            if error.status == 413 and most < pushed.most_bytes:
                raise pushed.too_many(owner) from None
            raise


def check_pushed_name(services: Services, name: str) -> None:
    """Raise ApiError (400, 403) unless the caller may give an adapter this name."""
    try:
        if is_hidden(name):
            raise InvalidAdapterName(f"the adapter name {name[:200]!r} is of the server's own kind; choose another")
        services.adapters.registry.check_name(name)
    except InvalidAdapterName as error:
        raise InvalidField("name", str(error), "invalid_name") from None
    check_may_load(name)


def _retain(request: Request, owner: PushOwner) -> int | None:
    """Read how many versions stay beside this one; None: as the server was told.

    Raises InvalidField.
    """
    given = request.query_params.get("retain")
    if given is not None and not (given.isascii() and given.isdigit() and int(given[:9]) <= 1000):
        raise InvalidField("retain", f"retain: found {given[:40]!r}, expected a number from 0 to 1000")
    if given is not None and owner.most_bytes is not None:
        raise InvalidField("retain", "retain: not for keys with max_pushed_bytes; --retain of the server decides")
    return None if given is None else int(given)


def _ttl(request: Request) -> float | None:
    """Read after how long the adapter expires. Raises InvalidField."""
    given = request.query_params.get("ttl")
    if given is None:
        return None
    try:
        ttl = float(given)
    except ValueError:
        ttl = -1.0
    if not 0 < ttl <= MAX_TTL:
        raise InvalidField("ttl", f"ttl: found {given[:40]!r}, expected seconds, more than 0 and up to {MAX_TTL:.0f}")
    return ttl


@contextmanager
def _about_what_came(folder: Path) -> Iterator[None]:
    """Have refusals speak of the body, and not of where it was written."""
    try:
        yield
    except AdapterRefused as error:
        message = str(error).replace(f"{folder}: ", "", 1)
        raise ApiError(400, f"the adapter that came: {message}", param="body", code=error.code) from None
