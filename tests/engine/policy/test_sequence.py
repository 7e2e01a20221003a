"""A sequence: what it misses, what its next row is, what it wears, and when it ends."""

from __future__ import annotations

from dataclasses import replace

from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.request import FinishReason
from tests.support.scheduling import Requests


def test_computed_chases_known() -> None:
    seq = Sequence(0, Requests().make(3, 5))
    assert (seq.num_tokens, seq.num_missing, seq.is_decode) == (3, 3, False)
    seq.num_computed = 2
    assert (seq.num_missing, seq.is_decode) == (1, False), "one token, but of the prompt"
    seq.num_computed = 3
    seq.append(9)
    assert (seq.num_missing, seq.is_decode) == (1, True)
    seq.append(8)
    assert (seq.num_missing, seq.is_decode) == (2, False)
    assert seq.tokens == [1, 2, 3, 9, 8]
    assert seq.output == [9, 8]


def test_the_mix_is_in_one_order_however_it_was_asked_for() -> None:
    requests = Requests()
    for name in ("z", "a", "m"):
        requests.adapter(name)
    there = requests.make(2, 2, "z", "a", "m")
    back = replace(there, mix=there.mix[::-1])
    first, second = Sequence(0, there), Sequence(1, back)
    first.bind()
    second.bind()
    assert first.mix == second.mix
    assert [digest for digest, _ in first.mix] == ["digest-a", "digest-m", "digest-z"]
    assert [version.name for version in second.versions] == ["a", "m", "z"]


def test_ends() -> None:
    seq = Sequence(0, Requests().make(3, 2, stop_token_ids=frozenset({7})))
    seq.append(5)
    assert seq.finish_after(5) is None
    assert seq.finish_after(7) is FinishReason.STOP
    seq.append(5)
    assert seq.finish_after(5) is FinishReason.LENGTH
    assert seq.finish_after(7) is FinishReason.STOP, "a stop token in the last place is still a stop"
