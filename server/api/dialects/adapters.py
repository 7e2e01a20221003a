"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, with vLLM's bodies, answers and error types."""

from __future__ import annotations

import logging

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from loraplex.adapters.errors import AdapterExists, AdapterNotFound
from loraplex.adapters.sources.sources import SourceAccess
from loraplex.adapters.version import AdapterVersion
from loraplex.server.api.body import NAMES_BODY, body_schema
from loraplex.server.api.errors import ClientGone, InvalidField, error_response, to_adapter_route_error
from loraplex.server.api.manage import asking, check_may_load, check_may_unload, counting_adapters, permitted_source
from loraplex.server.api.openapi import MANAGE, AdapterErrorAnswer, answers
from loraplex.server.api.schemas import LoadAdapterRequest, UnloadAdapterRequest
from loraplex.server.api.services import Services
from loraplex.server.catalog.on_demand import is_hidden
from loraplex.server.catalog.saved import LoadTerms
from loraplex.server.tenancy.tenants import current_key

logger = logging.getLogger(__name__)

TOLD = answers("text/plain", errors=MANAGE, error_shape=AdapterErrorAnswer)


def make_router(services: Services) -> APIRouter:
    """The routes, working with `services`."""
    router = APIRouter()

    @router.post("/v1/load_lora_adapter", openapi_extra=body_schema(LoadAdapterRequest), **TOLD)
    async def load_lora_adapter(request: Request) -> Response:
        """Load an adapter from a folder or Hub id and give it a name."""
        try:
            record = await services.bodies.read(request, LoadAdapterRequest, NAMES_BODY)
            await load(services, record)
        except ClientGone:
            raise
        except Exception as error:
            return _refuse("load", error)
        return PlainTextResponse(f"Success: LoRA adapter '{record.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", openapi_extra=body_schema(UnloadAdapterRequest), **TOLD)
    async def unload_lora_adapter(request: Request) -> Response:
        """Take an adapter's name away; requests that wear it finish."""
        try:
            record = await services.bodies.read(request, UnloadAdapterRequest, NAMES_BODY)
            await unload(services, record)
        except ClientGone:
            raise
        except Exception as error:
            return _refuse("unload", error)
        return PlainTextResponse(f"Success: LoRA adapter '{record.lora_name}' removed successfully.")

    return router


async def load(services: Services, record: LoadAdapterRequest, *, pinned: bool = False) -> AdapterVersion:
    """Read an adapter in full and give it its name. Raises ApiError, AdapterError, RateLimited, StateNotKept."""
    name = record.lora_name
    if not name or not record.lora_path:
        missing = "lora_path" if name else "lora_name"
        raise InvalidField(missing, "Both 'lora_name' and 'lora_path' must be provided.")
    if record.is_3d_lora_weight:
        raise InvalidField("is_3d_lora_weight", "is_3d_lora_weight: adapters of expert layers are not supported")
    if name in services.facts.names:
        raise InvalidField("lora_name", f"The lora adapter name '{name}' is the base's own; choose another.")
    if is_hidden(name):
        raise InvalidField("lora_name", f"The lora adapter name '{name}' is of the server's own kind; choose another.")
    check_may_load(name)
    source = permitted_source(services, record.lora_path)
    access = SourceAccess(ambient=current_key().admin)  # tenants fetch nothing with the operator's credentials
    try:
        with counting_adapters() as owner, services.on_demand.quota.loading(owner, name):
            version = await services.adapters.register(
                name,
                source,
                replace=_replaces(services, record),
                pinned=pinned,
                access=access,
                who=asking(),
                terms=LoadTerms(record.expected_version, record.retain, record.ttl, record.keep_alive),
            )
    except AdapterExists:
        if services.adapters.registry.get(name) is None:
            raise  # it is an alias
        raise AdapterExists(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True."
        ) from None
    logger.info("adapter %s loaded: %s", version.name, version.info.size)
    if services.prover is not None:
        services.prover.offer(version)
    return version


def _replaces(services: Services, record: LoadAdapterRequest) -> bool:
    """Say whether a name that is taken is replaced; by default never where a version is expected."""
    if record.load_inplace is not None:
        return record.load_inplace
    return services.facts.config.adapters.load_inplace and record.expected_version is None


async def unload(services: Services, record: UnloadAdapterRequest) -> None:
    """Take a name away. Raises ApiError, AdapterError, StateNotKept."""
    if not record.lora_name:
        raise InvalidField("lora_name", "'lora_name' needs to be provided to unload a LoRA adapter.")
    try:
        check_may_unload(record.lora_name)
        await services.adapters.unregister(record.lora_name, asking())
    except AdapterNotFound:
        raise AdapterNotFound(f"The lora adapter '{record.lora_name}' cannot be found.") from None
    logger.info("adapter %s unloaded", record.lora_name)


def _refuse(action: str, error: Exception) -> Response:
    known = to_adapter_route_error(error)
    if known.status == 500:  # a bug; others of the server's faults are known, and told in full
        logger.error("adapter %s failed", action, exc_info=error)
    else:
        logger.warning("adapter %s refused: %s", action, known.message)
    return error_response(known, both_shapes=True)
