"""Bound what one API key takes per minute and at once: token buckets, and a count of open requests. Loop thread only.

A bucket holds at most a minute's worth and fills evenly, so a key that was quiet may spend a minute's worth at once.
Requests and prompts are paid when they come. Generated tokens are paid when they are there, also where the bucket is
empty by then: no answer is cut, and the next request waits until the debt is paid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from loraplex.server.engine.request import Overloaded

Clock = Callable[[], float]
"""Returns seconds that never go back: time.monotonic."""

BUSY_RETRY = 1.0
"""Seconds after which a key with too many open requests may ask again: nobody knows when one of them ends."""


@dataclass(frozen=True)
class Limits:
    """The limits of one key; None: without bound."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers
    max_concurrent: int | None = None  # requests


class RateLimited(Overloaded):
    """Say that a limit of the key is reached; the same request may pass after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float, limit: str) -> None:
        super().__init__(message, retry_after)
        self.limit = limit  # "requests", "tokens", "concurrent" or "adapters"

    def hint(self) -> dict[str, str]:
        """The headers by which clients try again by themselves."""
        return {"retry-after-ms": str(math.ceil(self.retry_after * 1000))}


class TooLargeForLimit(RateLimited):
    """Say that a request has more tokens than the key gets in a minute: no waiting helps."""

    def hint(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class Bucket:
    """Hold up to `size`, gain `size` a minute, and go below zero where more is taken."""

    __slots__ = ("_changed", "_clock", "_level", "size")

    def __init__(self, size: int, clock: Clock) -> None:
        self.size = size
        self._clock = clock
        self._level = float(size)
        self._changed = clock()

    @property
    def level(self) -> float:
        """The amount that the bucket holds now; negative: debt."""
        now = self._clock()
        self._level = min(self.size, self._level + (now - self._changed) * self.size / 60)
        self._changed = now
        return self._level

    def take(self, amount: float) -> None:
        """Take `amount`, however little the bucket holds."""
        self._level = self.level - amount

    def wait(self, amount: float) -> float:
        """Return the seconds until the bucket holds `amount`; inf where it never will."""
        if amount > self.size:
            return math.inf
        missing = amount - self.level
        return missing * 60 / self.size if missing > 1e-9 else 0.0

    def resized(self, size: int) -> Bucket:
        """Make a bucket of another size from which as much was spent."""
        other = Bucket(size, self._clock)
        other._level = size - (self.size - self.level)
        return other


class Account:
    """Count what one key has used of its limits."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._clock = clock
        self.limits = limits
        self.num_open = 0  # requests at work now
        self._requests = _bucket(None, limits.requests_per_minute, clock)
        self._tokens = _bucket(None, limits.tokens_per_minute, clock)

    def set_limits(self, limits: Limits) -> None:
        """Set other limits; what was used stays used."""
        self.limits = limits
        self._requests = _bucket(self._requests, limits.requests_per_minute, self._clock)
        self._tokens = _bucket(self._tokens, limits.tokens_per_minute, self._clock)

    def admit(self) -> None:
        """Count and pay for a request. Raises RateLimited, and then takes nothing."""
        most = self.limits.max_concurrent
        if most is not None and self.num_open >= most:
            message = f"this key has {self.num_open} requests open and may have {most}; wait until one has ended"
            raise RateLimited(message, BUSY_RETRY, "concurrent")
        self._check_tokens(1)  # debts first
        if self._requests is not None:
            wait = self._requests.wait(1)
            if wait > 0:
                message = f"this key may make {self._requests.size} requests a minute; the next one in {wait:.1f} s"
                raise RateLimited(message, wait, "requests")
            self._requests.take(1)

    def pay_prompt(self, tokens: int) -> None:
        """Pay for a prompt's tokens. Raises RateLimited, and then takes nothing."""
        self._check_tokens(tokens)
        self.pay_answer(tokens)

    def pay_answer(self, tokens: int) -> None:
        """Pay for tokens that are generated already."""
        if self._tokens is not None:
            self._tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """Make OpenAI's x-ratelimit-* headers for the limits there are."""
        named = (("requests", self._requests), ("tokens", self._tokens))
        found: dict[str, str] = {}
        for name, bucket in named:
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.size)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level + 1e-9)))
                found[f"x-ratelimit-reset-{name}"] = duration(bucket.wait(bucket.size))
        return found

    def _check_tokens(self, tokens: int) -> None:
        if self._tokens is None:
            return
        wait = self._tokens.wait(tokens)
        if wait == math.inf:
            message = f"{tokens} tokens are more than this key may use in a minute ({self._tokens.size})"
            raise TooLargeForLimit(message, 60.0, "tokens")
        if wait > 0:
            message = f"this key may use {self._tokens.size} tokens a minute; {tokens} more in {wait:.1f} s"
            raise RateLimited(message, wait, "tokens")


def duration(seconds: float) -> str:
    """Format seconds as OpenAI does: "20ms", "1.5s", "6m0s"."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{text}" if minutes else text


def _bucket(old: Bucket | None, size: int | None, clock: Clock) -> Bucket | None:
    if size is None:
        return None
    if old is None:
        return Bucket(size, clock)
    return old if old.size == size else old.resized(size)
