"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter

from loraplex.server.api.catalog import find_card, list_cards
from loraplex.server.api.openapi import READ, failures
from loraplex.server.api.parts import Parts
from loraplex.server.api.schemas import ModelCard, ModelList


def make_router(parts: Parts) -> APIRouter:
    """The routes, working with `parts`."""
    router = APIRouter()

    @router.get("/v1/models", responses=failures(READ))
    async def list_models() -> ModelList:
        """The base and every adapter: the names that `model` may hold."""
        return ModelList(data=list_cards(parts))

    @router.get("/v1/models/{model:path}", responses=failures((401, 404)))  # names may hold a slash
    async def get_model(model: str) -> ModelCard:
        """One of them."""
        return find_card(parts, model)

    return router
