"""How far a result in a short dtype may lie from an exact one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Exact = NDArray[np.float64]


def exact(x: Tensor) -> Exact:
    """The values of `x` as they stand, in fp64."""
    return x.detach().cpu().double().numpy()


def rounded(x: Exact, dtype: torch.dtype) -> Exact:
    """fp64 -> dtype -> fp64."""
    return exact(torch.from_numpy(np.asarray(x)).to(dtype))


def assert_near(
    actual: Tensor, expected: Exact, terms: Exact | float = 0.0, wobble: Exact | float = 0.0, ulps: float = 1.0
) -> None:
    """Elementwise: a sum in fp32, rounded once, lies this near to the exact one. NaN and infinity fail.

    `ulps` roundings of the result, in its dtype; `terms`, the sum of absolute terms: what summing them in fp32 in some
    order may cost; `wobble`: magnitudes of further values rounded to the dtype on the way.
    """
    found = exact(actual)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    assert np.isfinite(found).all(), f"{np.count_nonzero(~np.isfinite(found))} values are not finite"
    eps = torch.finfo(actual.dtype).eps
    bound = eps * (ulps * np.abs(expected) + wobble) + 8 * torch.finfo(torch.float32).eps * np.asarray(terms)
    excess = np.abs(found - expected) - bound
    if excess.size:
        worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
        assert excess[worst] <= 0.0, f"at {worst}: {found[worst]}, expected {expected[worst]} within {bound[worst]}"


def share_equal(actual: Tensor, expected: Exact) -> float:
    """Share of elements equal to `expected` after rounding it to actual's dtype."""
    return float(np.mean(exact(actual) == rounded(expected, actual.dtype)))
