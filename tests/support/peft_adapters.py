"""Adapters made and computed by PEFT itself: the oracle for how a file is read and what it does to the base.

    adapter = make_peft_adapter(base, folder, r=4, target_modules=["q_proj"])   # random weights, saved in `folder`
    adapter.logits(ids)                                                         # PEFT's own forward, fp32

`base` is a transformers model and is left alone: PEFT works on a copy.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.format.kind import ServedBase
from loraplex.adapters.image.tiles import BaseLayout, LowRank
from loraplex.kernels.records import Projection
from loraplex.server.models.config import Site

SITES = {
    **{f"self_attn.{name}": Site.QKV for name in ("q_proj", "k_proj", "v_proj", "qkv_proj")},
    "self_attn.o_proj": Site.O,
    **{f"mlp.{name}": Site.GATE_UP for name in ("gate_proj", "up_proj", "gate_up_proj")},
    "mlp.down_proj": Site.DOWN,
}
"""In the order their outputs lie in the site's."""


BASES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3},
    "llama_biased": {},
    "qwen2": {},
    "phi3": {},
    "gemma3": {},
}
"""Families of tiny models, with what differs from the family's own config."""

QV = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": QV}),
    "alpha below rank": ("llama", {"r": 8, "lora_alpha": 3, "target_modules": QV}),
    "rslora": ("llama", {"r": 8, "lora_alpha": 4, "target_modules": QV, "use_rslora": True}),
    **{f"only {name}": ("llama", {"r": 2, "target_modules": [name]}) for name in ALL},
    "all seven": ("llama", {"r": 16, "target_modules": ALL}),
    "more ranks than a tile": ("llama", {"r": 37, "target_modules": ALL}),
    "all-linear": ("llama", {"r": 3, "target_modules": "all-linear"}),
    "rank_pattern": (
        "llama",
        {"r": 4, "target_modules": ALL, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7, r"2\..*\.v_proj": 5}},
    ),
    "alpha_pattern": (
        "llama",
        {"r": 4, "target_modules": ALL, "alpha_pattern": {"mlp.down_proj": 2, "^model.layers.0.self_attn.k_proj": 32}},
    ),
    "both patterns, rslora": (
        "llama",
        {
            "r": 4,
            "target_modules": ALL,
            "rank_pattern": {".*_proj": 6, "q_proj": 2},
            "alpha_pattern": {"(gate|up)_proj": 5, "layers.*.v_proj": 9},
            "use_rslora": True,
        },
    ),
    "pattern as a part of a name is no match": ("llama", {"target_modules": QV, "rank_pattern": {"proj": 2, "v": 3}}),
    "layers_to_transform": ("llama", {"target_modules": QV, "layers_to_transform": [0, 2]}),
    "one layer": ("llama", {"target_modules": ALL, "layers_to_transform": 1}),
    "layers_pattern": ("llama", {"target_modules": QV, "layers_to_transform": [2], "layers_pattern": "layers"}),
    "layers_patterns": ("llama", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    "exclude names": ("llama", {"target_modules": ALL, "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]}),
    "exclude pattern": ("llama", {"target_modules": ALL, "exclude_modules": r".*layers\.[01]\..*"}),
    "all-linear but": ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "regex": ("llama", {"target_modules": r"model\.layers\.\d+\.(self_attn\.(q|k)|mlp\.up)_proj"}),
    "regex, lookahead": ("llama", {"target_modules": r"^(?!.*(o_proj|lm_head|down)).*_proj$"}),
    "whole paths": ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"]}),
    "whole paths beat layers_to_transform": (
        "llama",
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    "fan_in_fan_out": ("llama", {"target_modules": ALL, "fan_in_fan_out": True}),
    "dropout": ("llama", {"target_modules": QV, "lora_dropout": 0.5}),
    "lora_bias": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": ALL, "lora_bias": True}),
    "lora_bias, base biases": ("llama_biased", {"r": 4, "lora_alpha": 12, "target_modules": QV, "lora_bias": True}),
    "bias all, base without": ("llama", {"target_modules": QV, "bias": "all"}),
    "bias lora_only": ("qwen2", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "bias all": ("qwen2", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    "bias all everywhere": ("llama_biased", {"target_modules": ["k_proj", "down_proj"], "bias": "all"}),
    "bias all and lora_bias": (
        "qwen2",
        {"r": 2, "lora_alpha": 7, "target_modules": ALL, "bias": "all", "lora_bias": True},
    ),
    **{
        f"dora, {name}": (family, {"r": 4, "lora_alpha": 9, "use_dora": True, **options})
        for name, (family, options) in {
            "all-linear": ("llama", {"target_modules": "all-linear"}),
            "rsLoRA and patterns": (
                "llama",
                {
                    "target_modules": ALL,
                    "use_rslora": True,
                    "rank_pattern": {"q_proj": 2},
                    "exclude_modules": ["o_proj"],
                },
            ),
            "base biases": ("llama_biased", {"target_modules": ALL}),
            "bias all": ("qwen2", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
            "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
            "gemma3": ("gemma3", {"target_modules": ALL}),
            "bfloat16 file": ("llama", {"target_modules": ["v_proj", "down_proj"], "dtype": torch.bfloat16}),
        }.items()
    },
    "bd-lora": (
        "llama",
        {
            **{"r": 8, "lora_alpha": 12, "target_modules": ALL},
            "use_bdlora": {
                **{"target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": ["q_proj", "mlp.up"]},
                **{"nblocks": 4, "match_strict": False},
            },
        },
    ),
    "bd-lora, base biases, patterns": (
        "llama_biased",
        {
            **{"r": 4, "target_modules": ALL, "rank_pattern": {"q_proj": 6}, "use_rslora": True, "bias": "all"},
            "use_bdlora": {
                "target_modules_bd_a": ["o_proj", "mlp.down"],
                "target_modules_bd_b": ["q_", "k_", "v_", "gate", "up"],
                "nblocks": 2,
            },
        },
    ),
    "bd-lora of one block": (
        "qwen2",
        {"target_modules": QV, "use_bdlora": {"target_modules_bd_a": ["v"], "match_strict": False}},
    ),
    "bd-lora, fused": (
        "phi3",
        {"r": 6, "target_modules": "all-linear", "use_bdlora": {"target_modules_bd_b": ["model"], "nblocks": 2}},
    ),
    "target_parameters": (
        "llama",
        {
            **{"r": 4, "lora_alpha": 6, "target_modules": [], "rank_pattern": {"q_proj.weight": 2, "down_proj": 7}},
            "target_parameters": ["q_proj.weight", "mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"],
        },
    ),
    "target_parameters beside target_modules": (
        "phi3",
        {
            **{"r": 4, "target_modules": ["o_proj"], "target_parameters": ["qkv_proj.weight"]},
            **{"layers_to_transform": [1], "exclude_modules": ["qkv_proj"]},
        },
    ),
    "fused qkv": ("phi3", {"r": 4, "target_modules": ["qkv_proj"]}),
    "fused gate_up": ("phi3", {"r": 4, "target_modules": ["gate_up_proj", "o_proj"]}),
    "fused, all-linear": ("phi3", {"r": 4, "target_modules": "all-linear", "rank_pattern": {"qkv_proj": 9}}),
    "gemma3": ("gemma3", {"r": 4, "target_modules": ALL}),
    "init gaussian": ("llama", {"target_modules": QV, "init_lora_weights": "gaussian"}),
    "init orthogonal": ("llama", {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    "init mica": ("llama", {"target_modules": QV, "init_lora_weights": "mica"}),
    "init off": ("llama", {"target_modules": QV, "init_lora_weights": False}),
    "pissa": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ALL, "init_lora_weights": "pissa"}),
    "pissa, rsLoRA and patterns": (
        "qwen2",
        {
            **{"r": 6, "target_modules": ALL, "init_lora_weights": "pissa", "use_rslora": True},
            **{"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"up_proj": 20}},
        },
    ),
    "pissa, wider than a module": ("gemma3", {"r": 20, "target_modules": ["k_proj"], "init_lora_weights": "pissa"}),
    "olora": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ALL, "init_lora_weights": "olora"}),
    "olora, base biases": (
        "llama_biased",
        {"r": 5, "target_modules": QV, "init_lora_weights": "olora", "bias": "lora_only"},
    ),
    "kasa": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ALL, "kasa_config": {}}),
    "kasa, fused": ("phi3", {"r": 3, "target_modules": "all-linear", "kasa_config": {}, "use_rslora": True}),
    "kasa, base biases": ("llama_biased", {"r": 3, "target_modules": QV, "kasa_config": {}, "bias": "lora_only"}),
    "olora, fused": ("phi3", {"r": 4, "target_modules": "all-linear", "init_lora_weights": "olora"}),
    "float16 file": ("llama", {"target_modules": ALL, "dtype": torch.float16}),
    "bfloat16 file": ("llama", {"target_modules": ALL, "dtype": torch.bfloat16}),
    "bfloat16 file with biases": (
        "qwen2",
        {"target_modules": QV, "bias": "all", "lora_bias": True, "dtype": torch.bfloat16},
    ),
}
"""Every LoRA option: base, arguments of make_peft_adapter."""

DOWN = ["down_proj"]

IA3_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (family, {"kind": "IA3", "feedforward_modules": [], **options})
    for name, (family, options) in {
        "ia3, as PEFT targets llama": (
            "llama",
            {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": DOWN},
        ),
        **{f"ia3 on {name}": ("llama", {"target_modules": [name]}) for name in ALL},
        "ia3 on the feed-forward input": ("llama", {"target_modules": DOWN, "feedforward_modules": DOWN}),
        "ia3 on up's output and down's input": (
            "llama",
            {"target_modules": ["up_proj", "gate_proj", "down_proj"], "feedforward_modules": DOWN},
        ),
        "ia3, all-linear": ("llama", {"target_modules": "all-linear", "feedforward_modules": DOWN}),
        "ia3 by patterns": (
            "llama",
            {
                "target_modules": r".*\.[02]\..*(k|up|down)_proj",
                "feedforward_modules": r"model\.layers\.0\.mlp\.down_proj",
                "exclude_modules": [],
            },
        ),
        "ia3, exclude": ("llama", {"target_modules": ALL, "exclude_modules": ["layers.1.mlp.up_proj", "o_proj"]}),
        "ia3, feed-forward by a bare ending": (
            "llama",
            {"target_modules": r".*(q|down)_proj", "feedforward_modules": ["wn_proj"], "fan_in_fan_out": True},
        ),
        "ia3, base biases": ("llama_biased", {"target_modules": ALL, "feedforward_modules": DOWN}),
        "ia3, biases and outputs alone": ("llama_biased", {"target_modules": ["up_proj", "down_proj", "o_proj"]}),
        "ia3, as PEFT targets qwen2": (
            "qwen2",
            {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": DOWN},
        ),
        "ia3, fused": ("phi3", {"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": DOWN}),
        "ia3, fused gate_up and down's input": (
            "phi3",
            {"target_modules": ["gate_up_proj", "down_proj"], "feedforward_modules": DOWN},
        ),
        "ia3, gemma3": ("gemma3", {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": DOWN}),
        "ia3, bfloat16 file": ("qwen2", {"target_modules": ALL, "dtype": torch.bfloat16}),
    }.items()
}
"""Every IA3 option, in the same form."""


UNTRAINED = {"r": 4, "target_modules": ALL, "init_weights": False}

MODULE_KIND_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{kind.lower()}, {name}": (family, {"kind": kind, **options})
    for kind, cases in {
        "ADALORA": {
            "attention": ("llama", {"target_modules": QV, "init_r": 6, "lora_alpha": 9, "total_step": 10}),
            "all, base biases": ("llama_biased", {"target_modules": ALL, "init_r": 3, "total_step": 10}),
            "fused": ("phi3", {"target_modules": ["qkv_proj", "down_proj"], "init_r": 3, "total_step": 10}),
        },
        "LOHA": {
            "all": ("llama", {**UNTRAINED, "r": 3, "alpha": 5}),
            "patterns": (
                "qwen2",
                {**UNTRAINED, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 16}},
            ),
            "fused": ("phi3", {**UNTRAINED, "target_modules": "all-linear"}),
            "bfloat16 file": ("gemma3", {**UNTRAINED, "dtype": torch.bfloat16}),
        },
        "VERA": {
            "bias all": ("llama_biased", {**UNTRAINED, "r": 8, "target_modules": QV, "bias": "all"}),
            "all": ("llama", {**UNTRAINED, "r": 8}),
            "drawn again": ("llama_biased", {**UNTRAINED, "r": 8, "save_projection": False, "projection_prng_key": 7}),
            "one layer": ("qwen2", {**UNTRAINED, "target_modules": QV, "layers_to_transform": [1]}),
        },
        "PVERA": {
            "all": ("gemma3", {**UNTRAINED, "r": 8}),
            "drawn again": ("llama", {**UNTRAINED, "target_modules": QV, "save_projection": False}),
        },
        "MISS": {
            "all": ("llama", {**UNTRAINED, "r": 6}),
            "fused": ("phi3", {**UNTRAINED, "target_modules": ["qkv_proj", "gate_up_proj"], "init_weights": True}),
            "mini": ("qwen2", {**UNTRAINED, "r": 8, "mini_r": 4, "init_weights": "mini"}),
            "bat": ("llama_biased", {**UNTRAINED, "r": 8, "init_weights": "bat"}),
            "bat, fused": ("phi3", {**UNTRAINED, "r": 16, "init_weights": "bat", "target_modules": "all-linear"}),
        },
        "DELORA": {
            "its own biases": (
                "llama_biased",
                {**UNTRAINED, "target_modules": ["k_proj", "down_proj"], "bias": "delora_only"},
            ),
            "all": ("llama", UNTRAINED),
            "patterns": ("llama_biased", {**UNTRAINED, "rank_pattern": {"k_proj": 2}, "lambda_pattern": {"k_proj": 3}}),
            "fused": ("phi3", {**UNTRAINED, "target_modules": ["qkv_proj", "down_proj"]}),
        },
        "VBLORA": {
            "logits": ("llama", {"r": 3, "num_vectors": 9, "vector_length": 8, "topk": 3, "target_modules": ALL}),
            "compact": (
                "qwen2",
                {
                    **{"r": 3, "num_vectors": 9, "vector_length": 8, "topk": 2, "target_modules": QV},
                    "save_only_topk_weights": True,
                },
            ),
        },
        "HRA": {
            "bias all": ("qwen2", {**UNTRAINED, "target_modules": ["v_proj", "up_proj"], "bias": "all"}),
            "all": ("llama", UNTRAINED),
            "orthonormal, base biases": ("llama_biased", {**UNTRAINED, "r": 5, "apply_GS": True}),
            "fused": ("phi3", {**UNTRAINED, "target_modules": "all-linear"}),
            "gemma3": ("gemma3", {**UNTRAINED, "target_modules": QV}),
        },
        "UNILORA": {
            "shuffled again": ("llama", {**UNTRAINED, "theta_d_length": 50}),
            "in the file": ("qwen2", {**UNTRAINED, "target_modules": QV, "save_indices": True, "proj_seed": 3}),
            "fused, in the model's order": ("phi3", {**UNTRAINED, "target_modules": "all-linear", "proj_seed": 5}),
        },
        "TINYLORA": {
            "its own biases": ("qwen2", {"r": 2, "u": 5, "target_modules": ALL, "bias": "tinylora_only"}),
            "all": ("llama", {"r": 2, "u": 5, "target_modules": ALL}),
            "tied": ("qwen2", {"r": 3, "u": 5, "target_modules": ALL, "weight_tying": 0.8}),
            "drawn again, in the model's order": (
                "phi3",
                {"r": 2, "u": 5, "target_modules": "all-linear", "weight_tying": 0.5, "save_projection": False},
            ),
        },
        "DEFT": {
            "all": ("llama", {**UNTRAINED, "alpha": 9}),
            "orthonormal, base biases": ("llama_biased", {**UNTRAINED, "decomposition_method": "qr"}),
            "para": ("qwen2", {**UNTRAINED, "target_modules": QV, "para": True, "decomposition_method": "qr"}),
            "fused": ("phi3", {**UNTRAINED, "target_modules": "all-linear", "decomposition_method": "qr"}),
        },
        "LOKR": {
            "all, w2 whole": ("llama", {**UNTRAINED, "alpha": 9}),
            "w2 decomposed": ("llama", {**UNTRAINED, "r": 2, "decompose_factor": 2}),
            "both decomposed": ("llama_biased", {**UNTRAINED, "r": 1, "decompose_both": True, "decompose_factor": 8}),
            "both, no divisor": ("qwen2", {**UNTRAINED, "r": 2, "decompose_both": True, "decompose_factor": 7}),
            "patterns": (
                "qwen2",
                {**UNTRAINED, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"layers.1.mlp.up_proj": 16}},
            ),
            "one block": ("gemma3", {**UNTRAINED, "alpha": 80, "decompose_factor": 1}),
            "fused": ("phi3", {**UNTRAINED, "r": 2, "target_modules": "all-linear", "decompose_factor": 4}),
        },
        "GRALORA": {
            "bias all": ("llama_biased", {**UNTRAINED, "target_modules": QV, "bias": "all"}),
            "all": ("llama", {**UNTRAINED, "r": 6, "gralora_k": 2, "alpha": 9}),
            "hybrid, base biases": ("llama_biased", {**UNTRAINED, "r": 8, "gralora_k": 4, "hybrid_r": 3}),
            "fused": ("phi3", {**UNTRAINED, "r": 32, "target_modules": "all-linear"}),
            "one block": ("gemma3", {**UNTRAINED, "gralora_k": 1, "dtype": torch.bfloat16}),
        },
        "OSF": {
            "all": ("llama", {"target_modules": ALL, "effective_rank": 28}),
            "half, base biases": ("llama_biased", {"target_modules": ["k_proj", "down_proj"]}),
            "patterns": (
                "qwen2",
                {"target_modules": QV, "effective_rank": 0.9, "rank_pattern": {"layers.1.*q_proj$": 50, "^v": 3}},
            ),
            "fused": ("phi3", {"target_modules": "all-linear", "effective_rank": 32}),
        },
        "PEANUT": {
            "all": ("llama", {**UNTRAINED, "act_fn": "silu", "scaling": 1.5}),
            "deep, base biases": ("llama_biased", {**UNTRAINED, "depth": 2}),
            "fused": ("phi3", {**UNTRAINED, "target_modules": "all-linear", "depth": 1, "act_fn": "gelu"}),
        },
        "POLY": {
            "one task": ("llama", {**UNTRAINED, "task_id": 0}),
            "splits, base biases": (
                "llama_biased",
                {**UNTRAINED, "n_tasks": 3, "n_skills": 2, "n_splits": 4, "task_id": 2},
            ),
            "fused": ("phi3", {**UNTRAINED, "target_modules": ["qkv_proj", "down_proj"], "n_tasks": 2, "task_id": 1}),
        },
        "SHIRA": {
            "all": ("llama", {"r": 3, "target_modules": ALL, "random_seed": 3, "init_weights": False}),
            "fused": ("phi3", {"r": 2, "target_modules": "all-linear", "init_weights": False}),
        },
        "FOURIERFT": {
            "all": ("llama", {"n_frequency": 300, "scaling": 20.0, "target_modules": ALL}),
            "few waves": ("qwen2", {"n_frequency": 9, "n_frequency_pattern": {"v_proj": 5}, "target_modules": QV}),
            "fused": ("phi3", {"n_frequency": 200, "target_modules": "all-linear", "random_loc_seed": 4}),
        },
        "WAVEFT": {
            "all": ("llama", {"n_frequency": 300, "target_modules": ALL, "init_weights": False}),
            "not transformed": (
                "llama_biased",
                {"n_frequency": 90, "n_frequency_pattern": {"k_proj": 50}, "use_idwt": False, "target_modules": ALL},
            ),
        },
        "C3A": {
            "bias all": ("qwen2", {"block_size": 8, "target_modules": ["q_proj"], "bias": "all"}),
            "all": ("llama", {"block_size": 16, "block_size_pattern": {"up_proj": 8}, "target_modules": ALL}),
            "fused": ("phi3", {"block_size": 8, "target_modules": "all-linear"}),
        },
        "HIRA": {
            "all": ("llama", {**UNTRAINED, "rank_pattern": {"k_proj": 7}}),  # which PEFT does not heed
            "fused, bfloat16 file": ("phi3", {**UNTRAINED, "target_modules": "all-linear", "dtype": torch.bfloat16}),
        },
        "OFT": {
            "all": ("llama", {"target_modules": ALL, "oft_block_size": 16, "init_weights": False}),
            "Cayley's map, fused": (
                "phi3",
                {"target_modules": "all-linear", "oft_block_size": 8, "use_cayley_neumann": False},
            ),
            "shared, by blocks, base biases": (
                "llama_biased",
                {
                    "target_modules": ALL,
                    "r": 5,
                    "oft_block_size": 0,
                    "block_share": True,
                    "num_cayley_neumann_terms": 3,
                },
            ),
            "constrained": ("qwen2", {"target_modules": QV, "oft_block_size": 20, "coft": True, "eps": 0.8}),
        },
        "BOFT": {
            "all": ("llama", {"target_modules": ALL, "boft_block_size": 8}),
            "by blocks, base biases": (
                "llama_biased",
                {"target_modules": ALL, "boft_block_num": 4, "boft_block_size": 0},
            ),
            "three factors": (
                "llama",
                {"target_modules": QV, "boft_block_size": 4, "boft_n_butterfly_factor": 3},
            ),
        },
        "RANDLORA": {
            "all": ("llama", {**UNTRAINED, "r": 10, "randlora_alpha": 20}),
            "sparse": ("qwen2", {**UNTRAINED, "r": 16, "target_modules": QV, "sparse": True}),
            "fused": ("phi3", {**UNTRAINED, "r": 24, "target_modules": "all-linear"}),
        },
        "SUPERTUNING": {
            "all": ("llama", {"target_modules": ALL, "sparsity": 0.9, "init_weights": False}),
            "smallest, with a LoRA": (
                "qwen2",
                {"target_modules": QV, "sparsity": 0.97, "select_top": False, "r": 3, "lora_alpha": 5},
            ),
        },
        "FROD": {
            "all": ("llama", {"target_modules": ALL, "sparse_rate": 0.05, "init_weights": False}),
            "base biases, one layer": (
                "llama_biased",
                {"target_modules": ["k_proj", "down_proj"], "bias": "frod_only", "layers_to_transform": [1]},
            ),
            "fused": ("phi3", {"target_modules": "all-linear", "sparse_rate": 0.0, "init_weights": False}),
        },
        "GLORA": {
            "all": ("llama", {"target_modules": ALL, "r": 3, "init_weights": False}),
            "base biases": ("llama_biased", {"target_modules": ALL, "r": 2, "config_D_E": "vector"}),
            "by output": (
                "qwen2",
                {"target_modules": QV, "config_A_B": "vector", "config_C": "vector", "config_D_E": "constant"},
            ),
            "constants, trained biases": (
                "llama_biased",
                {
                    "target_modules": QV,
                    "config_A_B": "constant",
                    "config_C": "none",
                    "config_D_E": "none",
                    "bias": "all",
                },
            ),
            "biases alone": ("qwen2", {"target_modules": QV, "config_A_B": "none"}),
        },
        "BEFT": {
            "value": ("llama", {"target_modules": ["v_proj"]}),
            "all, base biases": ("llama_biased", {"target_modules": ALL}),
        },
    }.items()
    for name, (family, options) in cases.items()
}
"""Every option of the kinds that come to one part for each module."""


@dataclass
class PeftAdapter:
    """A PEFT model with one random adapter, saved in `folder`."""

    model: Any  # peft.PeftModel, eval mode
    folder: Path
    told: dict[str, Tensor] = field(default_factory=dict)  # beside the tokens, at each call

    def logits(self, ids: list[int]) -> Tensor:
        """[len(ids), vocab] fp32, computed alone."""
        with torch.no_grad():
            return self.model(torch.tensor([ids]), **self.told).logits[0].float()

    def modules(self) -> dict[str, Any]:
        """PEFT's own layers by path, as "model.layers.0.self_attn.q_proj"."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        named = self.model.get_base_model().named_modules()
        return {name: module for name, module in named if isinstance(module, BaseTunerLayer)}


class _BlockDiagonal:
    """What PEFT's CUDA extension for BOFT does: blocks [n, d, b, b] along the diagonals of [n, d b, d b]."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*each) for each in blocks])]


def make_peft_adapter(
    base: Any,
    folder: Path,
    *,
    kind: str = "LORA",
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    strength: float | None = 0.5,
    task_id: int | None = None,
    **options: Any,
) -> PeftAdapter:
    """A random adapter of a peft_type with the options of its config, its file in `dtype`, as PEFT saves it.

    strength: None leaves it as it began. task_id: which PEFT is told at each call, written to the config.

    A and B, and IA3's vectors, are drawn so that each module's own output changes by `strength` of its size before
    scaling; biases that the config trains get values of their own.
    """
    from peft import get_peft_config, get_peft_model
    from peft.tuners.boft import layer as boft

    if options.get("boft_n_butterfly_factor", 1) > 1:
        boft._FBD_CUDA = _BlockDiagonal  # PEFT's own needs a GPU, and without one it takes one factor
    config = get_peft_config({"peft_type": kind, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(copy.deepcopy(base), config).eval()
    if strength is not None:
        randomise_adapter(model, seed, dtype, strength)
    save_adapter(model, folder, dtype)
    if task_id is None:
        return PeftAdapter(model, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_id": task_id}))
    return PeftAdapter(model, folder, {"task_ids": torch.tensor([task_id])})


_OWN_STD: dict[str, Callable[[Tensor], float]] = {
    "lora_E": lambda w: 2.0,
    "lora_embedding_A": lambda w: 2.0,
    "lora_embedding_B": lambda w: 2.0 * w.numel() ** -0.5,
    "hada_w1_a": lambda w: w.shape[1] ** -0.5,
    "hada_w1_b": lambda w: 2.0,
    "hada_w2_a": lambda w: 2.0 * w.shape[1] ** -0.5,
    "hada_w2_b": lambda w: 2.0 * w.shape[1] ** -0.5,
    "vera_lambda_b": lambda w: 1.0,
    "vera_lambda_d": lambda w: 1.0,
    "miss_block": lambda w: 0.15,
    "delora_A": lambda w: 1.0,
    "delora_B": lambda w: 1.0,
    "vblora_logits_A": lambda w: 2.0,
    "vblora_logits_B": lambda w: 2.0,
    "vblora_vector_bank": lambda w: 0.5,
    "hra_u": lambda w: 1.0,
    "unilora_theta_d": lambda w: 4.0,
    "tinylora_v": lambda w: 1.0,
    "beft_bias": lambda w: 1.0,
    "lora_diag": lambda w: 2.0,
    "lokr_w1": lambda w: 1.0,
    "lokr_w1_a": lambda w: 1.0,
    "lokr_w1_b": lambda w: w.shape[0] ** -0.5,
    "lokr_w2": lambda w: w.shape[1] ** -0.5,
    "lokr_w2_a": lambda w: 1.0,
    "lokr_w2_b": lambda w: (w.shape[0] * w.shape[1]) ** -0.5,
    "gralora_A": lambda w: w.shape[1] ** -0.5,
    "gralora_B": lambda w: 0.5,
    "gralora_A_general": lambda w: w.shape[1] ** -0.5,
    "gralora_B_general": lambda w: 0.5,
    "peanut_A": lambda w: 8.0,
    "peanut_B": lambda w: 0.05,
    "peanut_encoders": lambda w: 2 * w.shape[1] ** -0.5,
    "peanut_decoders": lambda w: 2 * w.shape[1] ** -0.5,
    "poly_lora_A": lambda w: 2.0 * (w.shape[0] * w.shape[2]) ** -0.5,
    "poly_lora_B": lambda w: 8.0,
    "module_logits": lambda w: 4.0,
    "deft_P": lambda w: w.shape[0] ** -0.5,
    "deft_R": lambda w: 0.5,
    "shira_weight": lambda w: 0.5,
    "fourierft_spectrum": lambda w: 8.0,
    "waveft_spectrum": lambda w: 0.05,
    "c3a_kernel": lambda w: 8.0,
    "hira_A": lambda w: w.shape[1] ** 0.5,
    "hira_B": lambda w: 1.0,
    "oft_R": lambda w: 0.2,
    "boft_R": lambda w: 0.3,
    "boft_s": lambda w: 1.0,
    "randlora_lambda": lambda w: 0.4,  # at 1 PEFT in fp32 is 3e-4 from itself in fp64
    "randlora_gamma": lambda w: w.shape[1] ** -1.0,
    "supertuning_values": lambda w: 0.3,
    "supertuning_lora_A": lambda w: w.shape[1] ** -0.5,
    "supertuning_lora_B": lambda w: w.shape[1] ** -0.5,
    "frod_lambda_s_values": lambda w: 0.3,
    "glora_A": lambda w: 1.0,
    "glora_B": lambda w: 0.3,
    "glora_C": lambda w: 0.5,
    "glora_D": lambda w: 0.5,
    "glora_E": lambda w: 0.5,
}
"""Of other kinds' parameters: standard deviations that move outputs by about their own size, at a strength of 1."""


STARTS = ("pissa", "olora")
"""Values of init_lora_weights whose start is taken out of the base's weights."""


def randomise_adapter(model: Any, seed: int, dtype: torch.dtype, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    config = next(iter(model.peft_config.values()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mean: float | Tensor = 0.0
            std: float | Tensor
            if ".lora_" in name and getattr(config, "init_lora_weights", None) in STARTS:
                mean, std = weight, 0.1 * strength  # beside what it took out of the base
            elif ".osf_svd_params." in name:
                mean, std = weight, 2 * strength * weight.norm() * weight.numel() ** -0.5  # likewise
            elif ".lora_A." in name:
                std = weight.shape[1] ** -0.5
            elif ".lora_B." in name and name.endswith("weight"):
                std = strength * weight.shape[1] ** -0.5
            elif ".lora_B." in name or (weight.requires_grad and name.endswith(".bias")):
                std = strength
            elif ".ia3_l." in name:
                mean, std = 1.0, strength
            elif ".lora_magnitude_vector." in name:
                mean, std = weight, strength * weight  # the norms of the base's rows
            elif ".modules_to_save." in name or ".ln_tuning_layers." in name:
                mean, std = weight, strength * float(weight.std() + 0.5 * weight.abs().mean())
            elif ".frod_lambda_l." in name:
                mean, std = weight, 0.5 * strength * weight
            elif ".trainable_tokens_delta." in name:
                mean, std = weight, strength * float(weight.std())
            elif (own := next((own for part, own in _OWN_STD.items() if f"{part}." in name), None)) is not None:
                std = own(weight) * strength
            else:
                continue
            drawn = mean + torch.randn(weight.shape, generator=generator) * std
            weight.copy_(drawn.to(dtype))  # what the file will hold, exactly


def save_adapter(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save as PEFT does; for other dtypes than fp32, convert what it wrote tensor by tensor."""
    import safetensors.torch

    model.save_pretrained(folder)
    if dtype != torch.float32:
        file = folder / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(file)
        # loaded tensors are views of the mapped file, which is about to be written
        safetensors.torch.save_file({name: tensor.to(dtype).clone() for name, tensor in tensors.items()}, file)


def layout_of(model: Any, *, dtype: torch.dtype = torch.float32, page_bytes: int = 4096) -> BaseLayout:
    """What an adapter of this transformers model must fit, read off its modules."""
    layers = model.model.layers
    modules = dict(layers[0].named_modules())
    projections = []
    ends: dict[Site, int] = {}
    for name, site in SITES.items():
        if name in modules:
            linear = modules[name]
            start = ends.get(site, 0)
            ends[site] = start + linear.out_features
            columns = linear.in_features, start, linear.out_features
            projections.append(
                Projection(
                    *(name, site, *columns, linear.bias is not None),
                    reads_hidden=site in (Site.QKV, Site.GATE_UP),
                    gated_by=Site.GATE_UP if site == Site.DOWN else None,
                )
            )
    return BaseLayout("tiny", len(layers), tuple(projections), page_bytes, dtype)


def sum_of_windows(parts: Sequence[LowRank], layout: BaseLayout) -> Tensor:
    """The change of the weight [out, in] that the parts of one module come to, each where its window is."""
    name = parts[0].projection.name
    whole = next(projection for projection in layout.projections if projection.name == name)
    found = torch.zeros(whole.out_features, whole.in_features)
    for part in parts:
        own = part.projection
        rows = slice(own.out_start - whole.out_start, own.out_start - whole.out_start + own.out_features)
        columns = slice(own.in_start, own.in_start + own.in_features)
        found[rows, columns] += part.scaling * part.b.float() @ part.a.float()
    return found


def served_base_of(model: Any, layout: BaseLayout) -> ServedBase:
    """This transformers model as adapters are checked against it."""

    def linear(layer: int, name: str) -> Any:
        return model.model.layers[layer].get_submodule(name)

    return ServedBase(
        layout,
        bias=lambda layer, name: linear(layer, name).bias,
        squared_norms=lambda layer, name: linear(layer, name).weight.detach().square().sum(1),
        products=lambda layer, name, a: a @ linear(layer, name).weight.detach().T,
        weight=lambda layer, name: linear(layer, name).weight.detach().float(),
    )
