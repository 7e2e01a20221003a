"""What the page at /ui shows, as JSON: adapters and where each is, whose the pages are, what the last minute was like.

Everything is read from records that the engine's thread has published (as /metrics does): it is neither asked nor held
up. A caller is told of the adapters that its key may use, or of all where it may read /metrics, which names
them too; the pages of others are there, but nobody's by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.tiers.stats import AdapterPlace, PageOwners
from loraplex.adapters.version import AdapterVersion
from loraplex.server.api.catalog import visible_aliases
from loraplex.server.api.errors import InvalidField
from loraplex.server.api.page.page_map import json_of, page_runs
from loraplex.server.api.proof import proof_status
from loraplex.server.api.services import Services
from loraplex.server.api.version_cards import version_cards
from loraplex.server.catalog.aliases import Alias
from loraplex.server.catalog.on_demand import is_hidden
from loraplex.server.telemetry.recent import Quantiles
from loraplex.server.tenancy.tenants import Key, current_key
from loraplex.server.version import version

LEVELS = ("device", "host", "disk")
"""Where an adapter's bytes are; disk: in its files alone, or wherever its source is."""

COLUMNS = ("name", "level", "rank", "pages", "bytes", "in_use", "requests", "tokens", "loads")
"""Of the table of adapters: fields of a row, and what it can be sorted by."""

MAX_ROWS = 200


@dataclass(frozen=True)
class View:
    """Which rows of the table are wanted."""

    text: str = ""  # only names that hold it, whatever its case
    level: str = ""  # only those at this level
    sort: str = "level"
    descending: bool = False
    offset: int = 0
    limit: int = 50

    @classmethod
    def read(cls, query: Mapping[str, str]) -> View:
        """From a query string. Raises InvalidField."""
        level, sort, order = query.get("level", ""), query.get("sort", "level"), query.get("order", "asc")
        for name, value, known in (
            ("level", level, ("", *LEVELS)),
            ("sort", sort, COLUMNS),
            ("order", order, ("asc", "desc")),
        ):
            if value not in known:
                raise InvalidField(name, f"{name}: expected one of {', '.join(filter(None, known))}")
        offset, limit = _count(query, "offset", 0), _count(query, "limit", 50)
        return cls(query.get("filter", "").lower(), level, sort, order == "desc", offset, min(limit, MAX_ROWS))


def overview(services: Services, view: View) -> bytes:
    """The whole answer, for the current caller, in JSON."""
    key, facts, stats = current_key(), services.facts, services.engine.stats()
    registered = services.adapters.registry.list()
    adapters = [v for v in registered if not is_hidden(v.name) and (key.may_scrape or key.may_use(v.name))]
    places = {place.name: place for place in stats.adapters.places(registered)}
    minute = services.metrics.recent.minute()
    drain = services.drain
    answer = {
        "server": {
            "version": version(),
            "base": facts.names[0],
            "may_use_base": key.may_use_base,
            "tenant": key.tenant,
            "device": facts.device,
            "formats": str(facts.formats),
            "max_model_len": facts.max_model_len,
            "state": "draining" if drain.is_draining else "ready" if services.engine.alive else "dead",
            "seconds_left": round(drain.seconds_left, 1),
        },
        "requests": {
            "running": stats.running,
            "max_running": facts.config.engine.max_num_seqs,
            "waiting": stats.waiting,
            "waiting_for_adapters": stats.waiting_for_adapters,
        },
        "minute": {
            "prompt_tokens": minute.prompt_tokens,
            "tokens": minute.tokens,
            "first_token": _quantiles(minute.first_token),
            "next_token": _quantiles(minute.next_token),
        },
        "memory": [{"name": name, "bytes": size, "remark": remark} for name, size, remark in facts.memory],
        "adapters": _table(services, key, adapters, places, view),
        "aliases": [_alias(alias) for alias in visible_aliases(services)[:MAX_ROWS]],
    }
    return _json(answer)[:-1] + b',"arena":' + _arena(services, stats.adapters.pages, adapters, places) + b"}"


def _arena(
    services: Services, found: PageOwners, adapters: list[AdapterVersion], places: Mapping[str, AdapterPlace]
) -> bytes:
    """Pages and slots, in JSON. `names` are the adapters that `runs` tells apart, see page_runs."""
    told: dict[str, AdapterVersion] = {}
    for each in adapters:
        if each.digest is not None and each.name in places and places[each.name].on_device:
            told.setdefault(each.digest, each)
    arena = {
        "num_pages": len(found.owners),
        "page_bytes": services.facts.page_bytes,
        "slots": len(found.adapters),
        "max_slots": services.facts.config.engine.num_slots,
        "names": [each.name for each in told.values()],
        "uids": [each.uid for each in told.values()],
    }
    runs = page_runs(found, {digest: i for i, digest in enumerate(told)})
    return _json(arena)[:-1] + b',"runs":' + json_of(runs) + b"}"


