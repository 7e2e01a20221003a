"""Bottlenecks as the `adapters` library saves them, turned into a folder that bottleneck.py reads.

model.layers.N.attention_adapters.adapters.NAME.adapter_down.0.{weight, bias}  ->  attention_out.down, down_bias
model.layers.N.output_adapters.adapters.NAME.adapter_up.{weight, bias}         ->  mlp_out.up, up_bias
...scaling                                           into up and up_bias: one number, or one for each output
...adapter_down.0.{W, W_left, W_right, phm_rule, b}  Compacter's sums of Kronecker products, made one matrix

ReFT is read by reft_files.py, its LoRA, (IA)^3 and prefixes by adapters_files.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.bottleneck import DOWN, DOWN_BIAS, UP, UP_BIAS
from loraplex.adapters.format.config import shown
from loraplex.adapters.format.modules import PREFIX

_PLACES = {"attention_adapters": "attention_out", "output_adapters": "mlp_out"}

_FUNCTIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_orig": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "silu": "silu",
    "tanh": "tanh",
    "leakyrelu": "leaky_relu",
    "leaky_relu": "leaky_relu",
    "linear": "identity",
}
"""By the names of `adapters` and of transformers."""

_REFUSED = {
    "use_gating": "its gate averages over the whole text",
    "ln_before": "it has a layer norm of its own",
    "ln_after": "it has a layer norm of its own",
    "inv_adapter": "the file does not say whether the embedding is turned back in front of the head",
    "cross_adapter": "there is no cross attention here",
}
"""Options of a config that change what is computed, and why they are not served."""

Converted = tuple[dict[str, Any], dict[str, Tensor]]
"""A config and the tensors by their names in the file, fp32."""


def convert_bottlenecks(saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Convert what `save_adapter` wrote: adapter_config.json and the tensors beside it.

    Raises AdapterRefused: "unsupported_kind", "unsupported_option", "unmatched_tensor", "missing_tensor".
    """
    config = saved.get("config")
    if not isinstance(config, Mapping) or config.get("architecture") is not None or "non_linearity" not in config:
        what = config.get("architecture") if isinstance(config, Mapping) else config
        raise AdapterRefused(
            "unsupported_kind", f"adapter_config.json: {shown(what)} is no bottleneck, which alone are converted"
        )
    for key, why in _REFUSED.items():
        if config.get(key):
            raise AdapterRefused("unsupported_option", f"adapter_config.json: {key} is {shown(config[key])}; {why}")
    function = function_named(config["non_linearity"], "adapter_config.json: non_linearity")
    found: dict[str, Tensor] = {}
    for path, own in _by_module(tensors, str(saved.get("name"))).items():
        for leaf, tensor in _leaves(path, own, config, tensors).items():
            found[f"{PREFIX}{path}.{leaf}"] = tensor.contiguous()
    source = "residual" if config.get("is_parallel") else "sum" if config.get("original_ln_before") else "branch"
    base = saved.get("model_name")
    return {
        "peft_type": "BOTTLENECK",
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "non_linearity": function,
        "source": source,
    }, found


def function_named(value: object, where: str) -> str:
    """Name a library's non-linearity as a config that is served does. Raises AdapterRefused("unsupported_option")."""
    function = _FUNCTIONS.get(str(value).lower())
    if function is None:
        raise AdapterRefused("unsupported_option", f"{where} is {shown(value)}; known: {', '.join(_FUNCTIONS)}")
    return function


def _by_module(tensors: Mapping[str, Tensor], name: str) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors by block, "model.layers.0.mlp_out": what is behind the adapter's name there -> tensor, fp32."""
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        if "shared_parameters" in full or full.startswith("heads."):
            continue
        layer, _, rest = full.partition(".adapters.")
        stem, _, place = layer.rpartition(".")
        if place not in _PLACES or not rest.startswith(f"{name}."):
            raise AdapterRefused("unmatched_tensor", f"{full} is no tensor of a bottleneck named {name!r}")
        found.setdefault(f"{stem}.{_PLACES[place]}", {})[rest.removeprefix(f"{name}.")] = tensor.float()
    if not found:
        raise AdapterRefused("missing_tensor", f"the file holds no tensor of a bottleneck named {name!r}")
    return found


def _leaves(
    path: str, own: Mapping[str, Tensor], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Make down, up and their biases of one block's tensors; scaling goes into `up`."""
    try:
        if config.get("phm_layer"):
            rule = next(
                (t.float() for full, t in tensors.items() if full.endswith("phm_rule") and "shared" in full), None
            )
            down, c = _sum_of_products(own, "adapter_down.0", rule)
            up, b = _sum_of_products(own, "adapter_up", rule)
        else:
            down, c = own["adapter_down.0.weight"], own["adapter_down.0.bias"]
            up, b = own["adapter_up.weight"], own["adapter_up.bias"]
        learned = config.get("scaling") in ("learned", "channel")
        scaling = own["scaling"] if learned else torch.tensor([float(config.get("scaling", 1.0))])
    except KeyError as error:
        raise AdapterRefused("missing_tensor", f"{path} has no {error.args[0]}") from error
    return {DOWN: down, DOWN_BIAS: c, UP: up * scaling[:, None], UP_BIAS: b * scaling}


def _sum_of_products(own: Mapping[str, Tensor], side: str, shared: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the weight [out, in] and bias of a side of Compacter: the sum of kron(rule[i], w[i]), transposed."""
    whole = f"{side}.W" in own
    w = own[f"{side}.W"] if whole else torch.bmm(own[f"{side}.W_left"], own[f"{side}.W_right"])
    rule = own[f"{side}.phm_rule"] if shared is None else shared
    return torch.stack([torch.kron(r, part) for r, part in zip(rule, w, strict=True)]).sum(0).T, own[f"{side}.b"]
