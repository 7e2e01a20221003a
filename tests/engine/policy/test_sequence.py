"""A sequence: what it misses, what its next row is, what it wears, and when it ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loraplex.adapters.front import Front
from loraplex.adapters.positions import Positions
from loraplex.adapters.tiers.pages import PagePool
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.kv_groups import GroupSpec
from loraplex.server.engine.policy.row_of import row_of
from loraplex.server.engine.policy.rows import RowFront, Want
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
    assert (row_of(seq, 6, ()).mix, row_of(seq, 6, ()).earlier) == (both, ((2, plain),))
    assert (row_of(seq, 2, ()).mix, row_of(seq, 2, ()).earlier) == (plain, ())
    for done in range(2, 12):
        seq.num_computed = done
        assert (row_of(seq, 1, ()).mix, row_of(seq, 1, ()).earlier) == (both, ())
    seq.start_over()
    assert (row_of(seq, 12, ()).mix, row_of(seq, 12, ()).earlier) == (both, ((2, plain),))


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


def test_first_and_last_positions_are_the_prompts_and_chunks_do_not_move_them() -> None:
    requests = Requests()
    requests.adapter("edit", positions=Positions(2, 1, units=2))
    requests.adapter("plain")
    seq = Sequence(0, requests.make(6, 9, "edit", "plain"))
    seq.bind()
    assert [(entry.digest, entry.unit) for entry in seq.entries] == [
        *(("digest-edit", 0), ("digest-edit", 1)),
        ("digest-plain", 0),
    ]
    first, last, plain = seq.slots = ((0, 1.0), (7, 1.0), (1, 1.0))
    for token in (9, 9):
        seq.append(token)
    wanted = [(first, plain)] * 2 + [(plain,)] * 3 + [(last, plain)] + [(plain,)] * 2
    for start in range(8):
        for count in range(1, 9 - start):
            seq.num_computed = start
            row = row_of(seq, count, ())
            worn = [mix for times, mix in row.earlier for _ in range(times)]
            assert [*worn, *[row.mix] * (count - len(worn))] == wanted[start : start + count]


def test_what_is_cached_of_a_prompt_depends_on_its_length_from_the_last_positions_on() -> None:
    requests = Requests()
    requests.adapter("edit", positions=Positions(0, 2))
    kv = KVCache(PagePool(40), (GroupSpec((0,), None),), 4)
    found = []
    for number, (length, adapters) in enumerate(((16, ()), (16, ("edit",)), (17, ("edit",)), (16, ("edit",)))):
        seq = Sequence(number, requests.make(length, 9, *adapters))
        seq.append(9)  # as after a preemption: all of the prompt may be found
        seq.bind()
        seq.share_prefix(None)
        found.append(kv.adopt(number, seq.cache_root, seq.tokens, seq.turns))
        assert kv.grow(number, found[-1], length)
        kv.publish(number, seq.cache_root, seq.tokens, length, seq.turns)
    assert found == [0, 12, 12, 16], "of the fourth block the last two tokens wear it, the last one, or none"
    longer = Sequence(9, requests.make(20, 9, "edit"))
    longer.bind()
    longer.share_prefix(None)
    assert kv.adopt(9, longer.cache_root, longer.tokens, longer.turns) == 16, "the base's, which it wears there"


COMPUTED, STORED = Front(5, stored=False, width=64), Front(5, stored=True, width=64)


def fronted(front: Front, *more: str, prompt: int = 6, **params: object) -> Sequence:
    """A sequence with `front` before a prompt of tokens 1, 2, ..., its adapter in slot 3, and others of the mix."""
    requests = Requests()
    requests.adapter("front", front=front)
    for name in more:
        requests.adapter(name, invocation=(3, 4) if name == "asked" else ())
    seq = Sequence(0, requests.make(prompt, 9, "front", *more, **params))
    seq.bind()
    seq.slots = tuple((3 if digest == "digest-front" else 0, 1.0) for digest, _ in seq.mix)
    return seq


def test_virtual_tokens_are_tokens_of_the_sequence() -> None:
    seq = fronted(COMPUTED)
    assert seq.tokens == [-1, -2, -3, -4, -5, 1, 2, 3, 4, 5, 6]
    assert (seq.num_front, seq.num_prompt, seq.num_tokens) == (5, 11, 11)
    first, last = row_of(seq, 3, ()), row_of(seq, 11, ())
    assert (first.front, first.mix, list(first.tokens)) == (RowFront(3, COMPUTED, 0, 3), (), [-1, -2, -3])
    assert last.front == RowFront(3, COMPUTED, 0, 5)
    seq.begin_at(4)
    assert row_of(seq, 2, ()).front == RowFront(3, COMPUTED, 4, 5)
    seq.begin_at(5)
    assert row_of(seq, 2, ()).front is None


def test_stored_ones_come_with_the_first_row_and_are_never_computed() -> None:
    seq = fronted(STORED)
    seq.begin_at(4)
    assert (seq.num_computed, seq.num_missing) == (5, 6)
    row = row_of(seq, 2, ())
    assert (row.start, list(row.tokens), row.front) == (5, [1, 2], RowFront(3, STORED, 4, 5))
    seq.num_computed = 7
    assert row_of(seq, 2, ()).front is None
    seq.start_over()
    seq.begin_at(0)
    assert row_of(seq, 1, ()).front == RowFront(3, STORED, 0, 5)
    seq.begin_at(8)
    assert (seq.num_computed, row_of(seq, 1, ()).front) == (8, None)
    seq.begin_at(5)
    assert row_of(seq, 1, ()).front is None, "all of it was found"


def test_others_of_the_mix_act_on_virtual_tokens_and_an_invocation_is_behind_them() -> None:
    seq = fronted(COMPUTED, "plain", "asked")  # the invocation is at 2 of the prompt
    row = row_of(seq, 11, ())
    assert [count for count, _ in row.earlier] == [7]
    assert len(row.earlier[0][1]) == 1
    assert len(row.mix) == 2
    assert 3 not in dict(row.mix), "what stands in front acts nowhere"


def test_what_is_wanted_of_a_prompt_is_not_of_virtual_tokens() -> None:
    scored = fronted(COMPUTED, prompt_logprobs=0)
    assert row_of(scored, 3, ()).want is None
    assert row_of(scored, 6, ()).want == Want(range(5, 6), [2], 0)
    assert row_of(scored, 11, ()).want == Want(range(5, 10), [2, 3, 4, 5, 6], 0)
    pooled = fronted(COMPUTED)
    pooled.request = replace(pooled.request, pooling="mean")
    assert row_of(pooled, 4, ()).want is None
    assert row_of(pooled, 7, ()).want == Want(range(5, 7), None)
    pooled.pooled = np.full(2, 12.0, np.float32)
    assert pooled.embedding is not None
    assert pooled.embedding.tolist() == [2.0, 2.0]


def test_what_stands_in_front_is_cached_for_all_tenants() -> None:
    seqs = [fronted(COMPUTED), fronted(COMPUTED), fronted(COMPUTED, "plain"), fronted(STORED)]
    seqs[1].request = replace(seqs[1].request, tenant="other")
    for seq in seqs:
        seq.share_prefix(None)
    own, other, mixed, stored = seqs
    assert own.cache_root == other.cache_root == stored.cache_root != mixed.cache_root
    assert [position for position, _ in own.turns] == [5] == [position for position, _ in other.turns]
    assert own.turns != other.turns
    assert own.turns == stored.turns


def test_ends() -> None:
    seq = Sequence(0, Requests().make(3, 2, stop_token_ids=frozenset({7})))
    seq.append(5)
    assert seq.finish_after(5) is None
    assert seq.finish_after(7) is FinishReason.STOP
    seq.append(5)
    assert seq.finish_after(5) is FinishReason.LENGTH
    assert seq.finish_after(7) is FinishReason.STOP, "a stop token in the last place is still a stop"
