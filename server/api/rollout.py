"""What trainers call around their rollouts: POST /pause and /resume, GET /is_paused, /get_world_size.

    /pause?mode=keep    at once; what is open goes on where it is after /resume      (vLLM's)
    /pause?mode=wait    once what is open has ended
    /pause?mode=abort   what is open ends here with what it has, finish_reason "abort"; vLLM's default

    /resume?mode=stay       what is open ends on the versions that it began with
    /resume?mode=recompute  it goes on under what the names of its adapters point at by now, which computes it anew
    /resume?mode=keep       the same, with the keys and values that the old version has computed

Whoever comes meanwhile waits. Caches are kept whatever `clear_cache` says: keys and values are found by the digest of
the adapter that computed them, so none of another version is ever used. SGLang's and AReaL's names do the same.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal, get_args

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loraplex.server.api.errors import ApiError, InvalidField
from loraplex.server.api.openapi import Paused, PauseState, WorldSize, answers
from loraplex.server.api.services import Services
from loraplex.server.engine.pausing import Pace
from loraplex.server.engine.renewing import Renewal
from loraplex.server.tenancy.tenants import current_key

Mode = Literal["abort", "wait", "keep"]

_RESUME_MODES: dict[str, Renewal | None] = {"stay": None} | {renewal.value: renewal for renewal in Renewal}

ADMIN = (400, 401, 403, 503)

_MODE = {"name": "mode", "in": "query", "required": False, "schema": {"enum": list(get_args(Mode)), "default": "abort"}}


_RESUME = {"name": "mode", "in": "query", "required": False, "schema": {"enum": list(_RESUME_MODES)}}


def make_router(services: Services) -> APIRouter:
    """The routes, working with `services`."""
    router = APIRouter()

    @router.post("/pause", openapi_extra={"parameters": [_MODE]}, **answers(Paused, errors=ADMIN))
    async def pause(request: Request) -> Response:
        """Compute nothing until /resume; answered once that is so."""
        await stop(services, _mode(request))
        return JSONResponse({"status": "paused"})

    @router.post("/areal_pause_generation", **answers(Paused, errors=ADMIN))
    @router.post("/pause_generation", **answers(Paused, errors=ADMIN))
    async def pause_generation() -> Response:
        """SGLang's and AReaL's: what is open is aborted."""
        await stop(services, "abort")
        return JSONResponse({"status": "paused"})

    resumed: dict[str, Any] = {"openapi_extra": {"parameters": [_RESUME]}, **answers(Paused, errors=ADMIN)}

    @router.post("/resume", **resumed)
    @router.post("/continue_generation", **resumed)
    @router.post("/areal_continue_generation", **resumed)
    async def resume(request: Request) -> Response:
        """Compute again; what was kept goes on, if asked to under new versions."""
        _check_admin()
        services.engine.resume(_renewal(request, services.facts.config.run.resume_mode))
        return JSONResponse({"status": "resumed"})

    @router.get("/is_paused", **answers(PauseState, errors=(401,)))
    async def is_paused() -> Response:
        """Whether nothing is computed."""
        return JSONResponse({"is_paused": services.engine.pace is Pace.PAUSED})

    @router.get("/get_world_size", **answers(WorldSize, errors=(401,)))
    async def get_world_size() -> Response:
        """Processes that share one model: there is one."""
        return JSONResponse({"world_size": 1})

    return router


async def stop(services: Services, mode: Mode) -> None:
    """Have nothing computed from here on. Raises ApiError (403), EngineDead."""
    _check_admin()
    stopped = services.engine.pause(keep=mode == "keep")
    if mode == "abort":  # nobody comes in any more, so these are all
        services.open_answers.abort_all()
    await asyncio.wrap_future(stopped)


def _mode(request: Request) -> Mode:
    """Read ?mode=, and vLLM's older ?wait_for_inflight_requests=. Raises InvalidField."""
    asked = request.query_params.get("mode")
    if asked is None:
        waits = request.query_params.get("wait_for_inflight_requests", "").lower() in ("1", "true")
        return "wait" if waits else "abort"
    for mode in get_args(Mode):
        if asked == mode:
            return mode
    raise InvalidField("mode", f"mode: found {asked[:40]!r}, expected keep, wait or abort")


def _renewal(request: Request, default: str) -> Renewal | None:
    """Read ?mode= of a resume. Raises InvalidField."""
    asked = request.query_params.get("mode", default)
    if asked not in _RESUME_MODES:
        raise InvalidField("mode", f"mode: found {asked[:40]!r}, expected {', '.join(_RESUME_MODES)}")
    return _RESUME_MODES[asked]


def _check_admin() -> None:
    """Raises ApiError: it stops everybody."""
    if not current_key().admin:
        raise ApiError(403, "only an admin's key may pause", type="permission_error", code="forbidden")
