"""Who may ask a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, ClassVar

from typer import Option

from loraplex.server.options import ConfigError


@dataclass(frozen=True)
class AuthConfig:
    """Who may ask. The keys in `api_key_file` are not read here: see command/keys.py."""

    PANEL: ClassVar = "Who may ask"

    keys_file: Annotated[
        Path | None,
        Option(
            "--api-keys",
            metavar="FILE",
            help="Keys, their tenants, adapters and limits; followed. See [b]loraplex keys new[/b].",
        ),
    ] = None
    api_keys: Annotated[
        tuple[str, ...],
        Option(
            "--api-key",
            metavar="KEY",
            envvar=["LORAPLEX_API_KEY", "VLLM_API_KEY"],
            help="A key that may do everything; may be given again. Others see command lines: better the next, or a "
            "variable.",
        ),
    ] = field(default=(), repr=False)
    api_key_file: Annotated[
        Path | None, Option(metavar="FILE", help="The same from a file, one a line; read once.")
    ] = None
    no_auth: Annotated[
        bool, Option("--no-auth", help="Listen on an address that other machines reach, and ask nobody for a key.")
    ] = False
    open_metrics: Annotated[
        bool, Option("--open-metrics", help="/metrics needs no key, though there is a keys file.")
    ] = False
    allowed_paths: Annotated[
        tuple[Path, ...],
        Option(
            "--allowed-path",
            metavar="DIR",
            help="With a keys file: requests may load adapters from here; may be given again.",
        ),
    ] = ()
    cors_origins: Annotated[
        tuple[str, ...],
        Option(
            "--cors-origin",
            metavar="ORIGIN",
            help="Web pages from here may ask (https://example.org, or * for all); may be given again.",
        ),
    ] = ()

    @property
    def asks_for_keys(self) -> bool:
        return self.keys_file is not None or bool(self.api_keys)

    def check(self, address: str) -> None:
        """`address` is the one bound. Raises ConfigError for settings that contradict, and for a server open to all."""
        if self.keys_file is not None and self.api_keys:
            raise ConfigError(
                "--api-key (or its file, LORAPLEX_API_KEY, VLLM_API_KEY) and --api-keys: give one of them; a key that "
                "may do everything is an admin's"
            )
        if self.no_auth and self.asks_for_keys:
            raise ConfigError("--no-auth: there are keys; leave it or them out")
        if any(not key.strip() for key in self.api_keys):
            raise ConfigError("--api-key: it is empty")
        if self.asks_for_keys or self.no_auth or ip_address(address).is_loopback:
            return
        raise ConfigError(
            f"--host {address}: other machines could use this server without a key; give --api-keys FILE or "
            "--api-key-file FILE, or --no-auth where everybody may do everything"
        )
