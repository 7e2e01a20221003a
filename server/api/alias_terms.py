"""Aliases in what a request asks for: each is replaced by what it stands for, for this request."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from loraplex.server.api.errors import InvalidField
from loraplex.server.api.schemas import MAX_TERMS, AdapterFields
from loraplex.server.api.services import Services
from loraplex.server.api.wish import Term
from loraplex.server.catalog.alias_reach import MAX_DEPTH
from loraplex.server.catalog.aliases import Alias
from loraplex.server.telemetry.request_context import current_request_context
from loraplex.server.tenancy.tenants import Key, current_key


def sticky_of(record: AdapterFields) -> str:
    """Return what keeps a user's requests together: the header x-loraplex-sticky, else `user`, else a random text."""
    context = current_request_context()
    given = (context.sticky if context is not None else "") or getattr(record, "user", None)
    return f"{current_key().tenant}\0{given}" if given else secrets.token_hex(16)


def expand(services: Services, terms: Sequence[Term], sticky: str) -> tuple[Term, ...]:
    """Put what aliases stand for in place of aliases in `terms`. Raises InvalidField for a mix of too many.

    What the caller may not use stays as it is: it is told as a name that nobody has.
    """
    every = (each for term in terms for each in _expanded(services, term, sticky, MAX_DEPTH))
    found = tuple(islice(every, MAX_TERMS + 1))
    if len(found) > MAX_TERMS:
        param = found[0].param
        raise InvalidField(param, f"{param}: found a mix of more than {MAX_TERMS} adapters, the most possible")
    return found


def may_use_alias(services: Services, key: Key, alias: Alias) -> bool:
    """Tell whether the key may use the alias and all that it stands for."""
    return key.may_use(alias.name) and all(
        key.may_use(name.partition("@")[0]) for name in services.aliases.reached(alias)
    )


def _expanded(services: Services, term: Term, sticky: str, depth: int) -> Iterator[Term]:
    alias = services.aliases.get(term.text) if depth and term.origin is None else None
    if alias is None or not may_use_alias(services, current_key(), alias):
        yield term
        return
    for each in services.aliases.choose(alias, sticky):
        inner = replace(term, text=each.name, weight=term.weight * each.weight, alias=term.asked)
        yield from _expanded(services, inner, sticky, depth - 1)
