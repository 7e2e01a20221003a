"""The file of API keys: its format, and following it while the server runs.

    keys:
      - name: acme-ci            # in logs and metrics, where keys never are
        sha256: 9f86d0...        # of the key; `loraplex keys new` makes both
        tenant: acme             # whose it is: shares are fair, cached prefixes kept apart, by tenant
        adapters: ["acme/*"]     # names it may use; default: the tenant's own, "acme/*"
        base: true               # whether it may use the base alone
        admin: false             # may manage every adapter, and see everything
        metrics: false           # may read /metrics
        load_on_use: false       # a request may load an adapter that is not here yet
        weight: 1                # share of a busy server, against other tenants; one for all keys of a tenant
        requests_per_minute: 600
        tokens_per_minute: 100000
        max_concurrent: 16
        max_adapters: 50         # the tenant may have here at a time (catalog/quota.py); one for all keys of a tenant
        max_pushed_bytes: 1000000000   # of those that it pushed (catalog/pushed.py), likewise

Patterns are those of tenants.py. A file that cannot be read, is wrong, or that everybody on the machine may write to
stops the start, and leaves the keys as they were later on. A key that is taken away gets nothing new; answers under way
end by themselves. Weights tell where requests wait for a place in the batch: those that have one go on at the same
pace.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from loraplex.adapters.files.bounded_yaml import MAX_BYTES, parse_yaml
from loraplex.server.tenancy.guarded_file import read_guarded
from loraplex.server.tenancy.rate_limits import Clock, Limits
from loraplex.server.tenancy.tenants import Key, Keyring, digest_of
from loraplex.server.whole_file import replace_file

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""Seconds between looks at the file, which a request takes: a key taken away is refused from then on."""

KEY_PREFIX = "lpx_"
"""Begins every key, so that scanners of repositories know keys."""

