"""How a step's tokens are shared by those that compute prompts, where there are not enough. Integers, free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListLike

from loraplex.server.engine.sequence import Sequence

ChunkOrder = Callable[[Sequence], tuple[float, float, int]]  # urgency, the client's counter, age


def share_out(
    seqs: ListLike[Sequence], decoding: Iterable[Sequence], budget: int, left: int, order: ChunkOrder
) -> dict[Sequence, int]:
    """Cut the `left` tokens of a step of `budget` into chunks for `seqs`, which miss more than that together.

    The more urgent come first. Among equals each client first gets what its rows in `decoding` leave of its share, the
    budget by weight among all clients in the step; what nobody has a right to goes by counter, then age. So a client's
    prompt moves on by its share in every step, however long the prompts of others are.
    """
    decoding = tuple(decoding)
    clients = {seq.flow.client for seq in (*decoding, *seqs)}
    per_weight = budget / sum(client.weight for client in clients)
    due = {client: int(per_weight * client.weight) for client in clients}
    for seq in decoding:
        due[seq.flow.client] -= 1
    chunks = dict.fromkeys(sorted(seqs, key=order), 0)
    by_urgency: dict[float, list[Sequence]] = {}
    for seq in chunks:
        by_urgency.setdefault(order(seq)[0], []).append(seq)
    for equals in by_urgency.values():
        for by_right in (True, False):
            for seq in equals:
                client = seq.flow.client
                most = min(seq.num_missing - chunks[seq], left)
                count = max(0, min(most, due[client])) if by_right else most
                chunks[seq] += count
                due[client] -= count
                left -= count
    return chunks
