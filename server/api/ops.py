"""What operators and their machines ask: /health, /ping, /metrics, /version."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from loraplex.server.api.errors import SERVER, ApiError
from loraplex.server.api.parts import Parts
from loraplex.server.metrics import CONTENT_TYPE
from loraplex.server.version import version


def make_router(parts: Parts) -> APIRouter:
    """The routes, working with `parts`."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """200 while the engine runs, 503 once it has stopped."""
        if not parts.engine.alive:
            reason = type(parts.engine.failure).__name__ if parts.engine.failure is not None else "it was stopped"
            raise ApiError(503, f"the engine does not run: {reason}", type=SERVER, code="engine_dead")
        return Response(status_code=200)

    @router.post("/ping", include_in_schema=False)
    @router.get("/ping")
    async def ping() -> Response:
        """The same, under SageMaker's name."""
        return await health()

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format, under vLLM's names."""
        return Response(parts.metrics.render(), media_type=CONTENT_TYPE)

    @router.get("/version")
    async def show_version() -> Response:
        """The version of this server."""
        return JSONResponse({"version": version()})

    return router