KEY_BYTES = 32
"""Random bytes of a key. Nobody guesses them, so one round of SHA-256 is enough to store a key."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PATTERN = re.compile(r"[A-Za-z0-9._*?-]+(?:/[A-Za-z0-9._*?-]+)?")
_MAX_WEIGHT = 1000.0
_LIST = re.compile(r"^keys:[^\n]*\n(?:\s*(?:#[^\n]*)?\n)*([ ]*)-", re.MULTILINE)
_EMPTY = re.compile(r"^keys:[ ]*\[\][ ]*$", re.MULTILINE)

RESERVED = frozenset({"merged", "private", "pushed", "hub", "local", "s3", "gs", "http", "https"})
"""Namespaces of adapters that requests bring with them (catalog/on_demand.py): they belong to no tenant."""

Stamp = tuple[int, int, int, int]
"""Tells one state of a file from another: modified and changed (ns), size, inode."""


class KeysError(ValueError):
    """Say why a keys file cannot be used, in one line that holds nothing secret."""


class KeysFile:
    """Hold the keys of a file, as they were when the file was last right. Loop thread only, but for construction."""

    def __init__(self, path: Path, clock: Clock = time.monotonic) -> None:
        """Read the file at `path`. Raises KeysError."""
        self.path = path
        self.num_reloads = 0
        self.is_current = True  # False: the file is wrong now, and an older state in use
        self._clock = clock
        self._lock = asyncio.Lock()
        self._reader = ThreadPoolExecutor(1, "keys")  # its own: in the pool of all, requests would wait for other work
        self._next_check = clock() + CHECK_SECONDS
        self.keyring, self._stamp = self._read()

    @property
    def is_due(self) -> bool:
        """Return whether the next refresh() looks at the file."""
        return self._clock() >= self._next_check

    async def refresh(self) -> bool:
        """Read the file again if it has changed. Returns whether there is a new keyring.

        Requests that come meanwhile wait, because a key taken away must not pass.
        """
        if not self.is_due:
            return False
        async with self._lock:
            if not self.is_due:
                return False
            changed = await asyncio.get_running_loop().run_in_executor(self._reader, self._reload)
            self._next_check = self._clock() + CHECK_SECONDS
            return changed

    def _reload(self) -> bool:
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return False
        self._stamp = stamp  # a wrong file is not read again until it changes
        try:
            self.keyring, self._stamp = self._read()
        except KeysError as error:
            self.is_current = False
            logger.error("%s; the keys stay as they were", error)
            return False
        self.is_current = True
        self.num_reloads += 1
        logger.info("%d keys from %s", len(self.keyring), self.path)
        return True

    def _stamp_now(self) -> Stamp | None:
        try:
            return _stamp(os.stat(self.path))
        except OSError:
            return None

    def _read(self) -> tuple[Keyring, Stamp | None]:
        text, stamp = _read_text("keys file", self.path)
        try:
            return parse_keys(text), stamp
        except KeysError as error:
            raise KeysError(f"keys file {self.path}: {error}") from None


def _read_text(what: str, path: Path) -> tuple[str, Stamp]:
    """Read the file's text. Raises KeysError."""
    try:
        data, found = read_guarded(path, MAX_BYTES)
        return data.decode(), _stamp(found)  # from before it was read: what is written meanwhile shows as a change
    except OSError as error:
        raise KeysError(f"{what} {path}: it cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise KeysError(f"{what} {path}: it is not UTF-8") from None
    except ValueError as error:
        raise KeysError(f"{what} {path}: {error}") from None


def read_owners_keys(path: Path) -> tuple[str, ...]:
    """Read the keys of --api-key-file, one a line: each may do everything. Raises KeysError."""
    found = tuple(_read_text("--api-key-file", path)[0].split())
    if not found:
        raise KeysError(f"--api-key-file {path}: it is empty; expected keys, one a line")
    return found


def parse_keys(text: str) -> Keyring:
    """Read the keys from the text of a file. Raises KeysError."""
    try:
        document = parse_yaml(text.encode())
    except ValueError as error:
        raise KeysError(str(error)) from None
    if not isinstance(document, dict) or set(document) != {"keys"} or not isinstance(document["keys"], list):
        raise KeysError("expected a list under 'keys:' and nothing else; `loraplex keys new` shows an entry")
    keys: dict[bytes, Key] = {}
    names: set[str] = set()
    weights: dict[str, float] = {}
    bounds: dict[tuple[str, str], int | None] = {}
    for i, entry in enumerate(document["keys"]):
        where = f"keys[{i}]"
        digest, key = _parse_key(entry, where)
        if digest in keys:
            raise KeysError(f"{where}: {key.name!r} has the same sha256 as {keys[digest].name!r}")
        if key.name in names:
            raise KeysError(f"{where}.name: {key.name!r} is there twice")
        if weights.setdefault(key.tenant, key.weight) != key.weight:
            raise KeysError(
                f"{where}.weight: tenant {key.tenant!r} has weight {weights[key.tenant]:g} with another key; "
                "give all its keys one"
            )
        for bound in () if key.admin else _TENANTS:
            known = bounds.setdefault((key.tenant, bound), getattr(key, bound))
            if known != getattr(key, bound):
                raise KeysError(
                    f"{where}.{bound}: tenant {key.tenant!r} may have {known or 'any number'} with another key; give "
                    "all its keys one"
                )
        keys[digest] = key
        names.add(key.name)
    return Keyring(keys)


_KINDS: dict[str, type] = {"base": bool, "admin": bool, "metrics": bool, "load_on_use": bool}
_LIMITS = tuple(each.name for each in fields(Limits))
_TENANTS = ("max_adapters", "max_pushed_bytes")
_FIELDS = ("name", "sha256", "tenant", "adapters", "weight", *_KINDS, *_LIMITS, *_TENANTS)


def _parse_key(entry: Any, where: str) -> tuple[bytes, Key]:
    if not isinstance(entry, dict):
        raise KeysError(f"{where}: expected name, sha256, tenant and so on; `loraplex keys new` shows an entry")
    if set(entry) - set(_FIELDS):  # not shown: it may be a key that was pasted in the wrong place
        raise KeysError(f"{where}: it has a field that is not known; there are {', '.join(_FIELDS)}")
    for required in ("name", "sha256", "tenant"):
        if not isinstance(entry.get(required), str):
            raise KeysError(f"{where}.{required}: it is missing, or no text (put it in quotes)")
    for name in ("name", "tenant"):
        if _NAME.fullmatch(entry[name]) is None or entry[name].strip(".") == "":
            raise KeysError(f"{where}.{name}: expected up to 64 letters, digits, '.', '_' and '-'")
    if entry["tenant"] in RESERVED:
        raise KeysError(f"{where}.tenant: {entry['tenant']!r} is the namespace of adapters loaded on first use")
    if _DIGEST.fullmatch(entry["sha256"]) is None:
        raise KeysError(f"{where}.sha256: expected 64 hex digits, in small letters; never the key itself")
    for name, kind in _KINDS.items():
        if not isinstance(entry.get(name, False), kind):
            raise KeysError(f"{where}.{name}: expected true or false")
    weight = entry.get("weight", 1)
    if not _is_number(weight) or not 0 < weight <= _MAX_WEIGHT:
        raise KeysError(f"{where}.weight: expected a number above 0 and up to {_MAX_WEIGHT:g}")
    key = Key(
        name=entry["name"],
        tenant=entry["tenant"],
        adapters=_parse_patterns(entry.get("adapters", [f"{entry['tenant']}/*"]), where),
        base=entry.get("base", True),
        admin=entry.get("admin", False),
        metrics=entry.get("metrics", False),
        load_on_use=entry.get("load_on_use", False),
        weight=float(weight),
        limits=Limits(**{name: _parse_limit(entry.get(name), f"{where}.{name}") for name in _LIMITS}),
        **{name: _parse_limit(entry.get(name), f"{where}.{name}") for name in _TENANTS},
    )
    return bytes.fromhex(entry["sha256"]), key


def _parse_patterns(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) and _PATTERN.fullmatch(each) for each in value):
        raise KeysError(f"{where}.adapters: expected a list of names or patterns, as in ['acme/*', 'sql']")
    return tuple(value)


