"""Describe who asks and what they may do: keys, and the caller of a request.

In patterns of adapter names * stands for anything but "/", ? for one character but "/", ** for anything: "*" are all
adapters without a namespace, "acme/*" those of one tenant, "**" all there are.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache

from loraplex.server.tenancy.rate_limits import Account, Limits, RateLimited


@dataclass(frozen=True)
class Key:
    """One API key: who holds it and what it may do."""

    name: str
    tenant: str  # "" only where there is one key, or none
    adapters: tuple[str, ...] = ("**",)
    base: bool = True
    admin: bool = False
    metrics: bool = False
    load_on_use: bool = False
    weight: float = 1.0
    max_adapters: int | None = None  # that its tenant may have here; None: any number
    max_pushed_bytes: int | None = None  # of those its tenant has pushed; None: any number
    limits: Limits = field(default_factory=Limits)

    def may_use(self, adapter: str) -> bool:
        """Return whether the key may use the adapter of this name, and may know that there is one."""
        return self.admin or any(_matcher(pattern).fullmatch(adapter) for pattern in self.adapters)

    def may_manage(self, adapter: str) -> bool:
        """Return whether the key may load, replace and unload an adapter of this name."""
        return self.admin or (self.tenant != "" and adapter.startswith(f"{self.tenant}/"))

    @property
    def may_use_base(self) -> bool:
        """Return whether the key may use the base without any adapter."""
        return self.admin or self.base

    @property
    def may_scrape(self) -> bool:
        """Return whether the key may read /metrics, which names every tenant's adapters."""
        return self.admin or self.metrics


ANYONE = Key("", "", admin=True, load_on_use=True)
"""Everybody, on a server without keys."""


class Caller:
    """The sender of one request. Loop thread only."""

    __slots__ = ("_account", "_holds", "_limited", "key")

    def __init__(self, key: Key, account: Account, limited: Counter[tuple[str, str]]) -> None:
        """limited: counts, by tenant and limit, the requests that a limit stops."""
        self.key = key
        self._account = account
        self._limited = limited
        self._holds = 0

    def admit(self) -> None:
        """Count the request. Raises RateLimited."""
        with self.counted():
            self._account.admit()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Count the request as open in the block; once, however many parts of the server work on it."""
        self._account.num_open += self._holds == 0
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            self._account.num_open -= self._holds == 0

    def pay_prompt(self, tokens: int) -> None:
        """Pay for prompt tokens that are to be computed. Raises RateLimited."""
        with self.counted():
            self._account.pay_prompt(tokens)

    def pay_answer(self, tokens: int) -> None:
        """Pay for generated tokens."""
        self._account.pay_answer(tokens)

    def limit_headers(self) -> dict[str, str]:
        """Return the x-ratelimit-* headers as limits stand now."""
        return self._account.headers()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count, for the metrics, a limit that is reached in the block."""
        try:
            yield
        except RateLimited as error:
            self._limited[self.key.tenant, error.limit] += 1
            raise


# A context variable rather than an argument of every route and of all they call: a route that forgot to pass it on
# would be open, and this way no route can. Tasks that a request starts inherit it.
_CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current_caller() -> Caller:
    """Return the caller of the current request: ANYONE's on a server without keys, and outside of requests."""
    return _CALLER.get() or Caller(ANYONE, Account(Limits(), lambda: 0.0), Counter())


def current_key() -> Key:
    """Return the key of the current caller."""
    found = _CALLER.get()
    return found.key if found is not None else ANYONE


@contextmanager
def calling(who: Caller) -> Iterator[None]:
    """Have the block work for `who`."""
    token = _CALLER.set(who)
    try:
        yield
    finally:
        _CALLER.reset(token)


class Keyring:
    """Hold keys by their digests. Immutable; replaced as a whole when the file changes."""

    def __init__(self, keys: Mapping[bytes, Key]) -> None:
        """keys: by SHA-256 digest."""
        # Looked up by a MAC of the digest under a secret of this process. How long a lookup takes may depend on how
        # much of the MAC agrees with another key's, but nobody outside can compute MACs, so trying keys and measuring
        # tells nothing about them, not even about their digests. The final compare takes the same time for all.
        self._secret = secrets.token_bytes(32)
        self._known = {self._mac(digest): digest for digest in keys}
        self.keys = dict(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, secret: str) -> tuple[bytes, Key] | None:
        """Return the digest and the entry of a key as its holder has it; None for a key that is not here."""
        digest = digest_of(secret)
        known = self._known.get(self._mac(digest), bytes(32))
        return (digest, self.keys[digest]) if hmac.compare_digest(known, digest) else None

    def _mac(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, digest_size=16, key=self._secret).digest()


def digest_of(secret: str) -> bytes:
    """Return the digest by which a keys file holds `secret`."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def owners_keyring(keys: Iterable[str]) -> Keyring:
    """Make a keyring of keys that may do everything (--api-key). They have no tenant, so fairness is by adapter."""
    return Keyring({digest_of(secret): replace(ANYONE, name=f"key-{i}") for i, secret in enumerate(keys)})


@lru_cache(maxsize=4096)
def _matcher(pattern: str) -> re.Pattern[str]:
    words = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(words.get(part) or re.escape(part) for part in re.split(r"(\*\*|\*|\?)", pattern)))
