"""A whole engine below the API, over a base on disk: what was left in order when it stops is looked at."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from loraplex.server.command.build import EngineParts, build_engine
from loraplex.server.config_engine import EngineConfig


@asynccontextmanager
async def whole_engine(
    base: Path,
    config: EngineConfig,
    adapters: Mapping[str, Path] | None = None,
    before: Callable[[EngineParts], object] = lambda parts: None,
    *,
    allow_noop: bool = False,
) -> AsyncIterator[EngineParts]:
    """Started, with adapters registered by name. before: what is done to it before it starts."""
    parts = build_engine(config, base, "base", allow_noop=allow_noop)
    before(parts)
    parts.engine.start()
    try:
        for name, folder in (adapters or {}).items():
            await parts.adapters.register(name, str(folder))
        yield parts
    finally:
        parts.engine.stop()
        parts.adapters.close()
    parts.engine._scheduler.check_integrity()
    assert parts.engine.failure is None
