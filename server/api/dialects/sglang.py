"""SGLang's routes: POST /generate (shared with LoRAX), those that load and unload adapters; llama.cpp's listing.

Both servers have a POST /generate. Who sends `inputs` means LoRAX's; who sends `text` or `input_ids`, SGLang's.
"""

from __future__ import annotations

import json
import logging

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loraplex.adapters.version import AdapterVersion
from loraplex.server.api.body import NAMES_BODY, body_schema, parse_record
from loraplex.server.api.catalog import shown_source, visible_adapters
from loraplex.server.api.dialects import lorax
from loraplex.server.api.dialects.adapters import load, unload
from loraplex.server.api.dialects.lorax_schemas import LoraxAnswer, LoraxRequest
from loraplex.server.api.dialects.sglang_generate import answer
from loraplex.server.api.dialects.sglang_schemas import SglangLoadRequest, SglangRequest, SglangTensorsRequest
from loraplex.server.api.dialects.sglang_tensors import load_tensors
from loraplex.server.api.errors import ApiError, ClientGone, to_adapter_route_error, to_api_error
from loraplex.server.api.manage import check_may_pin
from loraplex.server.api.openapi import (
    GENERATE,
    LORAX,
    MANAGE,
    READ,
    AdapterErrorAnswer,
    AdapterOutcome,
    ErrorAnswer,
    ListedAdapter,
    LoraxErrorAnswer,
    SglangAnswer,
    answers,
)
from loraplex.server.api.schemas import (
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from loraplex.server.api.services import Services
from loraplex.server.api.structure import check_structure
from loraplex.server.config import RequestLimits

logger = logging.getLogger(__name__)

FROM_TENSORS = "__tensor__"
"""SGLang's path of an adapter that has none."""

GENERATED = answers(
    SglangAnswer | list[SglangAnswer] | LoraxAnswer,
    streams=SglangAnswer,
    errors=(*GENERATE, *LORAX),
    error_shape=ErrorAnswer | LoraxErrorAnswer,
)
MANAGED = answers(AdapterOutcome, errors=MANAGE, error_shape=AdapterOutcome | AdapterErrorAnswer)


def make_router(services: Services) -> APIRouter:
    """The routes, working with `services`."""
    router = APIRouter()

    @router.post("/generate", openapi_extra=body_schema(SglangRequest, LoraxRequest), **GENERATED)
    async def generate(request: Request) -> Response:
        """SGLang's generation, or LoRAX's where the body has `inputs`."""
        record = await services.bodies.read_as(request, _read_either)
        if isinstance(record, SglangRequest):
            return await answer(services, request, record)
        return await lorax.answer(services, request, record, as_list=False, streams=False)

    @router.post("/load_lora_adapter", openapi_extra=body_schema(SglangLoadRequest), **MANAGED)
    async def load_lora_adapter(request: Request) -> Response:
        """Load an adapter, with SGLang's answers."""
        try:
            record = await services.bodies.read(request, SglangLoadRequest, NAMES_BODY)
            check_may_pin(record.pinned)
            options = LoadAdapterRequest(
                lora_name=record.lora_name, lora_path=record.lora_path, load_inplace=record.load_inplace
            )
            await load(services, options, pinned=bool(record.pinned))
        except ClientGone:
            raise
        except Exception as error:
            return _outcome(services, error)
        return _outcome(services)

    @router.post("/load_lora_adapter_from_tensors", openapi_extra=body_schema(SglangTensorsRequest), **MANAGED)
    async def load_lora_adapter_from_tensors(request: Request) -> Response:
        """Serve the adapter in the body: adapter_config.json as an object, and a safetensors file in base64."""
        try:
            await load_tensors(services, await services.bodies.read(request, SglangTensorsRequest))
        except ClientGone:
            raise
        except Exception as error:
            return _outcome(services, error)
        return _outcome(services)

    @router.post("/unload_lora_adapter", openapi_extra=body_schema(UnloadAdapterRequest), **MANAGED)
    async def unload_lora_adapter(request: Request) -> Response:
        """Take an adapter's name away, with SGLang's answers."""
        try:
            await unload(services, await services.bodies.read(request, UnloadAdapterRequest, NAMES_BODY))
        except ClientGone:
            raise
        except Exception as error:
            return _outcome(services, error)
        return _outcome(services)

    @router.get("/lora-adapters", **answers(list[ListedAdapter], errors=READ))
    async def list_lora_adapters() -> Response:
        """The adapters as llama.cpp lists its own; which one a request wears is the request's to say."""
        named = [(version.name, shown_source(services, version)) for version in visible_adapters(services)]
        return JSONResponse(
            [{"id": i, "name": name, "path": path, "scale": 0.0} for i, (name, path) in enumerate(named)]
        )

    return router


def _read_either(body: bytes, limits: RequestLimits) -> SglangRequest | LoraxRequest | ApiError:
    """What is wrong with one of LoRAX's is told in LoRAX's words: it is returned. Raises ApiError for SGLang's."""
    try:
        if b'"inputs"' in body:  # or else reading all of it twice would cost as much again
            check_structure(body, limits)
            if _is_lorax(body):
                return parse_record(body, LoraxRequest, limits)
    except ApiError as error:
        return error
    return parse_record(body, SglangRequest, limits)


def _is_lorax(body: bytes) -> bool:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # parse_record says what is wrong with it
        return False
    return isinstance(found, dict) and "inputs" in found


def _outcome(services: Services, error: Exception | None = None) -> Response:
    """SGLang's answer to loading and unloading: all adapters there are now."""
    loaded = {version.name: _entry(services, version) for version in visible_adapters(services)}
    if error is None:
        return JSONResponse({"success": True, "error_message": "", "loaded_adapters": loaded})
    known = to_adapter_route_error(error)
    if known.status == 500:
        logger.error("an adapter could not be loaded or unloaded", exc_info=error)
    code = to_api_error(error).code
    answer = {"success": False, "error_message": known.message, "loaded_adapters": loaded, "code": code}
    return JSONResponse(answer, status_code=known.status if known.status >= 500 else 400)


def _entry(services: Services, version: AdapterVersion) -> dict[str, str]:
    """One adapter in that answer; where something that came was written is nobody's business."""
    path = FROM_TENSORS if services.pushed.spool.owns(version.source) else version.origin
    return {"lora_id": str(version.uid), "lora_name": version.name, "lora_path": path}
