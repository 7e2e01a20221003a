"""Record what `adapters` and pyreft save and compute of ReFT, for test_reft.py, with the packages of libraries.txt.

Both count last positions in the text that they are given, so answers begin behind the prompt's cache. pyreft's
`generate` intervenes on the prompt alone. The Llama of `adapters` fills no cache with this transformers, so one with
last positions is left without an answer.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

from tests.adapters.format.record_bottlenecks import IDS, RECORDED, TOKENS, record_adapter
from tests.support.tiny import tiny_hf_model

VECTORS = RECORDED / "reft.safetensors"
PYREFT = "pyreft"

ADAPTERS_CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, str]]] = {
    # base, the library's config, its fields, what `convert` has to be told
    "LoReFT": ("llama", "LoReftConfig", {"r": 4}, {}),
    "LoReFT, both ends": ("llama", "LoReftConfig", {"r": 2, "prefix_positions": 2, "suffix_positions": 3}, {}),
    "LoReFT, tied": ("qwen2", "LoReftConfig", {"r": 3, "suffix_positions": 2, "tied_weights": True}, {}),
    "LoReFT, relu": ("llama", "LoReftConfig", {"r": 4, "non_linearity": "relu"}, {}),
    "LoReFT, a layer": ("gemma2", "LoReftConfig", {"r": 4, "layers": [1], "suffix_positions": 2}, {}),
    "NoReFT": ("qwen2", "NoReftConfig", {"r": 4, "prefix_positions": 0, "suffix_positions": 2}, {"kind": "noreft"}),
    "DiReFT": ("gemma2", "DiReftConfig", {"r": 20}, {"kind": "direft"}),
    "LoReFT, overlapping": ("qwen2", "LoReftConfig", {"r": 2, "prefix_positions": 9, "suffix_positions": 5}, {}),
}

PYREFT_CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # base, kind, its settings, where (as get_intervention_locations() takes it), what `convert` has to be told
    "pyreft LoReFT": ("llama", "Loreft", {}, {"positions": "f3+l2"}, {}),
    "pyreft LoReFT, apart": ("qwen2", "Loreft", {}, {"positions": "f2+l3", "share_weights": False}, {}),
    "pyreft LoReFT, gelu": ("llama", "Loreft", {"act_fn": "gelu"}, {"positions": "l4"}, {"non_linearity": "gelu"}),
    "pyreft LoReFT, the dataset's": ("llama", "Loreft", {}, {"positions": "f1+l3", "before": 1}, {"skip_last": 1}),
    "pyreft NoReFT": ("llama", "Noreft", {"add_bias": True}, {"positions": "f9+l9"}, {}),
    "pyreft ConsReFT": ("gemma2", "Consreft", {}, {"positions": "f3"}, {}),
    "pyreft LobiReFT": ("llama", "Lobireft", {}, {"positions": "f3+l3"}, {}),
    "pyreft DiReFT": ("qwen2", "Direft", {}, {"positions": "l1"}, {}),
    "pyreft NodiReFT": (
        "llama",
        "Nodireft",
        {"add_bias": False, "act_fn": "silu"},
        {"positions": "f2+l2"},
        {"non_linearity": "silu"},
    ),
}

CASES = {case: of[0] for case, of in (*ADAPTERS_CASES.items(), *PYREFT_CASES.items())}


def main() -> None:
    """Write VECTORS; its metadata are configs by case, and what `convert` has to be told of it.

    By case: tensors as saved, those of pyreft as <key>|<name>; `logits` [12, vocab] of IDS; `greedy` [TOKENS] behind
    IDS, empty where the library computes none. By family: `base`, the base's logits.
    """
    found: dict[str, torch.Tensor] = {}
    said = {}
    for case, (family, kind, fields, wishes) in ADAPTERS_CASES.items():
        last = bool(fields.get("suffix_positions"))
        config, tensors, outcome = record_adapter(family, kind, fields, of_prompt=last and family != "llama")
        if last and family == "llama":
            outcome["greedy"] = outcome["greedy"][:0]
        said[case] = json.dumps({"config": config, "wishes": wishes})
        found[f"{family}/base"] = outcome.pop("base")
        found |= {f"{case}/{name}": tensor.contiguous() for name, tensor in (tensors | outcome).items()}
    for case, (family, kind, fields, where, wishes) in PYREFT_CASES.items():
        config, tensors, outcome = _record_pyreft(family, kind, fields, where)
        said[case] = json.dumps({"config": config, "wishes": {"positions": where["positions"], **wishes}})
        found[f"{family}/base"] = outcome.pop("base")
        found |= {f"{case}/{name}": tensor.contiguous() for name, tensor in (tensors | outcome).items()}
    RECORDED.mkdir(exist_ok=True)
    save_file(found, VECTORS, said)


def _record_pyreft(
    family: str, kind: str, fields: dict[str, Any], where: dict[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    pyreft = _import_pyreft()
    torch.manual_seed(3)
    model = tiny_hf_model(family)
    ids = torch.tensor([IDS])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        base = model(ids, use_cache=False).logits[0].clone()
    hidden, layers = model.config.hidden_size, list(range(model.config.num_hidden_layers))
    shared = where.get("share_weights", True)
    intervention = getattr(pyreft.interventions, f"{kind}Intervention")
    made = [
        intervention(embed_dim=hidden, low_rank_dimension=4, dtype=torch.float32, **fields)
        for _ in layers * (1 if shared else 2)
    ]
    representations = [
        {"layer": layer, "component": "block_output", "low_rank_dimension": 4, "intervention": each}
        for layer, each in zip(layers * (1 if shared else 2), made, strict=True)
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for each in made:
            for name, weight in each.named_parameters():
                drawn = torch.randn(weight.shape, generator=generator)
                weight.add_(0.2 * (drawn.tril(diagonal=-1) if name.endswith("original") else drawn))
    reft.eval()
    positions = pyreft.get_intervention_locations(
        last_position=len(IDS) - where.get("before", 0),
        positions=where["positions"],
        num_interventions=len(made),
        share_weights=shared,
    )
    # what it fills a list up with is a token in front of the prompt, which there is none of here
    unit_locations = {"sources->base": (None, [[[at for at in each if at >= 0]] for each in positions])}
    prompt = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        _, out = reft(prompt, unit_locations=unit_locations)
        generated = reft.generate(
            prompt,
            unit_locations=unit_locations,
            intervene_on_prompt=True,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    text = generated[1] if isinstance(generated, tuple) else generated
    with TemporaryDirectory() as folder:
        reft.save(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = {
            f"{key}|{name}": tensor.clone()
            for key in config["sorted_keys"]
            for name, tensor in torch.load(f"{folder}/intkey_{key}.bin", weights_only=True).items()
        }
    return config, tensors, {"logits": out.logits[0].clone(), "base": base, "greedy": text[0, len(IDS) :].clone()}


def _import_pyreft() -> Any:
    """Import pyreft without what it asks for and never computes with here: data sets, plots, metrics."""
    transformers = import_module("transformers")
    for name in ("AutoModelForCausalLM", "Trainer"):  # looked up before the stand-ins are there
        getattr(transformers, name)
    for missing in (
        "datasets",
        "matplotlib",
        "matplotlib.pyplot",
        "plotnine",
        "evaluate",
        "wandb",
        "ipywidgets",
        "pandas",
    ):
        try:
            import_module(missing)
        except ImportError:
            stand_in = ModuleType(missing)
            stand_in.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]
            stand_in.__path__ = []
            sys.modules[missing] = stand_in
    return import_module(PYREFT)


if __name__ == "__main__":
    main()
