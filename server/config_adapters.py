"""Which adapters a server has, and what downloading them may take."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from typer import Option

from loraplex.adapters.sources.addresses import Reach
from loraplex.adapters.sources.downloads import DownloadLimits
from loraplex.server.options import ConfigError, size


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter to load at the start; if it is a folder and cannot be loaded, the server does not start."""

    name: str
    source: str  # see adapters/sources/sources.py

    @classmethod
    def parse(cls, text: str) -> NamedAdapter:
        """Read "NAME=PATH". Raises ConfigError."""
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise ConfigError(f"--adapter {text!r}: expected NAME=PATH, as in pirate=adapters/pirate")
        return cls(name, source)

    @classmethod
    def parse_module(cls, text: str) -> NamedAdapter:
        """Read a value of vLLM's --lora-modules: "NAME=PATH", or JSON with name and path. Raises ConfigError."""
        found: dict[str, object] = {}
        if text.lstrip().startswith("{"):
            try:
                found = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"--lora-modules {text!r}: not valid JSON: {error}") from None
        else:
            found["name"], _, found["path"] = text.partition("=")
        name, path = found.get("name"), found.get("path")
        if not (isinstance(name, str) and name and isinstance(path, str) and path):
            raise ConfigError(
                f'--lora-modules {text!r}: expected NAME=PATH or {{"name": NAME, "path": PATH}}, as in '
                "pirate=adapters/pirate"
            )
        return cls(name, path)


@dataclass(frozen=True)
class DownloadConfig:
    """What downloads may take. Raises ConfigError for a host that is none."""

    PANEL: ClassVar = "Downloads"

    folder: Annotated[
        Path | None,
        Option(
            "--download-dir",
            metavar="DIR",
            show_default="below ~/.cache/loraplex",
            help="Where downloaded adapters are kept.",
        ),
    ] = None
    cache_bytes: Annotated[
        int,
        Option("--download-cache", parser=size, metavar="SIZE", show_default="64G", help="Of all that is kept there."),
    ] = DownloadLimits.cache_bytes
    max_bytes: Annotated[
        int,
        Option(
            "--max-adapter-size",
            parser=size,
            metavar="SIZE",
            show_default="4G",
            help="Of one that is downloaded or pushed.",
        ),
    ] = DownloadLimits.max_bytes
    max_seconds: Annotated[
        float, Option("--download-timeout", metavar="S", min=1, help="Seconds that one may take.")
    ] = DownloadLimits.max_seconds
    allowed_hosts: Annotated[
        tuple[str, ...],
        Option(
            "--allow-host",
            metavar="HOST",
            help="A private host to download from: name, *.name, address or network; may be given again.",
        ),
    ] = ()
    stall_seconds: float = DownloadLimits.stall_seconds

    def __post_init__(self) -> None:
        try:
            Reach(self.allowed_hosts)
        except ValueError as error:
            raise ConfigError(f"--allow-host: {error}") from None

    @property
    def limits(self) -> DownloadLimits:
        """Of one download, and of all that is kept."""
        return DownloadLimits(self.max_bytes, self.max_seconds, self.cache_bytes, self.stall_seconds)


@dataclass(frozen=True)
class AdaptersConfig:
    """Which adapters there shall be."""

    PANEL: ClassVar = "Adapters"

    adapters: Annotated[
        tuple[str, ...],
        Option(
            "--adapter",
            metavar="NAME=SOURCE",
            help="An adapter: a folder, org/name on the Hub, s3://, gs:// or https://; may be given again.",
        ),
    ] = ()
    lora_modules: Annotated[
        tuple[str, ...], Option(metavar="NAME=PATH ...", help="The same in vLLM's words, or as its JSON.")
    ] = ()
    directory: Annotated[
        Path | None,
        Option(
            "--adapter-dir",
            metavar="DIR",
            help="Every adapter folder in DIR, by its name; followed. One that cannot be served is left out.",
        ),
    ] = None
    list_file: Annotated[  # see catalog/adapter_list.py
        Path | None,
        Option(
            "--adapters-file",
            metavar="FILE",
            help="A list of the adapters that shall be there (ensurePresent, ensureAbsent); followed.",
        ),
    ] = None
    default_adapter: Annotated[
        str | None,
        Option(metavar="NAME", help="What requests wear that name none, or only the base; or an alias."),
    ] = None
    require_adapter: Annotated[
        bool, Option("--require-adapter", help="Refuse requests that name no adapter, or only the base.")
    ] = False
    load_inplace: Annotated[
        bool,
        Option(
            "--load-inplace",
            help="A load of a name that is taken replaces it, unless it says load_inplace or expected_version itself.",
        ),
    ] = False
    retain: Annotated[
        int,
        Option(
            metavar="N",
            min=0,
            help="Versions of an adapter loaded over the API that stay beside the one its name has, in copies.",
        ),
    ] = 0
    retained_bytes: Annotated[
        int, Option(parser=size, metavar="SIZE", show_default="16G", help="Of all such copies, below --state-dir.")
    ] = 16 << 30
    pushed_bytes: Annotated[
        int,
        Option(parser=size, metavar="SIZE", show_default="16G", help="On disk, of all adapters that clients push."),
    ] = 16 << 30
    allow_noop: Annotated[
        bool, Option("--allow-noop", help="Serve adapters that change nothing, which are refused otherwise.")
    ] = False
    downloads: DownloadConfig = field(default_factory=DownloadConfig)

    @property
    def named(self) -> tuple[NamedAdapter, ...]:
        """Those to load at the start. Raises ConfigError."""
        return (*map(NamedAdapter.parse, self.adapters), *map(NamedAdapter.parse_module, self.lora_modules))

    def check(self, taken: Iterable[str]) -> None:
        """Raises ConfigError where names collide, with each other or the base's, or the directory is none."""
        taken = tuple(taken)
        seen = set(taken)
        for adapter in self.named:
            if adapter.name in seen:
                owner = "the base's" if adapter.name in taken else "given twice"
                raise ConfigError(f"--adapter {adapter.name}={adapter.source}: the name is {owner}; choose another")
            seen.add(adapter.name)
        if self.directory is not None and not self.directory.is_dir():
            raise ConfigError(f"--adapter-dir {self.directory}: there is no such folder")
        if self.list_file is not None and not self.list_file.is_file():
            raise ConfigError(f"--adapters-file {self.list_file}: there is no such file")
