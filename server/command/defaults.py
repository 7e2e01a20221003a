"""What is looked at before a server listens, once its adapters are known or on their way."""

from __future__ import annotations

from loraplex.server.api.errors import ApiError
from loraplex.server.api.services import Services
from loraplex.server.api.wish import read_text
from loraplex.server.startup import StartError


def check_default(services: Services, name: str | None) -> None:
    """Raise StartError unless every part of `--default-adapter` is here, on its way, refused, or an alias.

    A refused one answers with its reason until its files are right.
    """
    if name is None:
        return
    try:
        terms = read_text(services.facts.names, "--default-adapter", name, None)
    except ApiError as error:
        raise StartError(error) from error
    registry = services.adapters.registry
    there = {version.name for version in registry.list()} | set(registry.refused) | set(services.adapters.coming())
    there |= {alias.name for alias in services.aliases.all()}
    for term in terms:
        wanted = term.text.partition("@")[0]
        if wanted not in there:
            known = ", ".join(sorted(there)[:8]) or "none"
            raise StartError(
                f"--default-adapter {name}: there is no adapter or alias {wanted!r}, there is: {known}; name one of "
                "these, or load it with --adapter, --adapter-dir or --adapters-file"
            )
