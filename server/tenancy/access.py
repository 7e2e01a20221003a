"""Find the key that a request brings, count its use, and collect metrics of both."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loraplex.server.tenancy.keys_file import KeysFile
from loraplex.server.tenancy.rate_limits import Account, Clock
from loraplex.server.tenancy.tenants import Caller, Keyring


class Access:
    """Hold the keys of one server. Loop thread only."""

    def __init__(
        self,
        keys: Keyring | KeysFile,
        *,
        open_metrics: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        """open_metrics: whether /metrics needs no key."""
        self.open_metrics = open_metrics
        self.num_refused = 0
        self.limited: Counter[tuple[str, str]] = Counter()  # by tenant and limit
        self._file = keys if isinstance(keys, KeysFile) else None
        self._keyring = keys if isinstance(keys, Keyring) else keys.keyring
        self._clock = clock
        self._accounts: dict[bytes, Account] = {}  # by digest of the key

    async def find(self, secrets: Iterable[str]) -> Caller | None:
        """Return who holds the first of `secrets` that is a key; None when none is."""
        if self._file is not None:
            await self._file.refresh()
            if self._keyring is not self._file.keyring:  # it may have been read for a request that is gone
                self._replace(self._file.keyring)
        for secret in secrets:
            found = self._keyring.find(secret)
            if found is not None:
                digest, key = found
                account = self._accounts.get(digest)
                if account is None:
                    account = self._accounts[digest] = Account(key.limits, self._clock)
                return Caller(key, account, self.limited)
        self.num_refused += 1
        return None

    def refuses(self, secrets: Iterable[str]) -> bool:
        """Return whether none of `secrets` is a key, and count that. While the file is due, only find() can tell."""
        if self._file is not None and self._file.is_due:
            return False
        if any(self._keyring.find(secret) for secret in secrets):
            return False
        self.num_refused += 1
        return True

    def collector(self) -> Collector:
        """Make the collector of the keys' metrics."""
        return _AccessCollector(self)

    @property
    def num_keys(self) -> int:
        """The number of keys."""
        return len(self._keyring)

    @property
    def file(self) -> KeysFile | None:
        """The file of the keys."""
        return self._file

    def _replace(self, keyring: Keyring) -> None:
        """Take a new keyring. A key that stays keeps its account; a key that is gone loses it."""
        self._keyring = keyring
        kept = {digest: self._accounts[digest] for digest in keyring.keys if digest in self._accounts}
        for digest, account in kept.items():
            account.set_limits(keyring.keys[digest].limits)
        self._accounts = kept


class _AccessCollector(Collector):
    """Collect tenants by name, and keys as a number only."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        access = self._access
        yield GaugeMetricFamily("loraplex:api_keys", "API keys in use.", access.num_keys)
        yield CounterMetricFamily("loraplex:unauthorized", "Requests without a known key.", access.num_refused)
        limited = CounterMetricFamily(
            "loraplex:rate_limited", "Requests beyond a limit of their key.", labels=("tenant", "limit")
        )
        for labels, count in sorted(access.limited.items()):
            limited.add_metric(labels, count)
        yield limited
        if access.file is not None:
            current = 1.0 if access.file.is_current else 0.0
            yield GaugeMetricFamily("loraplex:api_keys_current", "0: the file is wrong, older keys in use.", current)
            yield CounterMetricFamily("loraplex:api_keys_reloads", "Times it was read anew.", access.file.num_reloads)
