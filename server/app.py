"""The HTTP application: routes and error answers around the parts it is given."""

from __future__ import annotations

from fastapi import FastAPI

from loraplex.server.api import adapters, chat, completions, errors, models, ops
from loraplex.server.api.parts import Parts
from loraplex.server.version import version


def create_app(parts: Parts) -> FastAPI:
    """An application for one server. `parts` are used as they are: starting and stopping them is the caller's."""
    app = FastAPI(title="loraplex", version=version(), docs_url=None, redoc_url=None)
    errors.install(app)
    for resource in (chat, completions, models, adapters, ops):
        app.include_router(resource.make_router(parts))
    return app
