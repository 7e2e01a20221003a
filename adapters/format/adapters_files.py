"""LoRA, (IA)^3 and prefixes as the `adapters` library saves them, turned into folders as PEFT writes them.

model.layers.N.self_attn.q_proj.loras.NAME.{lora_A, lora_B}     LORA: ...self_attn.q_proj.lora_A.weight, lora_B.weight
model.layers.N.mlp.down_proj.loras.NAME.lora_B [out, 1]         IA3: ...mlp.down_proj.ia3_l, times alpha; of the output,
                                                                 whatever the linear
...prefix_tunings.NAME.self_prefix.control_trans                 PREFIX_TUNING: prompt_embeddings, once what makes it
...prefix_tunings.NAME.self_prefix.wte.weight, ...               of smaller ones is applied

The file's names say which linears they are of; the library's own words (intermediate, output) mean others by model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.bottleneck_files import Converted, function_named
from loraplex.adapters.format.config import shown, unsupported
from loraplex.adapters.format.fronts import ROWS
from loraplex.adapters.format.modules import PREFIX
from loraplex.kernels.constants import Function
from loraplex.kernels.reference_tiles import FUNCTIONS

_LORA = re.compile(r"(.*layers\.\d{1,6}\..+)\.loras\.(.+?)\.([^.]+(?:\.weight)?)")

_PREFIX = re.compile(r".*prefix_tunings\.(.+?)\.self_prefix\.(.+)")

_REFUSED = {
    "use_gating": "its gate averages over the whole text",
    "use_dora": "the library takes its norms without the scaling, and scales the base's bias; train DoRA with PEFT",
    "vera_d": "convert it with the library's merge, or train VeRA with PEFT",
    "vera_b": "convert it with the library's merge, or train VeRA with PEFT",
    "n_up_projection": "its several up projections are mixed by task",
}
"""Options of a config that change what is computed, and why they are not converted."""

Turn = Callable[[Tensor], Tensor]
"""Turns the keys among the rows [V, layers * 2 * kv_heads * D] of a prefix by V positions."""


def convert_adapters_lora(saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Convert what `save_adapter` wrote of a LoRA or (IA)^3.

    Raises AdapterRefused: "unsupported_option", "unmatched_tensor", "missing_tensor".
    """
    config, name = saved["config"], str(saved.get("name"))
    _refuse_options(config)
    scales = config.get("composition_mode") == "scale"
    alpha, rank = config.get("alpha"), config.get("r")
    if not isinstance(alpha, int | float) or type(rank) is not int or rank < 1:
        raise unsupported(f"alpha is {shown(alpha)} and r {shown(rank)}; expected numbers")
    found, targets = {}, dict[str, None]()
    for full, tensor in tensors.items():
        if full.startswith("heads."):
            continue
        match = _LORA.fullmatch(full)
        leaf = match[3] if match is not None and match[2] == name else None
        if match is None or leaf not in ("lora_A", "lora_B") or (scales and leaf == "lora_A"):
            raise AdapterRefused("unmatched_tensor", f"{full} is no tensor of a LoRA or (IA)^3 named {name!r}")
        targets[match[1]] = None
        ending = "ia3_l" if scales else f"{leaf}.weight"
        found[f"{PREFIX}{match[1]}.{ending}"] = (tensor.float() * (alpha if scales else 1.0)).contiguous()
    if not found:
        raise AdapterRefused("missing_tensor", f"the file holds no tensor of a LoRA or (IA)^3 named {name!r}")
    common = {"base_model_name_or_path": _base_of(saved), "target_modules": list(targets)}
    if scales:
        return {"peft_type": "IA3", **common, "feedforward_modules": []}, found
    return {"peft_type": "LORA", **common, "r": rank, "lora_alpha": alpha, "bias": "none"}, found


def convert_adapters_prefix(saved: Mapping[str, Any], tensors: Mapping[str, Tensor], turn: Turn) -> Converted:
    """Convert what `save_adapter` wrote of prefix tuning.

    turn: the prompt's positions begin at 0 beside the library's prefix, and at V beside PEFT's: keys that are turned by
    V positions are as far from each query as before. Raises AdapterRefused as convert_adapters_lora() does.
    """
    config, name = saved["config"], str(saved.get("name"))
    _refuse_options(config)
    if config.get("leave_out"):
        raise unsupported(f"leave_out is {shown(config['leave_out'])}; expected a prefix in every layer")
    count = config.get("prefix_length")
    if type(count) is not int or count < 1:
        raise unsupported(f"prefix_length is {shown(count)}; expected a whole number from 1")
    own: dict[str, Tensor] = {}
    for full, tensor in tensors.items():  # each layer has a copy
        match = _PREFIX.fullmatch(full)
        if match is None or match[1] != name:
            if full.startswith("heads."):
                continue
            raise AdapterRefused("unmatched_tensor", f"{full} is no tensor of a prefix named {name!r}")
        if not torch.equal(own.setdefault(match[2], tensor.float()), tensor.float()):
            raise AdapterRefused("unmatched_tensor", f"{full} is another than the other layers' copies of it")
    try:
        if config.get("flat"):
            rows = own["control_trans"].reshape(count, -1)
        else:
            act = FUNCTIONS[Function[function_named(config.get("non_linearity"), "non_linearity").upper()]]
            inner = act(own["wte.weight"] @ own["control_trans.0.weight"].T + own["control_trans.0.bias"])
            rows = inner @ own["control_trans.2.weight"].T + own["control_trans.2.bias"]
    except KeyError as error:
        raise AdapterRefused("missing_tensor", f"the prefix {name!r} has no {error.args[0]}") from error
    said = {"base_model_name_or_path": _base_of(saved), "num_virtual_tokens": count}
    return {"peft_type": "PREFIX_TUNING", **said}, {ROWS: turn(rows).contiguous()}


def _refuse_options(config: Mapping[str, Any]) -> None:
    for key, why in _REFUSED.items():
        if config.get(key):
            raise unsupported(f"{key} is {shown(config[key])}; {why}")


def _base_of(saved: Mapping[str, Any]) -> str | None:
    base = saved.get("model_name")
    return base if isinstance(base, str) and base else None
