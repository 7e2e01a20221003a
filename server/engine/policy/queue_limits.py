"""Who may queue at all: what could ever be served, bounds on requests and tokens, and when to come back. No torch.

A client may fill the queue up to EAGER times what is left of it (dynamic thresholds: Choudhury and Hahne), so one alone
gets eight ninths, and what it leaves is there for the next one: the bound is fair too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex.server.engine.policy.clients import ClientKey
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.plan import SchedulerLimits
from loraplex.server.engine.request import ContextTooLong, GenerationRequest, Overloaded, virtual_tokens

EAGER = 8

RETRY_AFTER = (1.0, 60.0)
"""Seconds: least and most that a refused client is told to wait."""

FADING = 0.98
"""Weight of the past at each new step or ended request: the drain rate is that of about the last 50."""


def check_fits(request: GenerationRequest, limits: SchedulerLimits, kv: KVCache) -> None:
    """Raise ContextTooLong unless `request` could be served by a server with nothing else to do. Thread-safe.

    Raises ValueError for one without tokens, with tokens that are none, or with a weight that is none.
    """
    prompt, wanted = len(request.prompt_ids), request.params.max_tokens
    if prompt < 1 or wanted < 1:
        raise ValueError(f"{prompt} prompt tokens and max_tokens {wanted}; expected at least 1 of each")
    if not request.weight > 0:
        raise ValueError(f"the weight is {request.weight}; expected more than 0")
    tokens = max(limits.vocab_size, *(lease.version.info.tokens for lease, _ in request.mix), 0)
    if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < tokens:
        raise ValueError(f"the prompt has token ids outside 0..{tokens - 1}")
    virtual = virtual_tokens(request.mix)
    if virtual + prompt + wanted > limits.max_model_len:
        beside = f"{virtual} virtual tokens of its adapter, " if virtual else ""
        raise ContextTooLong(
            f"{beside}{prompt} prompt tokens and max_tokens {wanted} make {virtual + prompt + wanted} tokens, but the "
            f"context holds {limits.max_model_len}; shorten the prompt or lower max_tokens"
        )
    versions = {lease.version.digest or lease.version.uid: lease.version for lease, _ in request.mix}
    if len(versions) > limits.num_slots:
        raise ContextTooLong(f"{len(versions)} adapters in one request, but there are {limits.num_slots} slots")
    kv_pages = kv.peak_pages(virtual + prompt + wanted - 1, limits.token_budget)  # the last token is never computed
    adapter_pages = sum(version.info.num_pages for version in versions.values())
    if kv_pages + adapter_pages > kv.pool.num_pages:
        raise ContextTooLong(
            f"{prompt} prompt tokens and max_tokens {wanted} take {kv_pages} pages, and the request's adapters "
            f"{adapter_pages}, but the arena has {kv.pool.num_pages}; lower max_tokens or give the server more "
            "memory (--memory)"
        )


@dataclass(frozen=True)
class Running:
    """Requests past the queue, and tokens of their prompts: of all clients, and of each that has any."""

    requests: int = 0
    tokens: int = 0
    by_client: Mapping[ClientKey, tuple[int, int]] = field(default_factory=dict)


class QueueLimits:
    """Not thread-safe but for drained(), which the engine's thread calls."""

    def __init__(self, max_waiting: int, max_waiting_tokens: int) -> None:
        """Requests that wait, and tokens of their prompts together; an empty queue takes any one request."""
        self.max_waiting = max_waiting
        self.max_waiting_tokens = max_waiting_tokens
        self.running = Running()  # of the open requests those that do not wait
        self.tokens = 0  # of the prompts of all open requests
        self.requests = 0
        self._requests: Counter[ClientKey] = Counter()
        self._tokens: Counter[ClientKey] = Counter()
        self._drained = (0.0, 0.0)  # tokens computed, and seconds it took, fading
        self._output = 0.0  # tokens generated for a request, lately

    def check(self, key: ClientKey, new: int) -> None:
        """Raise Overloaded where a request of `key` with `new` prompt tokens would wait in a full queue."""
        running = self.running
        waiting, tokens = self.requests - running.requests, self.tokens - running.tokens
        if waiting > 0:
            own_running, own_running_tokens = running.by_client.get(key, (0, 0))
            own, own_tokens = self._requests[key] - own_running, self._tokens[key] - own_running_tokens
            self._check(waiting, own, 1, self.max_waiting, "requests", waiting, tokens)
            self._check(tokens, own_tokens, new, self.max_waiting_tokens, "prompt tokens", waiting, tokens)

    def enter(self, key: ClientKey, request: GenerationRequest) -> None:
        """Count an open request of client `key`. Raises Overloaded as check() does."""
        new = len(request.prompt_ids)
        self.check(key, new)
        self.requests += 1
        self.tokens += new
        self._requests[key] += 1
        self._tokens[key] += new

    def leave(self, key: ClientKey, request: GenerationRequest, output: int) -> None:
        """Forget a request that has ended, after `output` generated tokens."""
        self.requests -= 1
        self.tokens -= len(request.prompt_ids)
        self._requests[key] -= 1
        self._tokens[key] -= len(request.prompt_ids)
        if not self._requests[key]:
            del self._requests[key], self._tokens[key]
        self._output += (1 - FADING) * (output - self._output) if self._output else output

    def drained(self, tokens: int, seconds: float) -> None:
        """Learn the rate of a step that computed `tokens` in `seconds`."""
        before, took = self._drained
        self._drained = FADING * before + tokens, FADING * took + seconds

    def drain_seconds(self, waiting: int, tokens: int) -> float:
        """Estimate how long `waiting` requests with `tokens` of prompts take at the latest rate, within RETRY_AFTER."""
        done, took = self._drained
        least, most = RETRY_AFTER
        work = tokens + waiting * self._output
        return min(most, max(least, work * took / done)) if done else least

    def _check(self, total: int, own: int, new: int, limit: int, what: str, waiting: int, tokens: int) -> None:
        left = limit - total
        if total + new <= limit and own + new <= EAGER * left:
            return
        seconds = self.drain_seconds(waiting, tokens)
        whose = "" if total + new > limit else f", {own} of them of this client, with room for {left} more, for others"
        raise Overloaded(
            f"{total} {what} are waiting already{whose}; the limit is {limit}. Try again in {seconds:.0f} s", seconds
        )
