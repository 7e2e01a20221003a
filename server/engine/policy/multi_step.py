"""How many decode steps may follow one another before the scheduler is asked again.

Planning a step, building its batch and beginning it keeps all cores but one from the kernels. Where a step would only
be followed by the like of it, several are computed in one call. It ends early with a request that has its last token,
and with the step in which anybody comes in or leaves (the halt of Engine), so nobody waits longer than for one step;
and what each step drew is delivered while the next one runs (step/following.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from loraplex.server.engine.policy.plan import SchedulerLimits
from loraplex.server.engine.policy.sequence import Sequence

CALL_SECONDS = 0.08
"""Of one call at most: deadlines are looked at between two. It is also the longest that tokens wait for each other,
where the thread that delivers them comes to no core: a reader sees twelve a second as a flow."""


def steps_in_a_row(seqs: Iterable[Sequence], limits: SchedulerLimits, step_seconds: float) -> int:
    """Count the steps these sequences, with a decode row each, may take in a row; one takes about `step_seconds`."""
    most = min(limits.decode_steps, int(CALL_SECONDS / max(step_seconds, 1e-6)))
    for seq in seqs:
        if most <= 1:
            return 1
        most = min(most, _steps_of(seq, limits))
    return max(most, 1)


def _steps_of(seq: Sequence, limits: SchedulerLimits) -> int:
    """Count the steps until something about `seq` is to be decided that the kernels know nothing of."""
    request, generated = seq.request, len(seq.output)
    params = request.params
    if request.constraint is not None or params.logprobs is not None or params.changes_logits(generated):
        return 1
    most = params.max_tokens - generated
    if limits.rope_switch is not None and seq.num_tokens <= limits.rope_switch:
        most = min(most, limits.rope_switch + 1 - seq.num_tokens)
    return most
