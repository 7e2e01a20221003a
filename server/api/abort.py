"""POST /abort_request, SGLang's: end an answer that is being generated, by the id that its client knows it by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loraplex.server.api.body import NAMES_BODY, body_schema
from loraplex.server.api.errors import InvalidField
from loraplex.server.api.openapi import CHANGE, Aborted, answers
from loraplex.server.api.schemas import AbortRequest
from loraplex.server.tenancy.tenants import current_key

if TYPE_CHECKING:
    from loraplex.server.api.services import Services

KEY_LENGTH = 32
"""Of the part that is an answer's own, at the end of every id this server gives: chatcmpl-..., cmpl-..., resp_..."""


class OpenAnswers:
    """Who can be aborted, by id. Loop thread only."""

    def __init__(self) -> None:
        # By tenant and id; clients may give several answers one id
        self._aborts: dict[tuple[str, str], list[Callable[[], None]]] = {}

    @contextmanager
    def known_as(self, tenant: str, ids: Iterable[str], abort: Callable[[], None]) -> Iterator[None]:
        """While the answer is generated. Only `tenant` can abort it."""
        names = tuple((tenant, each) for each in dict.fromkeys(ids))
        for name in names:
            self._aborts.setdefault(name, []).append(abort)
        try:
            yield
        finally:
            for name in names:
                self._aborts[name].remove(abort)
                if not self._aborts[name]:
                    del self._aborts[name]

    def abort_all(self) -> None:
        """End everybody's answers."""
        for abort in {abort: None for aborts in self._aborts.values() for abort in aborts}:
            abort()

    def abort(self, tenant: str, name: str) -> int:
        """End all answers of `tenant` known as `name`. Returns how many."""
        aborts = tuple(self._aborts.get((tenant, name), ()) or self._aborts.get((tenant, name[-KEY_LENGTH:]), ()))
        for abort in aborts:
            abort()
        return len(aborts)


def make_router(services: Services) -> APIRouter:
    """The route, working with `services`."""
    router = APIRouter()

    @router.post("/abort_request", openapi_extra=body_schema(AbortRequest), **answers(Aborted, errors=CHANGE))
    async def abort_request(request: Request) -> Response:
        """End the answers of this id, finish_reason "abort". Also 200 when there is none: it may just have ended."""
        record = await services.bodies.read(request, AbortRequest, NAMES_BODY)
        if record.abort_all:
            raise InvalidField("abort_all", "abort_all: other clients' answers cannot be aborted; give an id in 'rid'")
        return JSONResponse({"aborted": services.open_answers.abort(current_key().tenant, record.rid)})

    return router
