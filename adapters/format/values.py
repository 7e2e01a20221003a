"""Check what the tensors of an adapter hold: finite numbers, within the compute dtype, and some effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.image.tiles import BaseLayout, BiasDelta, LowRank
from loraplex.kernels.records import Projection

_CANCELLED = 2.0**-20
"""B A smaller than this beside A and B is what rounding leaves of equal terms."""


def check_finite(tensors: Mapping[str, Tensor], throttle: Callable[[], None]) -> None:
    """Raise AdapterRefused("not_finite"), which names the tensor, where a value is NaN or infinite."""
    for name, tensor in tensors.items():
        throttle()
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise AdapterRefused(
                "not_finite", f"{name} has {bad} values of {tensor.numel()} that are NaN or infinite; expected none"
            )


def check_indices(indices: Tensor, count: int, name: str) -> None:
    """Raise AdapterRefused("bad_file") where the tensor `name`, whole numbers, points beyond `count` things."""
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= count):
        raise AdapterRefused(
            "bad_file",
            f"{name} points at {int(indices.min())} to {int(indices.max())}; expected from 0 to {count - 1}",
        )


def check_rounded(exact: Tensor, name: str, what: str, layout: BaseLayout) -> bool:
    """Whether any of `exact` is left in the compute dtype; what is beyond it raises AdapterRefused("not_finite")."""
    rounded = exact.to(layout.dtype)
    if not rounded.isfinite().all():
        dtype = str(layout.dtype).removeprefix("torch.")
        raise AdapterRefused(
            "not_finite",
            f"{name}: {what} reaches {float(exact.float().abs().max()):.4g}, more than {dtype}, in which the base "
            f"runs, can hold ({torch.finfo(layout.dtype).max:.5g})",
        )
    return bool(rounded.any())


def make_bias(layer: int, projection: Projection, delta: Tensor, name: str, layout: BaseLayout) -> BiasDelta | None:
    """Make the part that adds `delta`, [out] fp32, which came of the tensor `name`; None where it adds nothing.

    Raises AdapterRefused("not_finite") for what the compute dtype does not hold.
    """
    if not delta.to(layout.dtype).isfinite().all():
        raise AdapterRefused(
            "not_finite", f"{name}: as an addition to the base's bias it is more than {layout.dtype} holds"
        )
    return BiasDelta(layer, projection, delta) if delta.any() else None


def cancels(part: LowRank) -> bool:
    """Whether B A is zero though neither is (an adapter that is the difference of two equal ones)."""
    a, b = part.a.float(), part.b.float()
    least = _CANCELLED * float(a.abs().max()) * float(b.abs().max())
    # not by matmul: on a loader's thread it starts a team of threads, which then waits for cores with it
    return all(float((row[:, None] * a).sum(0).abs().max()) <= least for row in b)


def no_effect(reasons: Iterable[str]) -> AdapterRefused:
    """Make the refusal of an adapter that changes nothing."""
    return AdapterRefused(
        "no_effect",
        f"the adapter changes nothing in any module ({'; '.join(dict.fromkeys(reasons))}); it would answer as the base "
        "does. Was it saved before it was trained?",
    )
