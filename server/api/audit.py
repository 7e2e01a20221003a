"""GET /v1/audit: the audit log, for admins."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query

from loraplex.server.api.answer_schemas import AuditLine, AuditPage
from loraplex.server.api.errors import ApiError
from loraplex.server.api.openapi import failures
from loraplex.server.api.services import Services
from loraplex.server.proof.audit_reading import AuditBroken, page
from loraplex.server.tenancy.tenants import current_key

MAX_LINES = 1000
"""Of a page."""


def make_router(services: Services) -> APIRouter:
    """Make the route, working with `services`."""
    router = APIRouter()

    @router.get("/v1/audit", responses=failures((400, 401, 403, 404, 500)))
    async def read_audit(
        after: Annotated[int, Query(ge=0, le=1 << 53)] = 0, limit: Annotated[int, Query(ge=1, le=MAX_LINES)] = 100
    ) -> AuditPage:
        """Lines of the log with greater numbers than `after`, and the log's head, to be kept elsewhere."""
        if not current_key().admin:
            raise ApiError(403, "the audit log is for admins", type="permission_error", code="forbidden")
        if services.audit is None:
            raise ApiError(404, "there is no audit log: this server has no --state-dir", code="not_found")
        log, head = services.audit, services.audit.head
        try:
            found = await asyncio.to_thread(page, log.folder, after, limit)
        except (AuditBroken, OSError) as error:
            raise ApiError(500, f"the audit log cannot be read: {error}", code="audit_broken") from error
        lines = [AuditLine.model_validate(line) for line in found]
        more = bool(lines) and lines[-1].number < head.number
        return AuditPage(data=lines, has_more=more, head_number=head.number, head_hash=head.hash)

    return router
