"""GET /v1/models, /v1/models/{id} and /v1/adapters/{name}."""

from __future__ import annotations

from fastapi import APIRouter

from loraplex.server.api.answer_schemas import AdapterReceipt, ModelCard, ModelList
from loraplex.server.api.catalog import find_card, find_receipt, list_cards
from loraplex.server.api.openapi import READ, failures
from loraplex.server.api.services import Services


def make_router(services: Services) -> APIRouter:
    """The routes, working with `services`."""
    router = APIRouter()

    @router.get("/v1/models", responses=failures(READ))
    async def list_models() -> ModelList:
        """The base and every adapter: the names that `model` may hold."""
        return ModelList(data=list_cards(services))

    @router.get("/v1/models/{model:path}", responses=failures((401, 404)))  # names may hold a slash
    async def get_model(model: str) -> ModelCard:
        """One of them."""
        return find_card(services, model)

    @router.get("/v1/adapters/{name:path}", responses=failures((401, 404, 410)))
    async def get_adapter(name: str) -> AdapterReceipt:
        """What was found in an adapter's files."""
        return find_receipt(services, name)

    return router
