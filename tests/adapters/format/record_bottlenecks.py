"""Record what the `adapters` library saves and computes, for test_bottleneck.py, with the packages of libraries.txt.

Bases are tests/support/tiny.py's, fp32. Its own Llama never fills a cache with this transformers, so logits are of one
forward over the whole text.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.tiny import tiny_hf_model

RECORDED = Path(os.environ.get("LORAPLEX_VECTORS", Path(__file__).parent / "vectors"))
"""Where what libraries compute is written and read."""

VECTORS = RECORDED / "bottlenecks.safetensors"
IDS = [1, 17, 42, 99, 5, 63, 120, 7, 33, 150, 8, 21]
TOKENS = 12
NAME, LIBRARY = "tuned", "adapters"

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # base, the library's config, its fields
    "Houlsby": ("llama", "DoubleSeqBnConfig", {}),
    "Pfeiffer": ("llama", "SeqBnConfig", {}),
    "parallel": ("llama", "ParBnConfig", {}),
    "parallel, learned scaling": ("llama", "ParBnConfig", {"scaling": "learned"}),
    "parallel, both places": ("llama", "ParBnConfig", {"mh_adapter": True, "non_linearity": "gelu"}),
    "scaling by channel": ("llama", "SeqBnConfig", {"scaling": "channel", "non_linearity": "leakyrelu"}),
    "some layers": ("llama", "SeqBnConfig", {"reduction_factor": {"0": 16, "default": 8}, "leave_out": [1]}),
    "Compacter": ("llama", "CompacterConfig", {"phm_dim": 2}),
    "Compacter++": ("llama", "CompacterPlusPlusConfig", {"phm_dim": 2, "shared_phm_rule": False}),
    "Houlsby by hooks": ("qwen2", "DoubleSeqBnConfig", {"non_linearity": "gelu_new"}),
    "Pfeiffer by hooks": ("qwen2", "SeqBnConfig", {"non_linearity": "tanh"}),
}


def main() -> None:
    """Write VECTORS; configs are its metadata.

    By case: tensors as saved; `logits` [12, vocab] of IDS and `base` alike; `greedy` [TOKENS] behind IDS.
    """
    found: dict[str, torch.Tensor] = {}
    configs = {}
    for case, (family, kind, fields) in CASES.items():
        config, tensors, logits = record_adapter(family, kind, {"reduction_factor": 8, **fields})
        configs[case] = json.dumps(config)
        found |= {f"{case}/{name}": tensor for name, tensor in (tensors | logits).items()}
    RECORDED.mkdir(exist_ok=True)
    save_file(found, VECTORS, configs)


def record_adapter(
    family: str, kind: str, fields: dict[str, Any], *, of_prompt: bool = False
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Record what is saved of a random adapter, its config and tensors, and what the library computes with it.

    of_prompt: it acts on the prompt alone, and what is generated is the base's behind the prompt's cache.
    """
    adapters = import_module(LIBRARY)
    torch.manual_seed(3)
    model = tiny_hf_model(family)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        base = model(ids, use_cache=False).logits[0].clone()
    adapters.init(model)
    model.add_adapter(NAME, config=getattr(adapters, kind)(**fields))
    model.set_active_adapters(NAME)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f".{NAME}." in name or "shared_parameters" in name:
                drawn = torch.randn(weight.shape, generator=generator)
                if name.endswith("original"):  # a rotation's: only what is below the diagonal is trained
                    drawn = drawn.T.tril(diagonal=-1).T
                weight.copy_(1 + 0.3 * drawn if "scaling" in name else weight + 0.15 * drawn)
        model.eval()
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        text = _behind_prompt(model, ids) if of_prompt else _behind_text(model, ids)
    with TemporaryDirectory() as folder:
        model.save_adapter(folder, NAME)  # a pickle: of what layers share safetensors takes no second copy
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        tensors = torch.load(Path(folder) / "pytorch_adapter.bin", weights_only=True)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return config, tensors, {"logits": logits.clone(), "base": base, "greedy": text[0, len(IDS) :].clone()}


def _behind_text(model: Any, text: torch.Tensor) -> torch.Tensor:
    """Extend greedily, each token by one forward over the whole text."""
    for _ in range(TOKENS):
        last = model(text, attention_mask=torch.ones_like(text), use_cache=False).logits[:, -1:]
        text = torch.cat((text, last.argmax(-1)), 1)
    return text


def _behind_prompt(model: Any, text: torch.Tensor) -> torch.Tensor:
    """Extend greedily by the base, behind the cache that the adapter has left of the prompt."""
    found = model(text, attention_mask=torch.ones_like(text), use_cache=True)
    model.set_active_adapters(None)
    for _ in range(TOKENS):
        token = found.logits[:, -1:].argmax(-1)
        text = torch.cat((text, token), 1)
        found = model(token, attention_mask=torch.ones_like(text), past_key_values=found.past_key_values)
    model.set_active_adapters(NAME)
    return text


if __name__ == "__main__":
    main()
