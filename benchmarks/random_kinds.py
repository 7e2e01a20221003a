"""Adapters of every kind with random weights, made of what the registry's kinds say their files hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.fronts import COLUMNS_OF_TASK, ROWS, ROWS_OF_TASK
from loraplex.adapters.format.kinds import KINDS
from loraplex.adapters.format.module_kind import ModuleKind
from loraplex.adapters.format.modules import PREFIX, SHARED_PREFIX, FoundModule
from loraplex.adapters.format.outside_modules import TUNED
from loraplex.adapters.format.targets import TABLES
from loraplex.benchmarks.random_adapters import ATTENTION, CONFIG, WEIGHTS
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.server.models.config import ModelConfig

TARGETS: Mapping[str, Any] = {"target_modules": list(ATTENTION)}
VALUE = {"target_modules": ["v_proj"]}
"""Of what is made of the base's singular parts, a tenth of a second each, or is dense, twice the weight's bytes."""

NOWHERE = {"target_modules": None}
"""Of what is in front of the prompt or at blocks."""

INVOCATION = 100
"""The token that calls an activated LoRA; trained tokens begin with it."""

RANK_OF_BOTTLENECK = 16

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"r": 16, "lora_alpha": 16},
    "rslora": {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "use_rslora": True},
    "dora": {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "use_dora": True},
    "alora": {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "alora_invocation_tokens": [INVOCATION]},
    "tables": {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["v_proj", *TABLES]},
    "ia3": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
    "trainable_tokens": {"token_indices": list(range(INVOCATION, INVOCATION + 64)), "target_modules": [TABLES[0]]},
    "prompt_tuning": {"num_virtual_tokens": BLOCK_SIZE, **NOWHERE},
    "p_tuning": {"num_virtual_tokens": BLOCK_SIZE, **NOWHERE},
    "multitask_prompt_tuning": {"num_virtual_tokens": BLOCK_SIZE, "num_tasks": 2, "task_id": 1, **NOWHERE},
    "cpt": {"cpt_token_ids": list(range(INVOCATION, INVOCATION + BLOCK_SIZE)), **NOWHERE},
    "prefix_tuning": {"num_virtual_tokens": BLOCK_SIZE, **NOWHERE},
    "cartridge": {"num_virtual_tokens": BLOCK_SIZE, "num_frozen_tokens": 1, **NOWHERE},
    "ln_tuning": {"target_modules": ["input_layernorm", "norm"]},
    "loreft": {
        "peft_type": "REFT",
        "non_linearity": "identity",
        "subtract": True,
        "shared": True,
        "positions": "f2+l2",
        **NOWHERE,
    },
    "houlsby": {"peft_type": "BOTTLENECK", "non_linearity": "silu", "source": "branch", **NOWHERE},
    "adalora": {"init_r": 12, "lora_alpha": 12},
    "loha": {"r": 4, "alpha": 4},
    "vera": {"r": 64},
    "pvera": {"r": 64},
    "miss": {"r": 16},
    "delora": {"r": 16},
    "vblora": {"r": 4, "num_vectors": 64, "vector_length": 64, "topk": 2},
    "hra": {"r": 8, **VALUE},
    "unilora": {"r": 8, "theta_d_length": 4096},
    "tinylora": {"r": 4, "u": 8},
    "beft": VALUE,
    "deft": {"r": 8, **VALUE},
    "lokr": {"r": 8, "alpha": 8, "decompose_factor": 4},
    "gralora": {"r": 16, "alpha": 16},
    "osf": {"effective_rank": 0.95, **VALUE},
    "peanut": {"r": 8, "depth": 1, **VALUE},
    "poly": {"r": 8, "n_tasks": 2, "task_id": 1},
    "shira": {"r": 4, **VALUE},
    "fourierft": {"n_frequency": 500, **VALUE},
    "waveft": {"n_frequency": 500, **VALUE},
    "c3a": {"block_size": 64, **VALUE},
    "hira": {"r": 8, **VALUE},
    "randlora": {"r": 32, **VALUE},
    "supertuning": VALUE,
    "glora": {"r": 8, **VALUE},
    "frod": {"sparse_rate": 0.001, **VALUE},
    "oft": {"r": 0, "oft_block_size": 32, "use_cayley_neumann": False},
    "boft": {"boft_block_size": 16, "boft_block_num": 0},
}
"""Configs by the adapter's name; the name is the kind, in lower case, where peft_type says no other."""

DEVIATIONS: Mapping[str, float] = {
    "hada_": 0.3,
    "lokr_": 0.3,
    "lambda": 0.5,
    "logits": 1.0,
    "spectrum": 1.0,
    "_v": 1.0,
    "prefix_task": 1.0,
}
"""Of tensors by a part of their names; else it is 0.05."""


@dataclass(frozen=True)
class RandomKinds:
    """The adapters made, and the kinds that there is no way to make one of."""

    names: tuple[str, ...]
    left_out: tuple[str, ...]


def write_kinds(base: Path, folder: Path) -> RandomKinds:
    """Write one adapter of each kind for the base at `base` to `folder`/<name>, as PEFT saves it, in bfloat16."""
    config = ModelConfig.from_hf(base)
    made = []
    for number, (name, options) in enumerate(OPTIONS.items()):
        raw = {"peft_type": name.upper(), **TARGETS, **options}
        raw = {key: value for key, value in raw.items() if value is not None}
        write_kind(folder / name, raw, config, seed=number)
        made.append(name)
    kinds = {str({"peft_type": name, **OPTIONS[name]}["peft_type"]).lower() for name in made}
    return RandomKinds(tuple(made), tuple(name for name in KINDS if name not in kinds))


