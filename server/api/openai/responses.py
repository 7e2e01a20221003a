"""/v1/responses: create (whole, streamed, in the background), get, delete, cancel, and the items that went in."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loraplex.server.api.body import body_schema
from loraplex.server.api.errors import ApiError, UnsupportedField
from loraplex.server.api.fields import check_unknown, ignored_header
from loraplex.server.api.openai.response_store import ResponseStore, StoredResponse
from loraplex.server.api.openai.response_work import ResponseWork
from loraplex.server.api.openai.responses_schemas import ItemList, ResponseObject, ResponsesRequest, no_such_response
from loraplex.server.api.openapi import ResponseDeleted, answers, failures
from loraplex.server.api.services import Services
from loraplex.server.api.sse import SseResponse, answer_or_disconnect


def make_router(services: Services) -> APIRouter:
    """The routes, working with `services`; the responses they keep are this router's own."""
    router = APIRouter()
    store = ResponseStore()

    told = answers(ResponseObject, streams=dict[str, Any])

    @router.post("/v1/responses", openapi_extra=body_schema(ResponsesRequest), **told)
    async def create_response(request: Request) -> Response:
        """Answer a conversation, given whole or as what follows an earlier response."""
        record = await services.bodies.read(request, ResponsesRequest)
        headers = ignored_header(_ignored(record))
        work = ResponseWork.begin(services, store, record)
        if record.background:
            return JSONResponse(work.in_background(), headers=headers)
        if record.stream:
            return SseResponse(
                work.stream(), headers, done=False, named=True, keep_alive=services.facts.config.http.sse_keep_alive
            )
        await answer_or_disconnect(request, work.run())
        return Response(work.response.model_dump_json(), media_type="application/json", headers=headers)

    @router.get("/v1/responses/{response_id}", **answers(ResponseObject, errors=(400, 401, 404)))
    async def get_response(response_id: str, stream: bool = False) -> Response:
        """A stored response, as far as it is."""
        if stream:
            raise UnsupportedField("stream", "'stream' is not supported here: a stream is sent once, when it is made.")
        return JSONResponse(_find(store, response_id).response.model_dump())

    @router.delete("/v1/responses/{response_id}", **answers(ResponseDeleted, errors=(401, 404)))
    async def delete_response(response_id: str) -> Response:
        """Forget a response; one at work is cancelled."""
        stored = _find(store, response_id)
        await _cancel(stored)
        store.pop(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @router.post("/v1/responses/{response_id}/cancel", **answers(ResponseObject, errors=(400, 401, 404)))
    async def cancel_response(response_id: str) -> Response:
        """Stop the work on a response in the background; one that has ended stays as it is."""
        stored = _find(store, response_id)
        if not stored.response.background:
            raise ApiError(400, "only responses made with background: true can be cancelled", param="response_id")
        await _cancel(stored)
        return JSONResponse(stored.response.model_dump())

    @router.get("/v1/responses/{response_id}/input_items", responses=failures((401, 404)))
    async def list_input_items(response_id: str) -> ItemList:
        """What was said to it, the latest first."""
        items = _find(store, response_id).items[::-1]
        first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
        return ItemList(data=items, first_id=first, last_id=last)

    return router


def _find(store: ResponseStore, response_id: str) -> StoredResponse:
    stored = store.get(response_id)
    if stored is None:
        raise no_such_response(response_id)
    return stored


async def _cancel(stored: StoredResponse) -> None:
    if stored.task is not None:
        stored.task.cancel()
        await asyncio.wait((stored.task,))


def _ignored(record: ResponsesRequest) -> list[str]:
    unknown = dict(record.model_extra or {})
    for name, why in (("conversation", "use previous_response_id"), ("prompt", "send the prompt's text as input")):
        if unknown.pop(name, None) is not None:
            raise UnsupportedField(name, f"{name!r} is not supported: {why}.")
    ignored = check_unknown(unknown)
    if record.stream_options is not None:
        ignored += [f"stream_options.{name}" for name in record.stream_options.model_extra or {}]
    for name, part in (("text", record.text), ("reasoning", record.reasoning)):
        ignored += [f"{name}.{key}" for key in (part.model_extra or {} if part is not None else {})]
    return ignored
