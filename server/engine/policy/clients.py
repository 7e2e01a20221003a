"""Who shares the server with others, and the account of each. Integers and floats only."""

from __future__ import annotations

from operator import attrgetter

from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.request import Mix

NEVER = float("-inf")

ClientKey = tuple[str, str]  # (tenant, "") or ("", names of the adapters)

by_age = attrgetter("number")


def client_of(tenant: str, mix: Mix) -> ClientKey:
    """Return who is charged for the requests of `tenant` that use `mix`."""
    if tenant:
        return tenant, ""
    return "", ",".join(sorted(lease.version.name for lease, _ in mix))


class Client:
    """One that shares the server with others."""

    __slots__ = (
        "counter",
        "emptied",
        "flows",
        "is_new",
        "key",
        "num_open",
        "num_running",
        "num_waiting",
        "protected_until",
        "running_tokens",
        "served",
        "weight",
    )

    def __init__(self, key: ClientKey) -> None:
        self.key = key
        self.weight = 1.0
        self.counter = 0.0  # virtual tokens: served, over the weight
        self.num_open = 0
        self.num_waiting = 0
        self.num_running = 0
        self.running_tokens = 0  # of the prompts of these
        self.flows: dict[int, Flow] = {}  # by priority
        self.served = NEVER  # seconds: when it was last served, or began to wait
        self.is_new = True  # none of its requests was admitted since it became active
        self.emptied = False  # all its running sequences were preempted for another client
        self.protected_until = NEVER  # counter below which that must not happen again


class Flow:
    """A client's requests of one priority, in the order of their arrival."""

    __slots__ = ("client", "priority", "served", "waiting")

    def __init__(self, client: Client, priority: int) -> None:
        self.client = client
        self.priority = priority
        self.waiting: list[Sequence] = []  # oldest first; a preempted one takes its old place
        self.served = NEVER
