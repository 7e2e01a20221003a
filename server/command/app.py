"""The HTTP application: routes and error answers around the services it is given."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from loraplex.server.api import abort, aliases, audit, errors, fleet, openapi, ops, push, rollout
from loraplex.server.api.auth import KeyMiddleware
from loraplex.server.api.dialects import adapters, lorax, sglang, tokenize
from loraplex.server.api.gate import Gate
from loraplex.server.api.head import HeadMiddleware
from loraplex.server.api.observe import ObserveMiddleware
from loraplex.server.api.openai import chat, completions, embeddings, models, responses
from loraplex.server.api.page import ui
from loraplex.server.api.services import Services
from loraplex.server.version import version


def create_app(services: Services) -> FastAPI:
    """An application for one server. `services` are used as they are: starting and stopping them is the caller's."""
    app = FastAPI(title="loraplex", version=version(), docs_url=None, redoc_url=None)
    errors.install(app)
    openapi.install(app)
    app.add_middleware(HeadMiddleware)
    if services.access is not None:
        app.add_middleware(KeyMiddleware, access=services.access)
        services.metrics.add(services.access.collector())
    origins = services.facts.config.auth.cors_origins
    cors: dict[str, Any] = {}
    if origins:  # around the keys: a browser's preflight has none
        cors = {"allow_origins": origins, "allow_methods": ["*"], "allow_headers": ["*"], "max_age": 600}
        app.add_middleware(CORSMiddleware, **cors)
    app.add_middleware(ObserveMiddleware, tracing=services.tracing)  # around all others: whatever happens has its line
    app.state.gate = Gate(services.access, partial(CORSMiddleware, **cors) if cors else None)
    services.metrics.add(app.state.gate.collector())
    for resource in (  # in this order they are asked whose a request is
        ops,
        chat,
        completions,
        responses,
        embeddings,
        tokenize,
        aliases,
        models,
        push,
        adapters,
        lorax,
        sglang,
        rollout,
        fleet,
        audit,
        abort,
        ui,
    ):
        app.include_router(resource.make_router(services))
    return app
