"""GET /v1/models, /v1/models/{id} and /v1/adapters/{name}."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from loraplex.server.api.answer_schemas import AdapterReceipt, ModelCard, ModelList
from loraplex.server.api.catalog import find_card, find_receipt, list_cards
from loraplex.server.api.openapi import READ, failures
from loraplex.server.api.proof import MAX_WAIT
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

    @router.get("/v1/adapters/{name:path}", responses=failures((400, 401, 404, 410)))
    async def get_adapter(name: str, wait: Annotated[float, Query(ge=0, le=MAX_WAIT)] = 0.0) -> AdapterReceipt:
        """What was found in an adapter's files; its proof is begun where it is not made, and waited for."""
        return await find_receipt(services, name, wait)

    return router
