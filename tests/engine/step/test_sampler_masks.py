"""Masks of grammars in the sampler, and scores of given tokens; numpy and log_softmax say what is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplex.kernels.ops import Backend
from loraplex.kernels.select import load_backend
from loraplex.server.engine.policy.rows import Drawn, Row
from loraplex.server.engine.request import SamplingParams
from loraplex.server.engine.step import sampler
from loraplex.server.engine.step.logit_changes import MaskBits
from loraplex.server.engine.step.scores import score
from tests.support.drawing import drawing_row

VOCAB = 37  # not a multiple of 8
OPS = load_backend("reference", "cpu")


def row(allowed: list[int] | None, **params: Any) -> tuple[Row, MaskBits | None]:
    bits = np.zeros(VOCAB, np.bool_)
    bits[allowed or []] = True
    mask = None if allowed is None else np.packbits(bits, bitorder="little")
    return drawing_row(SamplingParams(max_tokens=8, **params), 0, [1, 2], []), mask


def sample(logits: torch.Tensor, rows: list[tuple[Row, MaskBits | None]], ops: Backend) -> list[Drawn]:
    return sampler.sample(logits, [row for row, _ in rows], [mask for _, mask in rows], ops)


TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=VOCAB, unique=True)


@given(rows=st.lists(st.none() | TOKENS, min_size=1, max_size=6), seed=st.integers(0, 1000), greedy=st.booleans())
def test_only_what_is_allowed_is_drawn(rows: list[list[int] | None], seed: int, greedy: bool) -> None:
    """Whatever else bends the logits, and without a change for the rows that have no grammar."""
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 5
    before = logits.clone()
    bent: dict[str, Any] = {"repetition_penalty": 3.0, "logit_bias": ((0, 50.0), (36, -50.0)), "top_p": 0.9, "top_k": 5}
    bent |= {"temperature": 0.0 if greedy else 1.0, "seed": seed, "logprobs": 2}
    drawn = sample(logits, [row(allowed, **bent) for allowed in rows], OPS)
    free = sample(logits, [row(None, **bent) for _ in rows], OPS)
    assert torch.equal(logits, before)
    for allowed, token, plain, raw in zip(rows, drawn, free, logits, strict=True):
        if allowed is None:
            assert token == plain
        else:
            assert token.token_id in allowed
            assert token.top_logprobs == plain.top_logprobs  # of the model's own logits
            assert token.logprob == pytest.approx(float(raw.log_softmax(0)[token.token_id]), abs=1e-5)


def test_a_finished_grammar_may_stop_before_min_tokens() -> None:
    params: dict[str, Any] = {"min_tokens": 5, "stop_token_ids": frozenset({3}), "temperature": 0.0}
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 9
    assert sample(logits, [row([3], **params)], OPS)[0].token_id == 3
    assert sample(logits, [row([3, 7], **params)], OPS)[0].token_id == 7
    assert sample(logits, [row(None, **params)], OPS)[0].token_id == 0


@pytest.mark.parametrize("k", [0, 3, 100])
def test_scores(k: int) -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    ids = [0, 5, 36, 5, 1]
    expected = logits.log_softmax(1)
    scores = score(logits, ids, k, OPS)
    assert len(scores) == len(ids)
    for place, (token, wanted) in enumerate(zip(ids, expected, strict=True)):
        top = scores.top(place)
        assert scores.logprobs[place] == pytest.approx(float(wanted[token]), abs=1e-5)
        assert [token for token, _ in top] == wanted.argsort(descending=True).tolist()[:k]
        assert [value for _, value in top] == pytest.approx(sorted(wanted.tolist(), reverse=True)[:k], abs=1e-5)


def test_on_the_cpu_the_kernels_threads_sum_up_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's would wait for each other 25 times a sum: 100 ms for 64 rows where the cores are wanted by others."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("torch sums up rows")

    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    for name in ("logsumexp", "log_softmax", "softmax"):
        monkeypatch.setattr(torch.Tensor, name, never)
    assert len(score(logits, [0, 1, 2, 3], 2, load_backend("cpu", "cpu"))) == 4
    drawn = sample(logits, [row(None, logprobs=3), row([1, 2], logprobs=1)] * 2, load_backend("cpu", "cpu"))
    assert [len(each.top_logprobs) for each in drawn] == [3, 1, 3, 1]
