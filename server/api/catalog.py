"""Which names the field `model` may hold, and the cards that list them."""

from __future__ import annotations

from loraplex.adapters.errors import AdapterNotFound
from loraplex.adapters.registry import AdapterLease, AdapterVersion
from loraplex.server.api.errors import ApiError
from loraplex.server.api.parts import Base, Parts
from loraplex.server.api.schemas import ModelCard, ModelPermission

HOW_TO_LIST = "GET /v1/models lists the names served here"


def adapter_name(base: Base, model: str) -> str | None:
    """The adapter that `model` names, as itself or as "base:adapter"; None for the base."""
    if model in base.names:
        return None
    for name in base.names:
        if model.startswith(f"{name}:"):
            return model[len(name) + 1 :]
    return model


def lease_model(parts: Parts, model: str) -> AdapterLease | None:
    """A lease of the adapter that `model` names; None for the base.

    Raises ApiError (404) for a name nobody has, AdapterRefused for one whose adapter could not be loaded.
    """
    name = adapter_name(parts.base, model)
    if name is None:
        return None
    try:
        return parts.adapters.registry.lease(name)
    except AdapterNotFound:
        raise _not_found(model) from None


def list_cards(parts: Parts) -> list[ModelCard]:
    """The base under each of its names, then the adapters."""
    return [
        *(_base_card(parts.base, name) for name in parts.base.names),
        *(_adapter_card(parts.base, version) for version in parts.adapters.registry.list()),
    ]


def find_card(parts: Parts, model: str) -> ModelCard:
    """The card of one name. Raises ApiError (404)."""
    name = adapter_name(parts.base, model)
    if name is None:
        return _base_card(parts.base, model)
    version = parts.adapters.registry.get(name)
    if version is None:
        raise _not_found(model)
    return _adapter_card(parts.base, version)


def _not_found(model: str) -> ApiError:
    shown = model if len(model) <= 200 else model[:200] + "..."
    message = f"The model `{shown}` does not exist; {HOW_TO_LIST}."
    return ApiError(404, message, param="model", code="model_not_found")


def _base_card(base: Base, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=base.created,
        root=base.root,
        parent=None,
        max_model_len=base.max_model_len,
        permission=[ModelPermission(id=f"modelperm-{name}", created=base.created)],
    )


def _adapter_card(base: Base, version: AdapterVersion) -> ModelCard:
    return ModelCard(
        id=version.name,
        created=version.created,
        root=version.source,
        parent=base.names[0],
        max_model_len=None,
        permission=[ModelPermission(id=f"modelperm-{version.name}-{version.uid}", created=version.created)],
    )
