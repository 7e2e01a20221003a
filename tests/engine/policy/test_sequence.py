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


def test_an_invocation_is_looked_for_in_the_prompt_alone_and_chunks_do_not_move_it() -> None:
    requests = Requests()
    requests.adapter("plain")
    requests.adapter("asked", invocation=(3, 4))
    requests.adapter("absent", invocation=(4, 3))
    seq = Sequence(0, requests.make(6, 9, "plain", "asked", "absent"))  # tokens 1 to 6
    seq.bind()
    seq.slots = ((0, 1.0), (1, 1.0), (2, 1.0))  # absent, asked, plain, in the order of their digests
    for token in (9, 4, 3, 4, 3, 4):
        seq.append(token)
    plain, both = ((2, 1.0),), ((1, 1.0), (2, 1.0))
    assert (seq.row(6, ()).mix, seq.row(6, ()).earlier) == (both, ((2, plain),))
    assert (seq.row(2, ()).mix, seq.row(2, ()).earlier) == (plain, ())
    for done in range(2, 12):
        seq.num_computed = done
        assert (seq.row(1, ()).mix, seq.row(1, ()).earlier) == (both, ())
    seq.start_over()
    assert (seq.row(12, ()).mix, seq.row(12, ()).earlier) == (both, ((2, plain),))


def test_what_is_cached_before_an_invocation_is_what_the_others_wear() -> None:
    requests = Requests()
    requests.adapter("plain")
    requests.adapter("asked", invocation=(3, 4))
    roots = {}
    for adapters in ((), ("plain",), ("asked",), ("plain", "asked")):
        seq = Sequence(0, requests.make(6, 9, *adapters))
        seq.bind()
        seq.share_prefix(None)
        roots[adapters] = (seq.cache_root, seq.turns)
    (base, none), (plain, _), (asked, turns), (both, more) = roots.values()
    assert base == asked != plain == both
    assert [position for position, _ in turns] == [position for position, _ in more] == [2]
    assert none == () != turns != more


def test_ends() -> None:
    seq = Sequence(0, Requests().make(3, 2, stop_token_ids=frozenset({7})))
    seq.append(5)
    assert seq.finish_after(5) is None
    assert seq.finish_after(7) is FinishReason.STOP
    seq.append(5)
    assert seq.finish_after(5) is FinishReason.LENGTH
    assert seq.finish_after(7) is FinishReason.STOP, "a stop token in the last place is still a stop"
