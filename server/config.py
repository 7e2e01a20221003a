"""What a server is told when it starts: frozen, composed, read once. Dataclasses refuse keys they do not know."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing it loads torch, which the command line does only once all else is checked
    from loraplex.server.engine.build import EngineConfig

DEMO = "demo"
"""The base that comes with the project."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class ConfigError(ValueError):
    """A value that cannot be; the message is one line and names it."""


@dataclass(frozen=True)
class HttpConfig:
    """Where to listen and what to take."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    max_body_bytes: int = 16 << 20
    shutdown_seconds: int = 10  # that answers in flight get to end once the server is told to stop


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter to load at the start; if it cannot be, the server does not start."""

    name: str
    source: str  # folder or Hub id

    @classmethod
    def parse(cls, text: str) -> NamedAdapter:
        """Of "NAME=PATH". Raises ConfigError."""
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise ConfigError(f"--adapter {text!r}: expected NAME=PATH, as in pirate=adapters/pirate")
        return cls(name, source)


@dataclass(frozen=True)
class AdaptersConfig:
    """Which adapters to load at the start."""

    named: tuple[NamedAdapter, ...] = ()
    directory: Path | None = None  # each folder in it that is an adapter; those that cannot be served are left out

    def check(self, taken: tuple[str, ...]) -> None:
        """Raises ConfigError where names collide, with each other or the base's, or the directory is none."""
        seen = set(taken)
        for adapter in self.named:
            if adapter.name in seen:
                owner = "the base's" if adapter.name in taken else "given twice"
                raise ConfigError(f"--adapter {adapter.name}={adapter.source}: the name is {owner}; choose another")
            seen.add(adapter.name)
        if self.directory is not None and not self.directory.is_dir():
            raise ConfigError(f"--adapter-dir {self.directory}: there is no such folder")


@dataclass(frozen=True)
class ServeConfig:
    """Everything about one server."""

    base: str  # "demo", a folder, or a Hub id
    base_names: tuple[str, ...]  # what the field `model` calls it, at least one
    engine: EngineConfig
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    http: HttpConfig = field(default_factory=HttpConfig)


def base_names(base: str, served: Iterable[str]) -> tuple[str, ...]:
    """What requests call the base: `served`, or else a folder by its last part and a Hub id by itself."""
    path = Path(base).expanduser()
    return tuple(served) or (path.resolve().name if path.is_dir() and base != DEMO else base,)


def parse_size(text: str) -> int:
    """Bytes of "512M", "4G", "1.5GiB", "1000000". Raises ConfigError."""
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * 1024 ** _UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise ConfigError(f"{text!r} is no size: expected bytes, or a number with K, M, G or T, as in 4G")
    return size
