"""Aliases and labels over HTTP: names for versions, changed at once for all who ask, by who may manage them."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loraplex.adapters.errors import AdapterNotFound
from loraplex.server.api.alias_terms import may_use_alias
from loraplex.server.api.body import NAMES_BODY, body_schema
from loraplex.server.api.catalog import visible_aliases
from loraplex.server.api.errors import ApiError, InvalidField
from loraplex.server.api.manage import asking, check_may_load, counting_adapters
from loraplex.server.api.names import HOW_TO_LIST, not_found
from loraplex.server.api.openapi import answers
from loraplex.server.api.schemas import Incoming, Wire
from loraplex.server.api.services import Services
from loraplex.server.catalog.aliases import Alias, AliasState, Target
from loraplex.server.catalog.labels import drop_label, set_label
from loraplex.server.catalog.on_demand import is_hidden
from loraplex.server.catalog.promotion import Requirement
from loraplex.server.catalog.quota import TooManyAdapters
from loraplex.server.tenancy.tenants import current_key

MANAGED = (400, 401, 403, 404, 409, 410, 413, 429, 507)
"""What may go wrong where an alias or a label is changed."""


class TargetFields(Wire):
    """One of what an alias stands for."""

    adapter: Annotated[str, Field(min_length=1, max_length=400)]  # "sql", "sql@prod", "sql@3fa9c1d20b44", or an alias
    weight: Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)] = 1.0


class AliasRequest(Incoming):
    """PUT /v1/aliases/{name}."""

    targets: Annotated[list[TargetFields], Field(min_length=1, max_length=64)]
    kind: Literal["split", "mix"] = "split"
    requires: Requirement = ""  # of what is promoted
    expected: Annotated[int, Field(ge=0)] | None = None  # the revision that the alias has; 0: there is none


class AliasChange(Incoming):
    """POST /v1/aliases/{name}/promote and /rollback."""

    target: Annotated[str, Field(max_length=400)] = ""  # to promote: one of the targets, or what it begins with
    expected: Annotated[int, Field(ge=0)] | None = None


class LabelRequest(Incoming):
    """PUT /v1/adapters/{name}/labels/{label}."""

    version: Annotated[str, Field(max_length=400)] = "latest"  # what may stand after the @
    expected: Annotated[str, Field(max_length=64)] | None = None  # the digest that the label has; "": there is none


class AliasCard(Wire):
    """An alias and what it stands for."""

    id: str
    object: Literal["alias"] = "alias"
    revision: int
    kind: Literal["split", "mix"]
    targets: list[TargetFields]
    requires: Requirement
    previous: list[TargetFields] | None  # before the last change: what rollback brings back
    previous_kind: Literal["split", "mix"] | None
    changed: int


class AliasList(Wire):
    object: Literal["list"] = "list"
    data: list[AliasCard]


class ScoreRequest(Incoming):
    """PUT /v1/adapters/{name}/scores/{golden}."""

    score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    version: Annotated[str, Field(max_length=400)] = "latest"  # what may stand after the @


class ScoreCard(Wire):
    """What a version of an adapter scored on a golden set."""

    id: str
    object: Literal["score"] = "score"
    digest: str
    golden: str
    score: float


class LabelCard(Wire):
    """A label of an adapter and the version it stands for."""

    id: str
    object: Literal["label"] = "label"
    digest: str


def make_router(services: Services) -> APIRouter:
    """Make the routes, working with `services`."""
    router = APIRouter()
    _route_changes(router, services)
    _route_reads(router, services)
    _route_labels(router, services)
    return router


def _route_changes(router: APIRouter, services: Services) -> None:
    """Add the routes that change aliases to `router`."""

    @router.put(
        "/v1/aliases/{name:path}", openapi_extra=body_schema(AliasRequest), **answers(AliasCard, errors=MANAGED)
    )
    async def put_alias(name: str, request: Request) -> Response:
        """Have a name stand for other names, from the next request on."""
        _check_is_name(name)
        _check_may_change(services, name)
        record = await services.bodies.read(request, AliasRequest, NAMES_BODY)
        for target in record.targets:
            _check_may_use(services, target.adapter)
        _check_number(services, name)
        targets = tuple(Target(each.adapter, each.weight) for each in record.targets)
        state = AliasState(record.kind, targets, record.requires)
        alias = await services.aliases.put(name, state, asking(), record.expected)
        return _told(_card(alias))

    @router.post(
        "/v1/aliases/{name:path}/promote", openapi_extra=body_schema(AliasChange), **answers(AliasCard, errors=MANAGED)
    )
    async def promote(name: str, request: Request) -> Response:
        """Give all requests for an alias to one of its targets: the one with the least share, unless one is named."""
        _check_may_change(services, name)
        record = await services.bodies.read(request, AliasChange, NAMES_BODY)
        return _told(_card(await services.aliases.promote(name, record.target, asking(), record.expected)))

    @router.post(
        "/v1/aliases/{name:path}/rollback", openapi_extra=body_schema(AliasChange), **answers(AliasCard, errors=MANAGED)
    )
    async def roll_back(name: str, request: Request) -> Response:
        """Have an alias stand for what it stood for before its last change."""
        _check_may_change(services, name)
        record = await services.bodies.read(request, AliasChange, NAMES_BODY)
        return _told(_card(await services.aliases.roll_back(name, asking(), record.expected)))

    @router.delete("/v1/aliases/{name:path}", **answers(AliasCard, errors=MANAGED))
    async def delete_alias(name: str) -> Response:
        """Take an alias away; what it stood for stays."""
        _check_is_name(name)
        _check_may_change(services, name)
        alias = services.aliases.get(name)
        await services.aliases.delete(name, asking())
        assert alias is not None
        return _told(_card(alias))


def _route_reads(router: APIRouter, services: Services) -> None:
    """Add the routes that show aliases to `router`."""

    @router.get("/v1/aliases", **answers(AliasList, errors=(401,)))
    async def list_aliases() -> Response:
        """List the aliases that the caller may use."""
        return _told(AliasList(data=[_card(alias) for alias in visible_aliases(services)]))

    @router.get("/v1/aliases/{name:path}", **answers(AliasCard, errors=(401, 404)))
    async def get_alias(name: str) -> Response:
        """Show one alias."""
        _check_is_name(name)
        alias = services.aliases.get(name)
        if alias is None or not may_use_alias(services, current_key(), alias):
            raise ApiError(404, f"there is no alias '{name[:200]}'", param="name", code="alias_not_found")
        return _told(_card(alias))


def _route_labels(router: APIRouter, services: Services) -> None:
    """Add the routes that label and score versions to `router`."""

    @router.put(
        "/v1/adapters/{name:path}/labels/{label}",
        openapi_extra=body_schema(LabelRequest),
        **answers(LabelCard, errors=MANAGED),
    )
    async def put_label(name: str, label: str, request: Request) -> Response:
        """Have `name@label` stand for one version of an adapter, which stays for as long."""
        _check_may_change(services, name)
        record = await services.bodies.read(request, LabelRequest, NAMES_BODY)
        digest = await set_label(services.adapters, name, label, record.version, asking(), record.expected)
        return _told(LabelCard(id=f"{name}@{label}", digest=digest))

    @router.put(
        "/v1/adapters/{name:path}/scores/{golden}",
        openapi_extra=body_schema(ScoreRequest),
        **answers(ScoreCard, errors=MANAGED),
    )
    async def put_score(name: str, golden: str, request: Request) -> Response:
        """Record what a version of an adapter scored on a golden set, which is told by its sha256."""
        _check_may_change(services, name)
        record = await services.bodies.read(request, ScoreRequest, NAMES_BODY)
        kept = await services.aliases.scores.record(name, record.version, golden, record.score, asking())
        return _told(ScoreCard(id=f"{name}@{kept.digest}", digest=kept.digest, golden=golden, score=kept.score))

    @router.delete("/v1/adapters/{name:path}/labels/{label}", **answers(LabelCard, errors=MANAGED))
    async def delete_label(name: str, label: str) -> Response:
        """Take a label away."""
        _check_may_change(services, name)
        digest = await drop_label(services.adapters, name, label, asking())
        return _told(LabelCard(id=f"{name}@{label}", digest=digest))


def _check_is_name(name: str) -> None:
    """Raise HTTPException (405) for the path of a change: names may hold slashes, so the route of names has it too."""
    if name.endswith(("/promote", "/rollback")):
        raise HTTPException(405, headers={"Allow": "POST"})


def _told(card: Wire) -> Response:
    return JSONResponse(card.model_dump())


def _card(alias: Alias) -> AliasCard:
    previous = alias.previous
    return AliasCard(
        id=alias.name,
        revision=alias.revision,
        kind=alias.state.kind,
        targets=_targets(alias.state),
        requires=alias.state.requires,
        previous=None if previous is None else _targets(previous),
        previous_kind=None if previous is None else previous.kind,
        changed=int(alias.changed),
    )


def _targets(state: AliasState) -> list[TargetFields]:
    return [TargetFields(adapter=each.name, weight=each.weight) for each in state.targets]


def _check_may_change(services: Services, name: str) -> None:
    """Check that the caller may change the name. Raises ApiError, AdapterNotFound for what it may not know."""
    if name in services.facts.names or is_hidden(name):
        raise InvalidField("name", f"the name '{name[:200]}' is the base's own, or the server's; choose another")
    if not current_key().may_manage(name) and not current_key().may_use(name):
        raise AdapterNotFound(f"there is no {name[:200]!r}; {HOW_TO_LIST}")
    check_may_load(name)


def _check_number(services: Services, name: str) -> None:
    """Check that a tenant has no more aliases than it may have adapters. Raises RateLimited."""
    with counting_adapters() as owner:
        if owner is None or owner.most is None or services.aliases.get(name) is not None:
            return
        found = sum(alias.name.startswith(f"{owner.tenant}/") for alias in services.aliases.all())
        if found >= owner.most:
            told = f"tenant {owner.tenant!r} has {found} aliases here and may have {owner.most}: delete one first"
            raise TooManyAdapters(told, passes=False)


def _check_may_use(services: Services, target: str) -> None:
    """Raise ApiError (404) for what the caller could not ask for itself."""
    name = target.partition("@")[0]
    alias = services.aliases.get(name)
    usable = may_use_alias(services, current_key(), alias) if alias is not None else current_key().may_use(name)
    if not usable or is_hidden(name):
        raise not_found(target, "targets")
