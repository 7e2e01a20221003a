"""Adapters that are small text files, behind the real manager, state and copies: a server without a model."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry
from loraplex.adapters.sources.sources import find_folder
from loraplex.adapters.tiers.loader import LoadedContent, Loader
from loraplex.adapters.version import AdapterVersion
from loraplex.server.catalog.aliases import Aliases
from loraplex.server.catalog.copies import VersionCopies
from loraplex.server.catalog.expiry import Expiry
from loraplex.server.catalog.manager import AdapterManager
from loraplex.server.catalog.saved import LoadTerms, Remembering
from loraplex.server.catalog.state_store import StateStore
from loraplex.server.catalog.state_writer import StateWriter
from loraplex.server.catalog.versions import Versions

WEIGHTS = "adapter_model.safetensors"


def digest_of(text: str) -> str:
    """Of the adapter whose file holds `text`."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_adapter(folder: Path, text: str) -> Path:
    """Have `folder` hold the adapter `text`; "bad" is one that is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_text(text)
    return folder


def register_all(manager: AdapterManager, directory: Path) -> list[AdapterVersion]:
    """Register every folder of `directory` that has a config, as the reconciler does."""
    folders = sorted(path.parent for path in directory.glob("*/adapter_config.json"))
    return [version for folder in folders if (version := manager.register_unread(folder)) is not None]


class TextLoader:
    """Reads such adapters."""

    def examine(self, source: str) -> AdapterInfo:
        """Whatever the text."""
        return AdapterInfo(1, ("q_proj",), 1, len(self._text(source)))

    def load(self, source: str) -> Future[LoadedContent]:
        """As Loader.load."""
        done: Future[LoadedContent] = Future()
        try:
            text = self._text(source)
            if text == "bad":
                raise AdapterRefused("bad_file", f"{source} is bad")
            done.set_result(LoadedContent(AdapterInfo(1, ("q_proj",), 1, len(text), digest_of(text))))
        except Exception as error:
            done.set_exception(error)
        return done

    def _text(self, source: str) -> str:
        try:
            return (find_folder(source) / WEIGHTS).read_text()
        except FileNotFoundError:
            raise AdapterNotFound(f"there is no folder {source!r}") from None


class VersionWorld:
    """One process of a server that keeps its state in `folder`."""

    def __init__(self, folder: Path, now: float = 0.0, retained_bytes: int = 1 << 20) -> None:
        self.now = now
        self.registry = Registry()
        loader = TextLoader()
        self.manager = AdapterManager(self.registry, cast(Loader, loader), loader.examine)
        self.store = StateStore(folder)
        self.writer = StateWriter(self.store)
        self.copies = VersionCopies(folder / "versions", retained_bytes, find_folder)
        self.adapters = Remembering(
            self.manager, self.writer, Versions(self.writer), self.copies, clock=lambda: self.now
        )
        self.registry.on_drained = self.adapters.drained
        self.aliases = Aliases(self.adapters)
        self.expiry = Expiry(self.adapters)
        self.adapters.restore()

    def load(self, name: str, folder: Path, *, replace: bool = True, **terms: Any) -> AdapterVersion:
        """As POST /v1/load_lora_adapter."""
        return asyncio.run(self.adapters.register(name, str(folder), replace=replace, terms=LoadTerms(**terms)))

    def unload(self, name: str) -> None:
        """As POST /v1/unload_lora_adapter."""
        asyncio.run(self.adapters.unregister(name))

    def digest(self, name: str, wanted: str = "") -> str:
        """Of what a request for `name@wanted` would have."""
        with self.adapters.lookup.lease(name, wanted) as lease:
            assert lease.version.digest is not None
            return lease.version.digest

    def tick(self) -> None:
        """Have what is over at `now` go."""
        self.writer.submit(self.expiry.tick).result()

    def stop(self) -> None:
        """End the process."""
        self.writer.close()
        self.copies.close()
