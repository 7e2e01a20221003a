"""Whose prompt tokens a step computes, where more are missing than it has room for. Numbers only.

Cut into a piece for every client in every step, prompts that come together all end together, when the last one does. So
they are computed whole, one after the other: of n equal ones half have ended by half of that time. First comes the one
after which its client would have been served least. That is a short one before a long one, the prompt of a client that
had little before that of one that had much, and one that is begun before its equals: what a prompt has moved on by, its
client is charged. Beside it the oldest prompt of another client moves on by its share of the step, so nobody is passed
over for ever, and of two clients neither waits for the other (a share is used up by decode rows first).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListLike

from loraplex.server.engine.policy.clients import Client, by_age
from loraplex.server.engine.policy.fair_queue import PROMPT_TOKEN
from loraplex.server.engine.policy.sequence import Sequence

Urgency = Callable[[Sequence], float]


def share_out(
    seqs: ListLike[Sequence], decoding: Iterable[Sequence], room: int, urgency_of: Urgency
) -> dict[Sequence, int]:
    """Cut the `room` of a step, in what tokens cost, into chunks of tokens for `seqs`, which miss more together.

    The more urgent come first. A client's share is its part by weight of what the step has for clients of `seqs`, less
    its rows in `decoding`.
    """
    shares = _shares(seqs, decoding, room)
    chunks: dict[Sequence, int] = {}
    by_urgency: dict[float, list[Sequence]] = {}
    for seq in seqs:
        by_urgency.setdefault(urgency_of(seq), []).append(seq)
    for _, equals in sorted(by_urgency.items()):
        ordered = _ordered(equals)
        first = ordered[0].flow.client
        chunks.update(dict.fromkeys(ordered, 0))
        others = [seq for seq in equals if seq.flow.client is not first and shares[seq.flow.client] > 0]
        for seq in sorted(others, key=by_age)[:1]:
            chunks[seq] = seq.affordable(min(shares[seq.flow.client], max(room, 0)))
            room -= seq.cost(chunks[seq])
        for seq in ordered:
            count = min(seq.num_missing - chunks[seq], seq.affordable(max(room, 0)))
            chunks[seq] += count
            room -= seq.cost(count)
    return chunks


def _ordered(seqs: ListLike[Sequence]) -> list[Sequence]:
    """Order prompts by what the client's counter would be after each; a client's own by age."""
    after: dict[Sequence, float] = {}
    counters: dict[Client, float] = {}
    for seq in sorted(seqs, key=by_age):
        client = seq.flow.client
        counter = counters.get(client, client.counter) + PROMPT_TOKEN * seq.cost(seq.num_missing) / client.weight
        after[seq] = counters[client] = counter
    return sorted(seqs, key=lambda seq: (after[seq], seq.number))


def _shares(seqs: ListLike[Sequence], decoding: Iterable[Sequence], room: int) -> dict[Client, int]:
    """Count the tokens each client of `seqs` has a right to; none or less where its decode rows are more than that."""
    clients = {seq.flow.client for seq in seqs}
    rows = dict.fromkeys(clients, 0)
    for seq in decoding:
        if seq.flow.client in rows:
            rows[seq.flow.client] += 1
    per_weight = (room + sum(rows.values())) / sum(client.weight for client in clients)
    return {client: int(per_weight * client.weight) - rows[client] for client in clients}
