"""Keep what logs and traces tell of one HTTP request: counts and times, never prompts, answers or keys.

The middleware opens a RequestContext, and whatever works on the request notes facts on it. The context ends with the
last of them: an answer that is generated in the background outlives its HTTP response.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraplex.adapters.histogram import Histogram

if TYPE_CHECKING:  # importing it loads numpy, and --help must not
    from loraplex.server.engine.request import Phases

MAX_CHOICES = 16
"""The most choices of a request that are told of one by one; all of them are counted."""

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")


@dataclass(frozen=True)
class ChoiceTimes:
    """The facts of one generated choice; times are time.monotonic()."""

    adapters: tuple[tuple[str, str | None, float], ...]  # name, digest (None: never read), weight
    submitted: float
    phases: Phases | None  # None: it had no token
    first_token: float | None
    ended: float
    prompt_tokens: int
    tokens: int
    gaps: Histogram  # between tokens, seconds
    finish_reason: str
    kinds: tuple[str, ...] = ()  # of the adapters, each once


@dataclass
class RequestContext:
    """Collect the facts of one request until it ends. Loop thread only."""

    request_id: str
    method: str
    path: str
    began: float = field(default_factory=time.monotonic)
    began_ns: int = field(default_factory=time.time_ns)  # the same moment by the clock on the wall
    status: int = 0  # 0: no answer was begun
    tenant: str = ""
    model: str = ""  # as the caller named it
    prompt_tokens: int = 0
    tokens: int = 0  # generated
    first_token: float | None = None  # time.monotonic()
    ended: float | None = None
    finish_reasons: tuple[str, ...] = ()  # each once
    choices: list[ChoiceTimes] = field(default_factory=list)
    trace_id: str | None = None
    num_holds: int = 0
    sticky: str = ""  # whose requests an alias treats alike
    worn: Callable[[], str] = lambda: ""  # the versions that write the answer, as far as they are known by now
    on_end: Callable[[RequestContext], None] = lambda context: None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the request from ending in the block; it ends when no block has held it for a turn of the event loop."""
        self.num_holds += 1
        try:
            yield
        finally:
            self.num_holds -= 1
            if self.num_holds == 0:
                # a task that was started for it but has not run yet holds it when this is called
                asyncio.get_running_loop().call_soon(self._end)

    def add(self, choice: ChoiceTimes) -> None:
        """Add the facts of a choice that has ended."""
        self.tokens += choice.tokens
        if choice.first_token is not None:
            self.first_token = min(choice.first_token, self.first_token or choice.first_token)
        if choice.finish_reason not in self.finish_reasons:
            self.finish_reasons += (choice.finish_reason,)
        if len(self.choices) < MAX_CHOICES:
            self.choices.append(choice)

    def unix_ns(self, moment: float) -> int:
        """Convert a time.monotonic() of this request to ns since 1970, whatever the wall clock has done since."""
        return self.began_ns + round((moment - self.began) * 1e9)

    def _end(self) -> None:
        if self.num_holds == 0 and self.ended is None:
            self.ended = time.monotonic()
            self.on_end(self)


_CURRENT: ContextVar[RequestContext | None] = ContextVar("request_context", default=None)


def current_request_context() -> RequestContext | None:
    """Return the request that the running task works on; None outside of requests."""
    return _CURRENT.get()


@contextmanager
def in_request_context(context: RequestContext) -> Iterator[None]:
    """Have the block, and the tasks that it starts, work on `context`."""
    token = _CURRENT.set(context)
    try:
        with context.held():
            yield
    finally:
        _CURRENT.reset(token)


def request_id(given: str | None) -> str:
    """Return the client's own id where it is short and plain, else a new one: the id goes into headers and logs."""
    if given is not None and _SANE_ID.fullmatch(given):
        return given
    return secrets.token_hex(16)
