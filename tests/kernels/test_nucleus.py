"""top_p of the plain sampler (kernels/sampling.py), which bins weights instead of sorting them, against a sort."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraplex.kernels.sampling import _nucleus


def _plain_nucleus(weights: Tensor, top_p: float) -> tuple[set[int], float]:
    """By sorting; and how near to the goal the sum came before its last token, relative to all."""
    w = weights.double().numpy()
    order = np.lexsort((np.arange(len(w)), -w))
    cumulative = np.cumsum(w[order])
    goal = top_p * w.sum()
    n = int(np.argmax(cumulative >= goal)) + 1 if cumulative[-1] >= goal else len(w)
    return set(order[:n].tolist()), float(np.abs(cumulative - goal).min() / w.sum())


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([1, 2, 50, 5000, 49_152]),
    scale=st.sampled_from([0.0, 1e-4, 0.5, 3.0, 40.0]),
    steps=st.sampled_from([None, 3]),
    top_p=st.floats(0.0, 1.0, exclude_max=True),
)
def test_top_p_keeps_what_sorting_keeps(seed: int, vocab: int, scale: float, steps: int | None, top_p: float) -> None:
    """Also among many equal ones (the lowest ids), for flat and for steep distributions."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale
    if steps is not None:
        logits = (logits * steps).round() / steps
    weights = (logits - logits.max()).exp()
    kept = set(_nucleus(weights, top_p).nonzero().squeeze(1).tolist())
    expected, nearness = _plain_nucleus(weights, top_p)
    if nearness > 1e-12:  # else the order of summing decides
        assert kept == expected
    else:
        assert abs(len(kept) - len(expected)) <= 1
