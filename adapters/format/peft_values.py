"""What the tensors of a PEFT LoRA adapter hold: finite numbers, within the compute dtype, and some effect.

This looks at module after module and can name what is wrong. Adapters with nothing wrong, nothing zero and no bias need
it only for their effect (recipe.py checks the rest, all layers at once).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.peft_format import AdapterModule, BaseBias, ModuleMap
from loraplex.adapters.image.tiles import BaseLayout, BiasDelta, LowRank

Part = LowRank | BiasDelta

_CANCELLED = 2.0**-20  # B A smaller than this beside A and B is what rounding leaves of equal terms


def check_values(
    module_map: ModuleMap,
    tensors: Mapping[str, Tensor],
    layout: BaseLayout,
    base_bias: BaseBias,
    throttle: Callable[[], None],
) -> list[Part]:
    """What the adapter adds, without what adds nothing: modules whose A or B is zero, biases equal to the base's.

    Raises AdapterRefused: "not_finite", and "no_effect" when nothing is left.
    """
    _check_finite(tensors, throttle)
    parts: list[Part] = []
    reasons: dict[str, None] = {}  # each once, in order
    effective = False
    for module in module_map.modules:
        throttle()
        delta = _bias_delta(module, tensors, layout, base_bias)
        if delta is not None and delta.delta.any():
            parts.append(delta)
            effective = True
        if module.a is None or module.b is None:
            continue
        part = LowRank(module.layer, module.projection, tensors[module.a], tensors[module.b], module.scaling)
        reason = _check_rounded(part, module, layout)
        if reason is not None:
            reasons[reason] = None
            continue
        effective = effective or not cancels(part)  # one that does not is enough: the products are never all formed
        parts.append(part)
    if not effective:
        cancelled = any(isinstance(part, LowRank) for part in parts)
        why = "; ".join([*reasons, *(["B A cancels out to zero"] if cancelled else [])])
        raise AdapterRefused(
            "no_effect",
            f"the adapter changes nothing in any module ({why}); it would answer as the base does. Was it saved before "
            "it was trained?",
        )
    return parts


def cancels(part: LowRank) -> bool:
    """Whether B A is zero though neither is (an adapter that is the difference of two equal ones)."""
    a, b = part.a.float(), part.b.float()
    least = _CANCELLED * float(a.abs().max()) * float(b.abs().max())
    # not by matmul: on a loader's thread it starts a team of threads, which then waits for cores with it
    return all(float((row[:, None] * a).sum(0).abs().max()) <= least for row in b)


def _check_finite(tensors: Mapping[str, Tensor], throttle: Callable[[], None]) -> None:
    for name, tensor in tensors.items():
        throttle()
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise AdapterRefused(
                "not_finite", f"{name} has {bad} values of {tensor.numel()} that are NaN or infinite; expected none"
            )


def _check_rounded(part: LowRank, module: AdapterModule, layout: BaseLayout) -> str | None:
    """Why the part has no effect once rounded to the compute dtype, or None. Refuses values beyond that dtype."""
    if part.scaling == 0:
        return "lora_alpha is 0"
    dtype = str(layout.dtype).removeprefix("torch.")
    folded = part.b.float() * part.scaling
    for name, exact, what in ((module.a, part.a, "it"), (module.b, folded, f"it times {part.scaling:.4g}")):
        rounded = exact.to(layout.dtype)
        if not rounded.isfinite().all():
            raise AdapterRefused(
                "not_finite",
                f"{name}: {what} reaches {float(exact.float().abs().max()):.4g}, more than {dtype}, in which the base "
                f"runs, can hold ({torch.finfo(layout.dtype).max:.5g})",
            )
        if not rounded.any():
            factor = "lora_A" if name is module.a else "lora_B"
            return f"{factor} vanishes in {dtype}" if exact.any() else f"{factor} is zero"
    return None


def _bias_delta(
    module: AdapterModule, tensors: Mapping[str, Tensor], layout: BaseLayout, base_bias: BaseBias
) -> BiasDelta | None:
    """The sum of lora_B's bias, scaled as B is, and of how far the file's bias is from the base's; None: no bias."""
    if module.bias is None and module.b_bias is None:
        return None
    delta = torch.zeros(module.projection.out_features)
    if module.b_bias is not None:
        delta += module.scaling * tensors[module.b_bias].float()
    if module.bias is not None:
        own = base_bias(module.layer, module.projection.name)
        assert own is not None, "draw_blueprint lets no bias through where the base has none"
        delta += tensors[module.bias].float() - own.float().cpu()
    if not delta.to(layout.dtype).isfinite().all():
        raise AdapterRefused(
            "not_finite",
            f"{module.bias or module.b_bias}: as an addition to the base's bias it is more than {layout.dtype} holds",
        )
    return BiasDelta(module.layer, module.projection, delta)
