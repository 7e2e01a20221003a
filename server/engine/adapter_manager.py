"""Adapters by name, as the API manages them: load in the background, then register. Free of torch."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from loraplex.adapters.errors import AdapterError, AdapterExists, AdapterRefused
from loraplex.adapters.loader import Loader
from loraplex.adapters.registry import AdapterVersion, Registry, check_name

logger = logging.getLogger(__name__)


class AdapterManager:
    """What the API calls to add, replace and remove adapters."""

    def __init__(self, registry: Registry, loader: Loader, max_pages: int) -> None:
        """max_pages: what an adapter may take so that one sequence still fits beside it."""
        self.registry = registry
        self._loader = loader
        self._max_pages = max_pages

    async def register(self, name: str, source: str, *, replace: bool = False) -> AdapterVersion:
        """Read `source` (local folder or Hub id) in the background and give it `name`.

        Raises InvalidAdapterName, AdapterExists (name taken and not `replace`), AdapterNotFound (no such folder or
        repository), AdapterRefused (damaged, for another base, unsupported, too large for this server's memory).
        Nothing is registered when it raises.
        """
        check_name(name)
        if not replace:
            self._check_free(name)  # before minutes of download; register() below decides
        loaded = await asyncio.wrap_future(self._loader.load(source))
        if loaded.num_pages > self._max_pages:
            raise AdapterRefused(
                "too_large",
                f"adapter {source!r} takes {loaded.num_pages} pages, but only {self._max_pages} can be had beside one "
                "sequence; give the server more memory (--memory)",
            )
        return self.registry.register(
            name,
            digest=loaded.digest,
            source=source,
            rank=loaded.rank,
            targets=loaded.targets,
            num_pages=loaded.num_pages,
            nbytes=loaded.nbytes,
            replace=replace,
        )

    async def register_folder(self, directory: Path) -> tuple[AdapterVersion, ...]:
        """Register every sub-folder that holds an adapter_config.json under its folder's name.

        A refused one is kept in registry.refused (its name then answers with the reason) and the others go on; a name
        that is taken already, or cannot be one, is logged and left out. Raises OSError if `directory` cannot be listed.
        """
        versions = []
        for folder in sorted(path.parent for path in directory.glob("*/adapter_config.json")):
            try:
                versions.append(await self.register(folder.name, str(folder)))
            except AdapterRefused as error:
                logger.warning("adapter %r is refused: %s", folder.name, error)
                self.registry.mark_refused(folder.name, error)
            except AdapterError as error:
                logger.warning("adapter folder %s is left out: %s", folder, error)
        return tuple(versions)

    def unregister(self, name: str) -> AdapterVersion:
        """Take the name away at once; requests that hold a lease finish. Raises AdapterNotFound."""
        return self.registry.unregister(name)

    def close(self) -> None:
        """Stop the loader's threads."""
        self._loader.shutdown()

    def _check_free(self, name: str) -> None:
        taken = self.registry.get(name)
        if taken is not None:
            raise AdapterExists(
                f"adapter {name!r} is already loaded, from {taken.source!r}; unload it first, or ask to replace it"
            )
