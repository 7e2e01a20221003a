"""Picking tokens in plain PyTorch: the semantics of argmax and sample, and how backends without kernels do it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLDEST = 1e-6
"""Lower temperatures draw as this one does, which is greedily but for near-equal logits; in fp32 they would be 0."""


class TorchSampling:
    """Backend.argmax and Backend.sample."""

    def argmax(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def sample(
        self,
        logits: Tensor,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        uniform: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        best = self.argmax(logits).tolist()
        rows = zip(logits, best, temperature, top_k, top_p, min_p, uniform, strict=True)
        ids = [
            token if warmth == 0.0 else draw(row, warmth, k, p, least, u) for row, token, warmth, k, p, least, u in rows
        ]
        drawn = torch.tensor(ids, dtype=torch.int64, device=logits.device)
        return drawn, logits.gather(1, drawn.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """One row [V] of Backend.sample, temperature above 0."""
    top = logits.max()
    if not top.isfinite():  # NaN, or everything is forbidden: there is nothing to draw from
        return int(logits.argmax())
    ids = None
    if 0 < top_k < logits.shape[0]:  # first, so that the rest is about k tokens and not the vocabulary
        ids = (logits >= logits.topk(top_k, sorted=False).values.min()).nonzero().squeeze(1)
        logits = logits[ids]
    # 1 for the likeliest: no overflow at any temperature.
    weights = ((logits - top) / max(temperature, COLDEST)).exp_()
    if top_p < 1.0:
        weights.masked_fill_(~_nucleus(weights, top_p), 0.0)
    if min_p > 0.0:
        weights.masked_fill_(weights < min_p, 0.0)
    cumulative = weights.cumsum(0, dtype=torch.float64)
    # The first that is above, so never a token whose own weight is 0.
    index = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    index = min(index, cumulative.shape[0] - 1)
    return index if ids is None else int(ids[index])


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """[V] bool: the fewest tokens, likeliest first and then by id, that make up `top_p` of all weight.

    Weights in [0, 1] are put into 16,257 bins by the upper half of their bits, which orders them; only the bin where
    the sum is reached is sorted: 0.2 ms for 49,152 tokens on one CPU core, where sorting them takes 8 ms.
    """
    bins = weights.view(torch.int32) >> 16
    mass = torch.bincount(bins, weights.double()).flip(0).cumsum(0)  # from the likeliest bin down
    goal = top_p * float(mass[-1])
    reached = min(int(torch.searchsorted(mass, goal)), mass.shape[0] - 1)
    edge = mass.shape[0] - 1 - reached
    keep = bins > edge
    ids = (bins == edge).nonzero().squeeze(1)
    values, order = weights[ids].sort(descending=True, stable=True)
    within = values.cumsum(0, dtype=torch.float64)
    missing = goal - (float(mass[reached - 1]) if reached else 0.0)
    keep[ids[order[: int(torch.searchsorted(within, missing)) + 1]]] = True
    return keep