def _parse_limit(value: Any, where: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise KeysError(f"{where}: expected a whole number from 1 on (leave it out for no limit)")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def new_key(name: str, tenant: str, **settings: Any) -> tuple[str, str]:
    """Make a key, and its entry for the file as YAML; `settings` are further fields. Raises KeysError."""
    secret = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    entry = {"name": name, "sha256": digest_of(secret).hex(), "tenant": tenant}
    entry |= {field: value for field, value in settings.items() if value is not None}
    _parse_key(entry, "key")
    return secret, yaml.safe_dump([entry], sort_keys=False, default_flow_style=False)


def add_entry(path: Path, entry: str) -> None:
    """Add an entry of new_key() to the file at `path`, which is made for its owner alone where it is absent.

    The rest of the file stays as it is written, and a server that follows the file sees the old one or the new one.
    Raises KeysError, and leaves the file as it was, where it cannot be read or written, is wrong, or would be with the
    entry.
    """
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else "keys:\n"
        text = old if old.endswith("\n") else f"{old}\n"
        where = _LIST.search(text)
        indent = where[1] if where is not None else ""
        text = _EMPTY.sub("keys:", text) + "".join(f"{indent}{line}" for line in entry.splitlines(keepends=True))
        parse_keys(text)
        target = path.resolve()  # a link stays one
        replace_file(target, text, stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o600)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise KeysError(f"keys file {path}: {reason or error}") from None
    except KeysError as error:
        by_hand = "without --to the entry is printed, to be put there by hand"
        raise KeysError(f"keys file {path}, with the new entry: {error}; {by_hand}") from None


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