def write_kind(path: Path, raw: Mapping[str, Any], base: ModelConfig, seed: int) -> None:
    """Write an adapter of the config `raw` to `path`."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    modules = [
        FoundModule(layer, projection, f"model.layers.{layer}.{projection.name}")
        for layer in range(base.num_layers)
        for projection in base.projections()
        if projection.name.rpartition(".")[2] in raw.get("target_modules", ())
    ]
    kind = KINDS[str(raw["peft_type"]).lower()]
    shapes = _of_modules(kind, raw, modules) if isinstance(kind, ModuleKind) else _by_hand(raw, modules, base)
    integers = kind.integer_leaves if isinstance(kind, ModuleKind) else frozenset()
    tensors = {name: _draw(name, shape, generator, integers) for name, shape in shapes}
    for name in tensors:
        if ".frod_s_size." in name:  # what its basis is wide
            tensors[name] = torch.full((2,), tensors[name.replace("frod_s_size", "frod_V")].shape[0])
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(raw))


def _of_modules(
    kind: ModuleKind[Any], raw: Mapping[str, Any], modules: Sequence[FoundModule]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    config, match = kind.read(raw), Matcher(60.0, lambda: None)
    for module in modules:
        for leaf, shape in kind.wanted(config, module, match).shapes.items():
            yield f"{PREFIX}{module.path}.{leaf}", shape
    for role, shape in kind.shared_shapes(config, modules).items():
        yield f"{SHARED_PREFIX}{role}", shape


def _by_hand(
    raw: Mapping[str, Any], modules: Sequence[FoundModule], base: ModelConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of LoRA, DoRA, IA3 and what is no linear's, whose kinds keep the shapes to themselves."""
    yield from _no_linears(raw, base)
    for module in modules:
        name, projection = f"{PREFIX}{module.path}", module.projection
        if raw["peft_type"] == "IA3":
            yield f"{name}.ia3_l", (projection.out_features, 1)
            continue
        yield f"{name}.lora_A.weight", (raw["r"], projection.in_features)
        yield f"{name}.lora_B.weight", (projection.out_features, raw["r"])
        if raw.get("use_dora"):
            yield f"{name}.lora_magnitude_vector", (projection.out_features,)


def _no_linears(raw: Mapping[str, Any], base: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, embed = base.hidden_size, f"{PREFIX}model.{TABLES[0]}"
    match raw["peft_type"]:
        case "TRAINABLE_TOKENS":
            yield f"{embed}.trainable_tokens_delta", (len(raw["token_indices"]), hidden)
        case "LN_TUNING":
            for layer in range(base.num_layers):
                yield f"{PREFIX}model.layers.{layer}.input_layernorm.{TUNED}", (hidden,)
            yield f"{PREFIX}model.norm.{TUNED}", (hidden,)
        case "PROMPT_TUNING" | "P_TUNING":
            yield ROWS, (raw["num_virtual_tokens"], hidden)
        case "CPT":
            yield ROWS, (len(raw["cpt_token_ids"]), hidden)
        case "MULTITASK_PROMPT_TUNING":
            tokens, tasks = raw["num_virtual_tokens"], raw["num_tasks"]
            yield from ((ROWS, (tokens, hidden)), (COLUMNS_OF_TASK, (tasks, tokens, 1)))
            yield ROWS_OF_TASK, (tasks, 1, hidden)
        case "PREFIX_TUNING" | "CARTRIDGE":
            width = base.num_layers * 2 * base.num_kv_heads * base.head_dim
            yield ROWS, (raw["num_virtual_tokens"], width)
        case "BOTTLENECK":
            for layer in range(base.num_layers):
                for block in base.blocks()[:2]:
                    name, rank = f"{PREFIX}model.layers.{layer}.{block.name}", RANK_OF_BOTTLENECK
                    yield from ((f"{name}.down", (rank, hidden)), (f"{name}.down_bias", (rank,)))
                    yield from ((f"{name}.up", (hidden, rank)), (f"{name}.up_bias", (hidden,)))
        case "REFT":
            for layer in range(0, base.num_layers, 2):
                name, rank = f"{PREFIX}model.layers.{layer}.layer_out", RANK_OF_BOTTLENECK
                yield from ((f"{name}.projection", (rank, hidden)), (f"{name}.source", (rank, hidden)))
                yield f"{name}.source_bias", (rank,)
        case "LORA" if TABLES[0] in raw["target_modules"]:
            yield f"{embed}.lora_embedding_A", (raw["r"], base.vocab_size)
            yield f"{embed}.lora_embedding_B", (hidden, raw["r"])
            yield f"{PREFIX}{TABLES[1]}.lora_A.weight", (raw["r"], hidden)
            yield f"{PREFIX}{TABLES[1]}.lora_B.weight", (base.vocab_size, raw["r"])


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator, integers: frozenset[str]) -> Tensor:
    if any(name.endswith(f".{leaf}") for leaf in integers):
        return torch.randint(0, 64, shape, generator=generator)
    if name.endswith(".zeros"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    drawn = torch.randn(shape, generator=generator)
    if any(part in name for part in ("magnitude", "ia3", "w_norm", "boft_s", TUNED)):  # about what they begin with
        return (1 + 0.3 * drawn).bfloat16()
    deviation = next((value for part, value in DEVIATIONS.items() if part in name.rpartition(".")[2]), 0.05)
    return (deviation * drawn).bfloat16()
