"""Who may manage which adapters, and from where: asked by every route that loads or unloads one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused
from loraplex.adapters.sources.sources import is_hub_id, parse_source
from loraplex.server.api.errors import ApiError, InvalidField
from loraplex.server.api.services import Services
from loraplex.server.catalog.pushed import PushOwner
from loraplex.server.catalog.quota import QuotaOwner, TooManyAdapters
from loraplex.server.catalog.version_records import Who
from loraplex.server.tenancy.rate_limits import RateLimited
from loraplex.server.tenancy.tenants import current_caller, current_key


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


def check_may_pin(pinned: bool | None) -> None:
    """Raises InvalidField where an adapter is to be pinned and the caller is not an admin."""
    if pinned and not current_key().admin:
        raise InvalidField("pinned", "pinned: it takes memory from everybody, so only an admin's key may pin")


def asking() -> Who:
    """Say whose request it is, for what is kept of a change."""
    key = current_key()
    return Who(key.name, key.tenant)


class AllPlacesTaken(RateLimited):
    """A tenant has loaded as many adapters as it may: no waiting helps."""

    def hint(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


@contextmanager
def counting_adapters() -> Iterator[QuotaOwner | None]:
    """Who has what is loaded or merged in the block; None: an admin, or anybody on a server without keys.

    Too many are a limit of the key like the others: 429, counted with them. Raises RateLimited.
    """
    caller = current_caller()
    with caller.counted():
        try:
            yield None if caller.key.admin else QuotaOwner(caller.key.tenant, caller.key.max_adapters)
        except TooManyAdapters as error:
            kind = RateLimited if error.passes else AllPlacesTaken
            raise kind(str(error), error.retry_after, "adapters") from None


def push_owner() -> PushOwner:
    """Whose an adapter is that the current caller pushes."""
    key = current_key()
    if key.admin:
        return PushOwner(key.tenant)
    return PushOwner(key.tenant, key.max_adapters, key.max_pushed_bytes)


def permitted_source(services: Services, source: str) -> str:
    """`source`, as it may be loaded for the caller. Raises AdapterRefused for a local folder that is not for requests.

    That are those outside of --allowed-path and --adapter-dir, and those of the latter whose name the caller may not
    use: by its path an adapter is no more the caller's than by its name. What is forbidden cannot be told from what is
    not there. Links are followed before looking, and out of nothing that was looked at (adapters/files/beneath.py).
    """
    if services.local_sources is None:
        return source
    try:
        found = parse_source(source)
        permitted = source if found.is_remote else services.local_sources.permit(found.place)
        if permitted is not None:
            return permitted
    except (OSError, RuntimeError):  # a loop of links, no such user
        pass
    if is_hub_id(source):  # as where there is no folder of that name
        return f"hf://{source}"
    raise AdapterRefused(
        "forbidden",
        f"adapters are not read from {source[:200]!r} here: only from under --allowed-path, and what this key may use "
        "of --adapter-dir",
    )
