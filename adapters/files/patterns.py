"""Patterns out of strangers' adapter_config.json, matched within bounds: of their size, their time and their memory.

What PEFT matches with re is matched with regex, which has a time limit; what re would not take is refused. regex writes
counted repeats out: ((a|b){1000}){1000} took 1.6 s and a third such {1000} all memory there was.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import regex  # type: ignore[import-untyped]  # re with a time limit

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.throttle import Throttle

T = TypeVar("T")

MAX_SIZE = 100_000
"""Characters of all patterns of an adapter, each times the product of its counted repeats: 0.2 s to compile."""

MAX_LENGTH = 24_000
"""Characters of one pattern; the full names of 80 layers' modules are 23,000. To compile one of 80,000 takes a call of
0.1 s with the GIL, these 10 ms."""

QUICK_SECONDS = 1e-3
"""A match may hold the GIL for so long. To give it up and wait for it again takes longer than a sane match, of 3 us."""

REST = 4.0
"""Seconds of rest for each of work: patterns made to take long take a fifth of what Python's threads share."""

_BRACES = re.compile(r"\{([^{}]*)\}?")
_REPEAT = re.compile(r"(\d{1,6})?(?:,(\d{1,6})?)?")


class Matcher:
    """Matches a stranger's patterns: bad ones are refused with the key they stand under."""

    def __init__(self, seconds: float, throttle: Callable[[], None]) -> None:
        """seconds: of a core, for all patterns over all paths. `throttle` is called between matches, and may raise."""
        self._throttle = Throttle(throttle, REST)
        self._deadline = time.thread_time() + seconds
        self._left = MAX_SIZE
        self._compiled: dict[str, Any] = {}

    def full(self, key: str, pattern: str, path: str) -> bool:
        """Return whether `pattern`, the value or part of the value of `key`, matches all of `path`."""
        return self._run("fullmatch", key, pattern, path) is not None

    def end(self, key: str, pattern: str, path: str) -> bool:
        """Return whether `pattern` matches the end of `path`, from some dot (or its start) on."""
        return self._run("match", key, rf"(.*\.)?({pattern})$", path) is not None

    def first(self, key: str, patterns: Iterable[tuple[str, T]], path: str, default: T) -> T:
        """Find the value of the first of `patterns`, entries of `key`, that matches the end of `path`; or `default`."""
        return next((value for pattern, value in patterns if self.end(key, pattern, path)), default)

    def index(self, key: str, pattern: str, path: str) -> int | None:
        """Read the group `idx` of `pattern` at the start of `path`, as a number."""
        found = self._run("match", key, pattern, path)
        return None if found is None or found["idx"] is None else int(found["idx"])

    def _run(self, how: str, key: str, pattern: str, path: str) -> Any:
        self._throttle()
        match = getattr(self._compile(key, pattern), how)
        try:
            try:
                return match(path, timeout=QUICK_SECONDS, concurrent=False)
            except TimeoutError:
                left = max(self._deadline - time.thread_time(), QUICK_SECONDS)
                return match(path, timeout=left, concurrent=True)  # without the GIL
        except (TimeoutError, MemoryError) as error:
            raise _bad(key, pattern, "which takes too long; write it simpler") from error

    def _compile(self, key: str, pattern: str) -> Any:
        if time.thread_time() > self._deadline:
            raise _bad(key, pattern, "which takes too long together with the others; write them simpler")
        found = self._compiled.get(pattern)
        if found is None:
            self._left -= len(pattern) * _copies(key, pattern)
            if self._left < 0 or len(pattern) > MAX_LENGTH:
                raise _bad(
                    key,
                    pattern,
                    f"which has over {MAX_LENGTH} characters, or with the others, repeats written out, over {MAX_SIZE}",
                )
            try:
                re.compile(pattern)
                found = self._compiled[pattern] = regex.compile(pattern, cache_pattern=False)
            except (re.error, regex.error, OverflowError) as error:
                raise _bad(key, pattern, f"which is not valid: {error}") from error
            except RecursionError:
                raise _bad(key, pattern, "which is nested too deeply") from None
        return found


def _copies(key: str, pattern: str) -> int:
    """Count how often counted repeats can have part of `pattern` written out, were each inside of all others."""
    counts = []
    for inside in _BRACES.findall(pattern):
        repeat = _REPEAT.fullmatch(inside)
        if repeat is None or not inside:
            raise _bad(key, pattern, "in which braces hold no number of repeats")
        counts.append(max(1, *(int(number) for number in repeat.groups() if number)))
    return math.prod(counts[:64]) if len(counts) <= 64 else MAX_SIZE + 1


def _bad(key: str, pattern: str, why: str) -> AdapterRefused:
    text = json.dumps(pattern)
    text = text if len(text) <= 80 else text[:77] + "..."
    return AdapterRefused("bad_config", f"adapter_config.json: {key} makes the pattern {text}, {why}")
