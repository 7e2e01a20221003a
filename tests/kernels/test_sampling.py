"""Greedy picks and draws against a sort in double precision, over every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from loraplex.kernels.ops import Backend

VOCABS = (1, 15, 16, 255, 256, 300, 5000, 49152)
UNIFORMS = (0.0, 1e-9, 0.1, 0.37, 0.5, 0.93, 1.0 - 2.0**-53)


def kept_weights(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> NDArray[np.float64]:
    """[V] fp64: what a draw may fall on, by sorting everything."""
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / max(temperature, 1e-6))
    if 0 < top_k < len(logits):
        weights[logits < np.sort(logits)[-top_k]] = 0.0
    kept = weights.copy()
    if top_p < 1.0:
        order = np.argsort(-logits.astype(np.float64), kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        kept[order[before >= top_p * weights.sum()]] = 0.0
        kept[order[0]] = weights[order[0]]
    if min_p > 0.0:
        kept[weights < min_p] = 0.0
    return kept


def admitted(weights: NDArray[np.float64], u: float, slack: float = 1e-5) -> set[int]:
    """The ids a draw may give whose weights are right to `slack` of their sum."""
    ends = np.cumsum(weights) / weights.sum()
    starts = ends - weights / weights.sum()
    return set(np.nonzero((starts <= u + slack) & (ends > u - slack) & (weights > 0))[0].tolist())


def draw(backend: Backend, logits: Tensor, **kind: float) -> tuple[list[int], list[float]]:
    """One draw for each row of logits [N, V]; `kind` names what is the same for all."""
    n = logits.shape[0]
    usual = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "uniform": 0.5, **kind}
    ids, logprobs = backend.sample(
        logits.to(backend.device),
        [usual["temperature"]] * n,
        [int(usual["top_k"])] * n,
        [usual["top_p"]] * n,
        [usual["min_p"]] * n,
        [usual["uniform"]] * n,
    )
    return ids.tolist(), logprobs.tolist()


@pytest.mark.parametrize("vocab", VOCABS)
def test_argmax_takes_the_lowest_of_equals(backend: Backend, vocab: int) -> None:
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab)).round(decimals=1)
    found = backend.argmax(logits.to(backend.device)).tolist()
    assert found == [row.index(max(row)) for row in logits.tolist()]
    assert draw(backend, logits, temperature=0.0)[0] == found


def test_argmax_of_rows_without_a_finite_largest(backend: Backend) -> None:
    logits = torch.zeros(4, 600)
    logits[0] = -math.inf
    logits[1, [70, 590]] = math.nan
    logits[1, 3] = math.inf
    logits[2, [40, 41]] = math.inf
    logits[3, 599] = math.nan
    assert backend.argmax(logits.to(backend.device)).tolist() == [0, 70, 40, 599]
    assert draw(backend, logits, top_k=5, top_p=0.5)[0] == [0, 70, 40, 599]


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (1, 1.0, 0.0), (40, 1.0, 0.0), (4000, 0.95, 0.0), (0, 0.9, 0.0), (0, 0.3, 0.02), (50, 0.8, 0.1)],
)
def test_draws(backend: Backend, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Logits with many ties, so that the k-th largest and the nucleus' edge fall among equals."""
    generator = torch.Generator().manual_seed(vocab + top_k)
    logits = torch.randn(len(UNIFORMS), vocab, generator=generator).mul_(3).mul_(8).round_().div_(8)
    kinds = zip(*((temperature, top_k, top_p, min_p, u) for u in UNIFORMS), strict=True)
    ids, logprobs = backend.sample(logits.to(backend.device), *(list(kind) for kind in kinds))  # type: ignore[arg-type]
    log_softmax = torch.log_softmax(logits.double(), -1)
    for row, u, token in zip(logits, UNIFORMS, ids.tolist(), strict=True):
        weights = kept_weights(row.numpy(), temperature, top_k, top_p, min_p)
        assert token in admitted(weights, u), (token, u)
    expected = log_softmax.gather(1, ids.cpu().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs.cpu().double(), expected, rtol=0, atol=2e-5)


@given(
    values=st.lists(st.integers(-24, 24), min_size=1, max_size=700),
    temperature=st.sampled_from([1e-9, 0.05, 0.7, 1.0, 1.9]),
    top_k=st.integers(0, 30),
    top_p=st.sampled_from([0.0, 0.05, 0.5, 0.77, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    u=st.floats(0.0, 1.0, exclude_max=True),
)
@settings(max_examples=150, deadline=None)
def test_any_draw(
    backend: Backend, values: list[int], temperature: float, top_k: int, top_p: float, min_p: float, u: float
) -> None:
    logits = torch.tensor(values, dtype=torch.float32).div_(4)
    ids, _ = draw(backend, logits[None], temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=u)
    # Where the nucleus ends exactly at an edge, rounding may put one token more or less into it.
    allowed = {
        token
        for p in ({top_p} if top_p in (0.0, 1.0) else {top_p - 1e-6, top_p + 1e-6})
        for token in admitted(kept_weights(logits.numpy(), temperature, top_k, p, min_p), u)
    }
    assert ids[0] in allowed


def test_equal_weights_at_the_edge_of_the_nucleus_are_kept_by_id(backend: Backend) -> None:
    logits = torch.zeros(1, 1000)
    ids = {draw(backend, logits, top_p=0.0035, uniform=u)[0][0] for u in (0.0, 0.26, 0.51, 0.76, 0.999)}
    assert ids == {0, 1, 2, 3}


def test_forbidden_tokens_are_never_drawn(backend: Backend) -> None:
    logits = torch.full((1, 700), -math.inf)
    logits[0, [3, 400]] = torch.tensor([1.0, 1.0])
    for u in UNIFORMS:
        assert draw(backend, logits, uniform=u, temperature=5.0)[0] == [3 if u < 0.5 else 400]
        assert draw(backend, logits, uniform=u, top_k=600, top_p=0.999)[0] == [3 if u < 0.5 else 400]


def test_a_row_is_drawn_as_if_alone(backend: Backend) -> None:
    """Rows of all kinds together and one by one."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, 3000, generator=generator).to(backend.device)
    uniform = torch.rand(40, generator=generator).tolist()
    kinds = ([0.0, 0.8, 1.3, 1.0] * 10, [0, 20] * 20, [0.9, 1.0, 0.5, 0.95, 1.0] * 8, [0.0, 0.05] * 20, uniform)
    ids, logprobs = backend.sample(logits, *kinds)
    for i in range(40):
        one, logprob = backend.sample(logits[i : i + 1], *([kind[i]] for kind in kinds))  # type: ignore[arg-type]
        assert one.tolist() == [ids[i].item()]
        assert logprob.tolist() == [logprobs[i].item()]
    assert len(set(ids.tolist())) > 20
