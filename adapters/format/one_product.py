"""The sum of two low-rank products that nearly cancel, as one: what is left is rounded as the small change it is."""

from __future__ import annotations

import torch
from torch import Tensor


def one_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute factors of b a, [k, in] with rows of length 1 and [out, k], fp32, and its singular values; a and b alike.

    b a = Qb (Rb Ra^T) Qa^T, and the small matrix between is taken apart into singular values. Where the module is
    narrower than k the last rows and columns are 0.
    """
    qa, ra = torch.linalg.qr(a.double().T)
    qb, rb = torch.linalg.qr(b.double())
    left, values, right = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    ranks = len(values)
    new_a, new_b = torch.zeros(a.shape), torch.zeros(b.shape)
    new_a[:ranks] = right @ qa.T
    new_b[:, :ranks] = qb @ (left * values)
    return new_a, new_b, values
