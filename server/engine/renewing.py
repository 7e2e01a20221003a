"""A request for other versions of its adapters: those that their names point at by now."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from enum import Enum

from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.version import AdapterLease
from loraplex.server.engine.request import GenerationRequest


class Renewal(Enum):
    """How open requests go on under other versions: what becomes of the keys and values computed so far."""

    RECOMPUTE = "recompute"  # the new version computes them again
    KEEP = "keep"  # they stay, as the old one has computed them


def renewed(request: GenerationRequest) -> GenerationRequest | None:
    """Make `request` one for what its adapters' names point at by now, with leases of its own.

    None where that is what it has, and where it cannot go on there: the new version writes texts otherwise, or stands
    in for other parts of the base. What was asked for by its digest or a label stays in any case.
    """
    with ExitStack() as held:
        mix: list[tuple[AdapterLease, float]] = []
        changed = False
        for old, weight in request.mix:
            new = old.renew()
            changed = changed or new is not None
            mix.append((held.enter_context(old.share() if new is None else new), weight))
            if not _follows(old.version.info, mix[-1][0].version.info):
                return None
        if not changed:
            return None
        held.pop_all()
    return replace(request, mix=tuple(mix))


def _follows(old: AdapterInfo, new: AdapterInfo) -> bool:
    """Whether an answer that `old` began can be ended by `new`: ids mean the same, and stand at the same positions."""
    fronts = [info.front.tokens if info.front is not None else 0 for info in (old, new)]
    return fronts[0] == fronts[1] and (old.tokenizer, old.tokens, old.alone) == (new.tokenizer, new.tokens, new.alone)
