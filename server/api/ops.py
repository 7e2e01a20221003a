"""What operators and their machines ask: /health, /ready, /ping, /load, /metrics, /version."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from loraplex.server.api.errors import SERVER, ApiError
from loraplex.server.api.openapi import Readiness, ServerLoad, ServerVersion, answers
from loraplex.server.api.services import Services
from loraplex.server.telemetry.metrics import CONTENT_TYPE
from loraplex.server.version import version


def make_router(services: Services) -> APIRouter:
    """The routes, working with `services`."""
    router = APIRouter()

    @router.get("/health", **answers(None, errors=(503,)))
    async def health() -> Response:
        """200 while the engine runs, 503 once it has stopped."""
        if not services.engine.alive:
            reason = type(services.engine.failure).__name__ if services.engine.failure is not None else "it was stopped"
            raise ApiError(503, f"the engine does not run: {reason}", type=SERVER, code="engine_dead")
        return Response(status_code=200)

    @router.get("/ready", **answers(Readiness, errors=(503,), error_shape=Readiness))
    async def ready() -> Response:
        """200 while new requests are taken; 503 while the server is stopping, though what runs goes on."""
        drain = services.drain
        state = "draining" if drain.is_draining else "ready" if services.engine.alive else "dead"
        body = {"state": state, "open": drain.num_open, "seconds_left": round(drain.seconds_left, 1)}
        return JSONResponse(body, status_code=200 if state == "ready" else 503)

    @router.post("/ping", **answers(None, errors=(503,)))
    @router.get("/ping", **answers(None, errors=(503,)))
    async def ping() -> Response:
        """The same, under SageMaker's name."""
        return await health()

    @router.get("/metrics", **answers("text/plain", errors=(401, 403)))
    async def metrics() -> Response:
        """Prometheus' text format, under vLLM's names."""
        return Response(services.metrics.render(), media_type=CONTENT_TYPE)

    @router.get("/load", **answers(ServerLoad, errors=()))
    async def load() -> Response:
        """Requests that are open, as vLLM tells its load balancers."""
        return JSONResponse({"server_load": services.drain.num_open})

    @router.get("/version", **answers(ServerVersion, errors=()))
    async def show_version() -> Response:
        """The version of this server."""
        return JSONResponse({"version": version()})

    return router
