"""Who is served next: virtual token counters for each client, and the queue that they order. Integers and floats only.

A client is a tenant or, where there is none, a mix of adapters (the base alone being one). Its counter grows with what
it is served: a prompt token computed counts 1, a generated one 2, over the client's weight. The client with the lowest
counter goes first, so whoever was served least catches up; one that comes back after a pause is lifted to the lowest
counter of those at work, so nobody saves up (VTC: Sheng et al., Fairness in Serving Large Language Models).

    order of admission   1. clients without service for `ageing` seconds, one request each, the longest without first
                         2. by priority, the lower first; a client's own requests of a priority that was passed over
                            for `ageing` seconds count as its most urgent ones, one at a time
                         3. clients below their share of the places, who could take one of the others' anyway
                         4. by counter, with the prompts promised in this step
                         5. by places taken over weight, then by arrival

So the wait is bounded across priorities and clients: with c clients waiting and one place coming free every s seconds,
a client's next request is admitted after at most ageing + c * s seconds, whatever the others send; and a request of the
lowest of a client's p priorities is its next within p such turns.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heapreplace

from loraplex.server.engine.policy.clients import NEVER, Client, ClientKey, Flow, by_age, client_of
from loraplex.server.engine.policy.sequence import Sequence

PROMPT_TOKEN = 1.0
OUTPUT_TOKEN = 2.0
"""What a token costs, as in VTC: a generated one is a pass over the weights of its own."""

QUANTUM = 16384.0
"""Virtual tokens that a client gets out of something indivisible before another may take it, about what it costs to
recompute 16 sequences of 1,000 tokens: at worst half of the work is done twice."""

MAX_IDLE_CLIENTS = 4096
"""Clients without open requests whose counters are remembered."""

Filter = Callable[[Client], bool]


class FairQueue:
    """Waiting sequences, and the account of every client. One thread only."""

    def __init__(self, ageing: float, max_num_seqs: int) -> None:
        """ageing: seconds, see above. max_num_seqs: how many sequences run at once."""
        self._ageing = ageing
        self._max_num_seqs = max_num_seqs
        self._clients: dict[ClientKey, Client] = {}
        self._active: dict[ClientKey, Client] = {}  # those with open requests
        self._floor = 0.0  # where a client starts when nobody is active
        self._size = 0
        self.total_weight = 0.0  # of active clients
        self.promised: dict[ClientKey, float] = {}  # tokens of this step that nobody is charged for yet

    # -- a request's life ----------------------------------------------------------------------------------------------

    def open(self, seq: Sequence, now: float) -> None:
        """Have a new request wait; its client is active from now on."""
        key = client_of(seq.request.tenant, seq.request.mix)
        client = self._clients.get(key)
        if client is None:
            client = self._clients[key] = Client(key)
        if not client.num_open:
            self._activate(client)
        client.num_open += 1
        if client.weight != seq.request.weight:
            client.weight = seq.request.weight
            self._weigh()
        flow = client.flows.get(seq.request.priority)
        if flow is None:
            flow = client.flows[seq.request.priority] = Flow(client, seq.request.priority)
        seq.flow = flow
        self.add(seq, now)

    def close(self, seq: Sequence) -> None:
        """Forget a request that has ended and does not wait any more."""
        client = seq.flow.client
        client.num_open -= 1
        if client.num_open == 0:
            client.flows.clear()
            del self._active[client.key]
            self._weigh()
            if not self._active:
                self._floor = client.counter
            if len(self._clients) - len(self._active) > MAX_IDLE_CLIENTS:
                self._forget()

    def add(self, seq: Sequence, now: float) -> None:
        """Have `seq` wait, for the first time or again."""
        flow = seq.flow
        client = flow.client
        if not flow.waiting:
            flow.served = max(flow.served, now)
        if not client.num_waiting:
            client.served = max(client.served, now)
        insort(flow.waiting, seq, key=by_age)
        client.num_waiting += 1
        self._size += 1

    def remove(self, seq: Sequence) -> None:
        """Take out `seq`, which was admitted or has ended."""
        waiting = seq.flow.waiting
        index = bisect_left(waiting, seq.number, key=by_age)
        assert waiting[index] is seq
        del waiting[index]
        seq.flow.client.num_waiting -= 1
        self._size -= 1

    def admitted(self, seq: Sequence, now: float) -> None:
        """Note that `seq`, removed before, runs now."""
        client = seq.flow.client
        client.served = seq.flow.served = now
        client.is_new = False
        if client.emptied:
            client.emptied, client.protected_until = False, client.counter + QUANTUM

    # -- the accounts --------------------------------------------------------------------------------------------------

    def charge(self, seq: Sequence, tokens: float, now: float) -> None:
        """Charge the client of `seq` for `tokens` at PROMPT_TOKEN and OUTPUT_TOKEN each."""
        flow = seq.flow
        client = flow.client
        client.counter += tokens / client.weight
        client.served = flow.served = now

    def promise(self, client: Client, tokens: float) -> None:
        """Count tokens given to `client` in the step being planned in its order, until the next step is planned."""
        self.promised[client.key] = self.promised.get(client.key, 0.0) + tokens / client.weight

    def lift(self, clients: set[Client]) -> None:
        """Lift clients that could not be served, as their adapters are still coming: they save up nothing by that."""
        lowest = min((c.counter for c in self._active.values() if c.num_running), default=NEVER)
        for client in clients:
            if not client.num_running:
                client.counter = max(client.counter, lowest)

    def share(self, client: Client) -> int:
        """Count the places that are an active client's by right: at least one, since a place cannot be divided."""
        return max(1, int(self._max_num_seqs * client.weight / self.total_weight))

    def is_below(self, client: Client) -> bool:
        """Return whether `client` has fewer places than its share."""
        return client.num_running < self.share(client)

    @property
    def num_clients(self) -> int:
        """Count the active clients."""
        return len(self._active)

    @property
    def spread(self) -> float:
        """Return the virtual tokens between the active client served most and the one served least."""
        counters = [client.counter for client in self._active.values()]
        return max(counters) - min(counters) if counters else 0.0

    # -- the order -----------------------------------------------------------------------------------------------------

    def order(self, now: float, wanted: Filter | None = None) -> Iterator[tuple[Sequence, float]]:
        """Yield waiting sequences of `wanted` clients, the next to be admitted first, with the urgency each comes with.

        Each may be remove()d when it is yielded; the places and promises that come of it count in what follows.
        """
        heap: list[tuple[tuple[float, ...], Sequence, float, Iterator[tuple[Sequence, float]]]] = []
        for client in self._active.values():
            if client.num_waiting and (wanted is None or wanted(client)):
                own = self._own_order(client, now)
                seq, urgency = next(own)
                if now - client.served >= self._ageing:
                    heap.append(((NEVER, client.served, float(seq.number)), seq, NEVER, own))
                else:
                    heap.append((self._key(client, seq, urgency), seq, urgency, own))
        heapify(heap)  # keys differ: the number in them is the sequence's own
        while heap:
            _, seq, urgency, own = heap[0]
            yield seq, urgency
            client = seq.flow.client
            following = next(own, None)
            if following is None or (wanted is not None and not wanted(client)):
                heappop(heap)
            else:
                heapreplace(heap, (self._key(client, *following), *following, own))

    def is_overdue(self, seq: Sequence, now: float) -> bool:
        """Return whether the client of `seq` has gone without service for too long."""
        return now - seq.flow.client.served >= self._ageing

    def __iter__(self) -> Iterator[Sequence]:
        """Yield all that wait, oldest first."""
        flows = [flow for client in self._active.values() for flow in client.flows.values()]
        return iter(sorted((seq for flow in flows for seq in flow.waiting), key=by_age))

    def __len__(self) -> int:
        return self._size

    def check_integrity(self) -> None:
        """Raise AssertionError unless the counts agree."""
        for client in self._clients.values():
            waiting = [seq for flow in client.flows.values() for seq in flow.waiting]
            assert len(waiting) == client.num_waiting, (
                f"{client.key}: {len(waiting)} wait, {client.num_waiting} counted"
            )
            assert client.num_waiting + client.num_running == client.num_open, f"{client.key}: open requests miscounted"
            assert bool(client.num_open) == (client.key in self._active), f"{client.key}: active or not"
            for flow in client.flows.values():
                ages = [seq.number for seq in flow.waiting]
                assert ages == sorted(set(ages)), f"not in the order of arrival: {ages}"
        assert self._size == sum(client.num_waiting for client in self._clients.values()), "the queue is miscounted"

    def _own_order(self, client: Client, now: float) -> Iterator[tuple[Sequence, float]]:
        """Yield a client's waiting sequences in its own order. Tolerates the removal of what was yielded last."""
        flows = [client.flows[p] for p in sorted(client.flows) if client.flows[p].waiting]
        first = float(flows[0].priority)
        passed_over = [flow for flow in flows[1:] if now - flow.served >= self._ageing]
        done = set()
        for flow in sorted(passed_over, key=lambda flow: flow.served):
            seq = flow.waiting[0]
            done.add(seq)
            yield seq, first
        for flow in flows:
            index = 0
            while index < len(flow.waiting):
                seq = flow.waiting[index]
                if seq not in done:
                    yield seq, float(flow.priority)
                if index < len(flow.waiting) and flow.waiting[index] is seq:
                    index += 1

    def _key(self, client: Client, seq: Sequence, urgency: float) -> tuple[float, ...]:
        counter = client.counter + self.promised.get(client.key, 0.0)
        has_share = 0.0 if self.is_below(client) else 1.0
        return urgency, has_share, counter, client.num_running / client.weight, float(seq.number)

    def _activate(self, client: Client) -> None:
        floor = min((other.counter for other in self._active.values()), default=self._floor)
        client.counter = max(client.counter, floor)
        client.is_new, client.emptied, client.protected_until = True, False, NEVER
        client.served = NEVER
        self._active[client.key] = client
        self._weigh()

    def _weigh(self) -> None:
        self.total_weight = sum(client.weight for client in self._active.values())

    def _forget(self) -> None:
        """Drop inactive clients: those that would be lifted anyway or, if they are few, all of them."""
        floor = min((client.counter for client in self._active.values()), default=self._floor)
        idle = [client for client in self._clients.values() if not client.num_open]
        lagging = [client for client in idle if client.counter <= floor]
        for client in lagging if 2 * len(lagging) > len(idle) else idle:
            del self._clients[client.key]