def _table(
    services: Services, key: Key, adapters: list[AdapterVersion], places: Mapping[str, AdapterPlace], view: View
) -> dict[str, Any]:
    levels = {each.name: _level(places.get(each.name)) for each in adapters}
    counts = dict.fromkeys(LEVELS, 0)
    for level in levels.values():
        counts[level] += 1
    found = [
        each
        for each in adapters
        if view.text in each.name.lower() and (not view.level or levels[each.name] == view.level)
    ]
    if view.sort != "name":  # the order they are in, and that equals keep
        values = {each.uid: _value(services, key, each, levels[each.name], view.sort) for each in found}
        known = [each for each in found if values[each.uid] is not None]
        known.sort(key=lambda each: values[each.uid] or 0, reverse=view.descending)
        found = known + [each for each in found if values[each.uid] is None]
    elif view.descending:
        found.reverse()
    return {
        "total": len(adapters),
        "levels": counts,
        "found": len(found),
        "offset": view.offset,
        "rows": [
            _row(services, key, each, levels[each.name], places.get(each.name))
            for each in found[view.offset : view.offset + view.limit]
        ],
    }


def _row(services: Services, key: Key, each: AdapterVersion, level: str, place: AdapterPlace | None) -> dict[str, Any]:
    """None in a column: not counted apart, or not this caller's to know."""
    row = {column: _value(services, key, each, level, column) for column in COLUMNS[2:]}
    pinned = place is not None and place.pinned
    versions = [
        {"digest": card.digest, "state": card.state, "labels": card.labels}
        for card in version_cards(services, each.name)
        if card.state != "gone"
    ]
    versions.sort(key=lambda card: card["state"] != "serving")
    known = {"versions": versions, "proof": _proof(services, each)}
    return {"name": each.name, "uid": each.uid, "level": level, "pinned": pinned, **known, **row}


def _proof(services: Services, each: AdapterVersion) -> dict[str, Any]:
    """What the receipt of a version comes to; none is begun for it."""
    found = {"status": proof_status(services.prover, each)}
    receipt = None if services.prover is None else services.prover.known(each)
    if receipt is None:
        return found
    measured, probe = receipt.measured, receipt.probe
    return {
        **found,
        "effect": measured.relative,
        "rounding": measured.rounding,
        "probe": None if probe is None else _finite(probe.adapter),
        "probe_base": None if probe is None else _finite(probe.base),
        "doubt": receipt.doubt,
        "remark": receipt.remark or None,
    }


def _finite(value: float) -> float | None:
    """JSON has no other numbers; what is no number is in doubt()."""
    return value if math.isfinite(value) else None


def _alias(alias: Alias) -> dict[str, Any]:
    targets = [{"adapter": each.name, "weight": each.weight} for each in alias.state.targets]
    return {"name": alias.name, "kind": alias.state.kind, "targets": targets, "revision": alias.revision} | (
        {"requires": alias.state.requires} if alias.state.requires else {}
    )


def _value(services: Services, key: Key, each: AdapterVersion, level: str, column: str) -> int | None:
    """What a column sorts by; but for names and levels it is also what it shows."""
    match column:
        case "level":
            return LEVELS.index(level)
        case "rank":
            return each.info.rank
        case "pages":
            return each.info.num_pages
        case "bytes":
            return each.info.nbytes
    if not (key.may_scrape or key.may_manage(each.name)):
        return None  # what others do with a shared adapter
    if column == "in_use":
        return services.adapters.registry.leases(each)
    used = services.metrics.adapters.totals_of(each.name)
    return None if used is None else int(getattr(used, column))


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _level(place: AdapterPlace | None) -> str:
    return "disk" if place is None else "device" if place.on_device else "host"


def _quantiles(found: Quantiles) -> dict[str, float] | None:
    if not found.count:
        return None
    return {"count": found.count, "p50": round(found.p50, 5), "p95": round(found.p95, 5), "p99": round(found.p99, 5)}


def _count(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidField(name, f"{name}: found {text[:40]!r}, expected a number, 0 or more")
    return int(text)
