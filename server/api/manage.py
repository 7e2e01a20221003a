"""Who may manage which adapters, and from where: asked by every route that loads or unloads one."""

from __future__ import annotations

from pathlib import Path

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused
from loraplex.adapters.sources import parse_source
from loraplex.server.api.errors import ApiError
from loraplex.server.api.parts import Parts
from loraplex.server.tenants import current_key


def check_may_load(name: str) -> None:
    """Raises ApiError (403) unless the caller may give an adapter this name, whether or not there is one."""
    key = current_key()
    if not key.may_manage(name):
        raise ApiError(
            403,
            f"this key may not manage the adapter '{name[:200]}'; it may manage those whose names begin with "
            f"'{key.tenant}/'",
            type="permission_error",
            code="forbidden",
        )


def check_may_unload(name: str) -> None:
    """The same for taking it away. Raises AdapterNotFound for names that the caller may not even know."""
    key = current_key()
    if not key.may_manage(name):
        if not key.may_use(name):
            raise AdapterNotFound(f"no adapter {name[:200]!r} is loaded")
        check_may_load(name)


def check_source(parts: Parts, source: str) -> None:
    """Raises AdapterRefused for a local folder outside of those that requests may name.

    What is outside cannot be told from what is not there. Links are followed before looking.
    """
    if parts.local_sources is None:
        return
    try:
        found = parse_source(source)
        if found.is_remote:
            return
        real = Path(found.place).expanduser().resolve()
        inside = any(real.is_relative_to(folder.expanduser().resolve()) for folder in parts.local_sources)
    except (OSError, RuntimeError):  # a loop of links, no such user
        inside = False
    if not inside:
        raise AdapterRefused(
            "forbidden",
            f"adapters are not read from {source[:200]!r} here: only from under --adapter-dir and --allowed-path",
        )
