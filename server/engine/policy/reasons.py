"""Why requests end before their time: the errors of sequences that cannot go on, in words."""

from __future__ import annotations

from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.request import DeadlineExceeded, NotANumber, OutOfMemory


def out_of_time(seq: Sequence) -> DeadlineExceeded:
    """Return the error of a sequence whose deadline has passed."""
    request = seq.request
    given = (request.deadline or request.arrival) - request.arrival
    done = f"{len(seq.output)} of at most {request.params.max_tokens} tokens were generated"
    return DeadlineExceeded(f"the request's {given:.3g} s are over: {done}")


def out_of_memory(tokens: int) -> OutOfMemory:
    """Return the error of a sequence that was alone in a step of `tokens` tokens, and had too little memory."""
    return OutOfMemory(f"a step of {tokens} tokens of this request alone needs more memory than can be allocated")


def not_a_number(seq: Sequence) -> NotANumber:
    """Return the error of a sequence whose logits are no numbers."""
    names = ", ".join(repr(lease.version.name) for lease, _ in seq.request.mix)
    worn = f"with adapter {names}" if names else "of the base"
    advice = "ask for the base, or load a working adapter" if names else "the checkpoint is damaged"
    return NotANumber(
        f"the logits {worn} are NaN or infinite after {seq.num_tokens} tokens, and no token was drawn: some value in "
        f"the model overflows; {advice}",
        with_adapter=bool(names),
    )
