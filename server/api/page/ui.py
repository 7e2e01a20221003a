"""The page at /ui and what it asks for. Its files are open to all and hold nothing; what it shows comes with a key.

No file is built or fetched from elsewhere: what lies in static/ is what browsers get, and the policy that comes with
it lets the page talk to this server alone and makes every sink for HTML throw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from loraplex.server.api.page.overview import View, overview
from loraplex.server.api.services import Services

FOLDER = Path(__file__).with_name("static")

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

POLICY = "; ".join(
    (
        "default-src 'self'",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for each time, and answered with 304 while it is the same
}


def make_router(services: Services) -> APIRouter:
    """The routes, working with `services`. Raises OSError where the files are not there."""
    router = APIRouter()
    for path, file in page_files().items():
        router.add_api_route(path, _sender(file), methods=["GET", "HEAD"], include_in_schema=False)

    @router.get("/ui/overview", include_in_schema=False)  # the page's own: it changes with the page
    async def show_overview(request: Request) -> Response:
        """What the page shows: adapters, pages, the last minute. Query: filter, level, sort, order, offset, limit."""
        found = overview(services, View.read(request.query_params))
        return Response(found, media_type="application/json", headers={"Cache-Control": "no-store"})

    return router


def page_files() -> dict[str, Path]:
    """Path in a URL -> file. The page itself is /ui, so that it finds the others behind proxies that add a prefix."""
    files = {f"/ui/{file.name}": file for file in sorted(FOLDER.iterdir()) if file.suffix in KINDS}
    return {"/ui": files.pop("/ui/index.html"), **files}


def _sender(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    headers = {**HEADERS, "ETag": tag}
    kind = f"{KINDS[file.suffix]}; charset=utf-8"

    async def send(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")[:1024]  # 64 KiB of commas would take 15 ms
        if known == "*" or tag in (each.strip().removeprefix("W/") for each in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return send
