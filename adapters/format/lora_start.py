"""Take out of a LoRA's factors what PiSSA, OLoRA or KaSA took out of the base's weights before training.

PEFT trains s B A beside W - s B0 A0, which it computes from W and never saves. Over W itself the adapter therefore is
s B A - s B0 A0, of twice the rank. Both products are the largest part of W and nearly equal, so they are brought to
one before anything is rounded (one_product.py).

    pissa    s B0 A0 = U_r S_r V_r^T, the r largest singular parts of W (arXiv 2404.02948)
    olora    B0 A0 = Q_r R_r, the first r columns and rows of W = Q R (arXiv 2406.01775)
    kasa     s B0 A0 = the r smallest singular parts, replaced by B diag A (arXiv 2412.06071)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loraplex.adapters.format.config import bad_config, unsupported
from loraplex.adapters.format.kind import AdapterModule, ServedBase
from loraplex.adapters.format.one_product import one_product
from loraplex.adapters.image.tiles import LowRank

STARTS = ("pissa", "olora")
"""Values of init_lora_weights whose start follows from the base's weights alone."""

KASA = "kasa"
"""What kasa_config says; the third kind of a start."""

REMARK = (
    "its start ({}) is computed again from the base's weights and taken out. Its trainer rounded the base without that "
    "start to the base's dtype, which nobody can repeat: up to 2^-9 of a weight in bfloat16"
)

UNTRAINED = 2.0**-16
"""What is left beside the start by the rounding of two libraries' decompositions; it came to 2^-20 at width 64."""


def start_bytes(module: AdapterModule) -> int:
    """Bound what take_out() takes for a module: W, its parts and the library's room for them, in fp32."""
    width, out = module.projection.in_features, module.projection.out_features
    return 4 * 5 * width * out + 8 * 4 * module.rank * (width + out)


def check_start(modules: Iterable[AdapterModule], start: str) -> None:
    """Refuse what PEFT does not train. Raises AdapterRefused("bad_config")."""
    for module in modules:
        least = min(module.projection.in_features, module.projection.out_features)
        if start == KASA and module.rank // 2 >= least:
            raise bad_config(
                f"r is {module.rank // 2}, and {module.projection.name} has {least} singular parts; expected fewer "
                "ranks beside kasa_config"
            )


def take_out(part: LowRank, start: str, base: ServedBase) -> LowRank:
    """Make of a trained `part` of rank r its change of the base, of rank 2 r; B is zero where that is nothing.

    start: one of STARTS, or KASA. Raises AdapterRefused("unsupported_option") where the base's checkpoint is quantised.
    """
    weight = base.weight(part.layer, part.projection.name)
    if weight is None:
        raise unsupported(
            f"the adapter's start ({start}) has to be computed from the base's weights, and this "
            "base is quantised; serve its original, or save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    a0, b0 = factors_of(weight, part.a.shape[0], start, base)
    if start == "olora":
        b0 = b0 * part.scaling
    a, b, values = one_product(torch.cat((part.a.float(), a0)), torch.cat((part.b.float() * part.scaling, -b0), 1))
    if float(values.max()) <= UNTRAINED * float(b0.norm() * a0.norm()):
        b.zero_()
    return LowRank(part.layer, part.projection, a, b, 1.0)


def factors_of(weight: Tensor, rank: int, start: str, base: ServedBase) -> tuple[Tensor, Tensor]:
    """Compute A0 [r, in] and B0 [out, r] of W [out, in], or take them from where they are kept.

    Only their product is free of signs.
    """
    if base.starts is None:
        return _start(weight, rank, start)
    return base.starts.get(weight, f"{start}-{rank}", lambda: _start(weight, rank, start))


def _start(weight: Tensor, rank: int, start: str) -> tuple[Tensor, Tensor]:
    if start != "olora":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        some = slice(-rank, None) if start == KASA else slice(rank)
        return vh[some], u[:, some] * s[some]
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]
