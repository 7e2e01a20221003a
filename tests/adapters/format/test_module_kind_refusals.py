"""Broken adapters of the kinds that come to one part for each module: each is refused with its own code, by name."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format import wanted
from tests.support.adapter_folder import AdapterFolder
from tests.support.adapter_reading import read_adapter
from tests.support.peft_adapters import QV, UNTRAINED, layout_of, make_peft_adapter, served_base_of
from tests.support.refusals import refused
from tests.support.tiny import tiny_hf_model

pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS = 2
OPTIONS = {**UNTRAINED, "target_modules": QV}
KINDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_modules": QV, "total_step": 10},
    "LOHA": OPTIONS,
    "VERA": OPTIONS,
    "PVERA": OPTIONS,
    "MISS": OPTIONS,
    "DELORA": OPTIONS,
    "VBLORA": {"r": 4, "num_vectors": 9, "vector_length": 8, "target_modules": QV, "save_only_topk_weights": True},
    "HRA": OPTIONS,
    "UNILORA": {**OPTIONS, "save_indices": True},
    "TINYLORA": {"r": 2, "u": 5, "target_modules": QV},
    "BEFT": {"target_modules": QV},
    "DEFT": OPTIONS,
    "LOKR": {**OPTIONS, "r": 2, "decompose_factor": 4},
    "GRALORA": {**OPTIONS, "hybrid_r": 3},
    "OSF": {"target_modules": QV, "effective_rank": 28},
    "PEANUT": {**OPTIONS, "depth": 1},
    "POLY": {**OPTIONS, "n_tasks": 2, "n_skills": 3, "task_id": 1},
    "SHIRA": {"r": 4, "target_modules": QV, "random_seed": 1, "init_weights": False},
    "FOURIERFT": {"n_frequency": 40, "target_modules": QV},
    "WAVEFT": {"n_frequency": 40, "target_modules": QV, "init_weights": False},
    "C3A": {"block_size": 16, "target_modules": QV},
    "HIRA": OPTIONS,
    "RANDLORA": OPTIONS,
    "OFT": {"oft_block_size": 16, "target_modules": QV, "init_weights": False},
    "BOFT": {"boft_block_size": 16, "target_modules": QV, "init_weights": False},
    "SUPERTUNING": {"sparsity": 0.9, "r": 4, "target_modules": QV},
    "FROD": {"target_modules": QV},
    "GLORA": {"r": 4, "target_modules": QV},
}
WITHOUT_BIAS = ("LOHA", "LOKR", "BEFT", "OSF", "PEANUT", "POLY", "SHIRA", "HIRA", "SUPERTUNING")
"""Kinds whose configs have no such option."""
RANKS = {
    "OFT": "oft_block_size",
    "BOFT": "boft_block_size",
    "ADALORA": "init_r",
    "FOURIERFT": "n_frequency",
    "WAVEFT": "n_frequency",
    "C3A": "block_size",
    "BEFT": "",
    "OSF": "",
    "FROD": "",
}
"""What says the size of a module's tensors, where it is not r."""
ANY_SIZE = ("SHIRA", "FOURIERFT", "WAVEFT", "C3A", "OFT", "BOFT")
"""Kinds whose size is no rank."""


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_hf_model("llama", num_hidden_layers=LAYERS)


class Folder(AdapterFolder):
    """An adapter of a kind on the tiny Llama, made by PEFT."""

    def __init__(self, base: Any, path: Path, kind: str) -> None:
        make_peft_adapter(base, path, kind=kind, **KINDS[kind])
        self._open(base, path)

    @classmethod
    def of(cls, base: Any, path: Path) -> Folder:
        """The adapter that is at `path`."""
        folder = cls.__new__(cls)
        folder._open(base, path)
        return folder

    def _open(self, base: Any, path: Path) -> None:
        super().__init__(path, lambda dtype: served_base_of(base, layout_of(base, dtype=dtype)))
        self.config = json.loads((path / "adapter_config.json").read_text())
        self.tensors = safetensors.torch.load(self.weights.read_bytes())

    def names(self, end: str) -> list[str]:
        found = [name for name in self.tensors if name.endswith(end)]
        assert found
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files(base: Any, tmp_path: Path, kind: str) -> None:
    """Each tensor in turn: gone, twice, of another shape, of another type, not finite; then cut short."""
    folder = Folder(base, tmp_path, kind)
    sound = dict(folder.tensors)
    looked_at = [name for name in sorted(sound) if not re.search(r"proj\.randlora_[AB]$", name)]
    for name in looked_at[:5] + looked_at[-3:]:
        tensor = sound[name]
        folder.tensors = {other: t for other, t in sound.items() if other != name}
        folder.refused("missing_tensor", re.escape(name))
        folder.tensors = {**sound, name: torch.cat((tensor, tensor))}
        folder.refused("shape_mismatch", re.escape(f"{name} has shape"))
        folder.tensors = {**sound, name: tensor[None]} if tensor.ndim < 3 else {**sound, name: tensor[0]}
        folder.refused("shape_mismatch", re.escape(name), "gather|say so")
        folder.tensors = {**sound, name: torch.zeros_like(tensor, dtype=torch.int32)}
        if tensor.is_floating_point():
            folder.refused("bad_file", re.escape(name), "I32|int32")
            bad = tensor.clone()
            bad.view(-1)[-1] = float("nan")
            folder.tensors = {**sound, name: bad}
            folder.refused("not_finite", re.escape(name), "1 values")
        else:
            folder.tensors = {**sound, name: tensor.float()}
            folder.refused("bad_file", re.escape(name), "whole numbers")
            for value in (1 << 40, -1):
                folder.tensors = {**sound, name: torch.full_like(tensor, value, dtype=torch.int64)}
                folder.tensors[name][..., 0] = 0
                with refused("bad_file", re.escape(name)):
                    folder.read()
    for more in ("model.layers.0.self_attn.k_proj", "model.layers.7.self_attn.q_proj", "lm_head"):
        extra = f"base_model.model.{more}.{sorted(sound)[-1].rpartition('.')[2]}"
        folder.tensors = {**sound, extra: torch.ones(2, 2)}
        folder.refused("unsupported_option" if more == "lm_head" else "unmatched_tensor", re.escape(extra))
    folder.tensors = {**sound, "base_model.something": torch.ones(2)}
    folder.refused("unmatched_tensor", "base_model.something")
    folder.tensors = sound
    folder.read()
    folder.weights.write_bytes(folder.weights.read_bytes()[:-3])
    folder.refused("bad_file", write=False)


@pytest.mark.parametrize("kind", KINDS)
def test_contradicting_configs(base: Any, tmp_path: Path, kind: str) -> None:
    folder = Folder(base, tmp_path, kind)
    sound = dict(folder.config)
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"modules_to_save": ["lm_head"]}, "unsupported_option", "modules_to_save"),
        ({"some_new_option": 3}, "unsupported_option", "some_new_option"),
        ({"target_modules": None}, "bad_config", "target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "unsupported_option", "lm_head"),
        ({"target_modules": ["q_proj", "v_proj", "c_attn"]}, "bad_config", "c_attn"),
        ({"target_modules": "("}, "bad_config", "not valid"),
    ]
    if kind not in WITHOUT_BIAS:
        cases.append(({"bias": "some"}, "bad_config", "bias is"))
    if rank := RANKS.get(kind, "r"):
        cases += [({rank: value}, "bad_config", f"{rank} is") for value in (0, -1, 2.5, "8", True)]
        cases.append(({rank: 8 if kind in ("C3A", "BOFT") else 6}, "shape_mismatch", "expected"))
        if kind not in ANY_SIZE:
            cases.append(({rank: 1025}, "too_large", f"{rank} is 1025"))
    for change, code, pattern in cases:
        folder.config = {**sound, **change}
        if kind == "TINYLORA" and change.get("r") == 6:
            continue  # its A has as many rows as are saved, but for narrow modules
        folder.refused(code, pattern)
    folder.config = {**sound, "target_modules": [*QV, "k_proj"]}
    with pytest.raises(AdapterRefused) as caught:
        folder.read()
    assert caught.value.code in ("missing_tensor", "shape_mismatch")
    folder.config = {**sound, "target_modules": ["q_proj"]}
    with pytest.raises(AdapterRefused) as caught:
        folder.read()
    assert caught.value.code in ("unmatched_tensor", "shape_mismatch")


@pytest.mark.parametrize(
    ("kind", "change", "code", "pattern"),
    [
        ("ADALORA", {"use_dora": True}, "unsupported_option", "use_dora"),
        ("ADALORA", {"lora_bias": True}, "unsupported_option", "lora_bias"),
        ("ADALORA", {"layer_replication": [[0, 1]]}, "unsupported_option", "layer_replication"),
        ("ADALORA", {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, True, False]}}, "bad_config",
         "expected 4 times true or false"),
        ("ADALORA", {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, 1, 0, False]}}, "bad_config",
         "expected 4 times true or false"),
        ("ADALORA", {"rank_pattern": {"model.layers.0.self_attn.q_proj": [True] * 4}}, "bad_config", ""),
        ("ADALORA", {"rank_pattern": {"model.layers.0.mlp.up_proj.lora_E": [True] * 4}}, "bad_config", "not among"),
        ("ADALORA", {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, True, True, False]}},
         "shape_mismatch", r"q_proj\.lora_[AB]"),
        ("ADALORA", {"rank_pattern": [1]}, "bad_config", "rank_pattern"),
        ("LOHA", {"r": 33}, "too_large", "1089 ranks"),
        ("LOHA", {"rank_pattern": {"q_proj": 40}}, "too_large", "1600 ranks"),
        ("LOHA", {"alpha": "8"}, "bad_config", "alpha"),
        ("VERA", {"save_projection": False}, "unmatched_tensor", "vera_A"),
        ("VERA", {"projection_prng_key": -1}, "bad_config", "projection_prng_key"),
        ("VERA", {"save_projection": "no"}, "bad_config", "save_projection"),
        ("PVERA", {"sample_at_inference": True}, "unsupported_option", "sample_at_inference"),
        ("PVERA", {"peft_type": "VERA"}, "unmatched_tensor", "pvera_"),
        ("MISS", {"init_weights": "bat"}, "shape_mismatch", "miss_block"),
        ("MISS", {"init_weights": "bat", "r": 24}, "bad_config", "r is 24"),
        ("MISS", {"init_weights": "more"}, "unsupported_option", "more"),
        ("MISS", {"init_weights": "mini", "mini_r": 7}, "bad_config", "mini_r is 7"),
        ("MISS", {"init_weights": "mini", "mini_r": 0}, "bad_config", "mini_r is 0"),
        ("MISS", {"init_weights": "mini", "mini_r": 4}, "shape_mismatch", "miss_block"),
        ("MISS", {"r": 65}, "bad_config", "64 inputs"),
        ("DELORA", {"rank_pattern": {"q_proj": 2}}, "shape_mismatch", "delora_A"),
        ("DELORA", {"rank_pattern": {"q_proj": 0}}, "bad_config", "rank_pattern"),
        ("VBLORA", {"topk": 10}, "bad_config", "topk is 10"),
        ("VBLORA", {"topk": 3}, "shape_mismatch", "topk"),
        ("VBLORA", {"vector_length": 7}, "bad_config", "vector_length is 7"),
        ("VBLORA", {"num_vectors": 8}, "shape_mismatch", "vector_bank"),
        ("VBLORA", {"save_only_topk_weights": False}, "missing_tensor", "vblora_logits_A is missing"),
        ("HRA", {"r": 65}, "bad_config", "64 inputs"),
        ("HRA", {"apply_GS": 1}, "bad_config", "apply_GS"),
        ("UNILORA", {"save_indices": False}, "unmatched_tensor", "unilora_"),
        ("UNILORA", {"theta_d_length": 4}, "shape_mismatch", "theta_d"),
        ("UNILORA", {"proj_seed": 1.5}, "bad_config", "proj_seed"),
        ("TINYLORA", {"r": 3}, "shape_mismatch", "tinylora_[AB]"),
        ("TINYLORA", {"u": 6}, "shape_mismatch", "tinylora_"),
        ("TINYLORA", {"u": 1 << 40}, "bad_config", "u is"),
        ("TINYLORA", {"weight_tying": 1.0}, "unmatched_tensor", "tinylora_v"),
        ("TINYLORA", {"weight_tying": 2}, "bad_config", "weight_tying"),
        ("TINYLORA", {"save_projection": False}, "unmatched_tensor", "tinylora_P"),
        ("BEFT", {"r": 4}, "unsupported_option", "r is 4"),
        ("LOKR", {"decompose_factor": 0}, "bad_config", "decompose_factor is 0"),
        ("LOKR", {"decompose_factor": 2.0}, "bad_config", "decompose_factor is 2.0"),
        ("LOKR", {"decompose_factor": 2}, "shape_mismatch", "lokr_w"),
        ("LOKR", {"decompose_both": True, "r": 1}, "missing_tensor", "lokr_w1_a is missing"),
        ("LOKR", {"decompose_both": "yes"}, "bad_config", "decompose_both"),
        ("LOKR", {"r": 16}, "missing_tensor", "lokr_w2 is missing"),
        ("GRALORA", {"gralora_k": 4}, "shape_mismatch", "gralora_A"),
        ("GRALORA", {"gralora_k": 3}, "bad_config", "does not divide r, 4"),
        ("GRALORA", {"gralora_k": 0}, "bad_config", "gralora_k is 0"),
        ("GRALORA", {"gralora_k": 3, "r": 3}, "bad_config", "64 inputs"),
        ("GRALORA", {"hybrid_r": 0}, "unmatched_tensor", "general"),
        ("GRALORA", {"hybrid_r": -1}, "bad_config", "hybrid_r is -1"),
        ("GRALORA", {"r": 1024}, "too_large", "1027 ranks"),
        ("OSF", {"effective_rank": 27}, "shape_mismatch", "osf_svd_params"),
        ("OSF", {"effective_rank": 0}, "bad_config", "effective_rank is 0"),
        ("OSF", {"effective_rank": "half"}, "bad_config", "effective_rank"),
        ("OSF", {"rank_pattern": {"(": 3}}, "bad_config", "rank_pattern"),
        ("OSF", {"rank_pattern": {"q": -1}}, "bad_config", "rank_pattern"),
        ("PEANUT", {"act_fn": "snake"}, "unsupported_option", "act_fn"),
        ("PEANUT", {"depth": 2}, "missing_tensor", r"coders\.1\.weight is missing"),
        ("PEANUT", {"depth": 0}, "unmatched_tensor", "coders"),
        ("PEANUT", {"depth": 17}, "bad_config", "depth is 17"),
        ("POLY", {"task_id": None}, "needs_setting", "n_tasks is 2.*task_id"),
        ("POLY", {"task_id": 2}, "bad_config", "below n_tasks, 2"),
        ("POLY", {"task_id": "a"}, "bad_config", "task_id"),
        ("POLY", {"poly_type": "other"}, "unsupported_option", "poly_type"),
        ("POLY", {"n_splits": 3}, "bad_config", "n_splits is 3"),
        ("POLY", {"n_skills": 4}, "shape_mismatch", "poly_"),
        ("DEFT", {"decomposition_method": "svd"}, "unsupported_option", "svd"),
        ("DEFT", {"para": True}, "unmatched_tensor", "deft_R"),
        ("DEFT", {"alpha": "8"}, "bad_config", "alpha"),
        ("SHIRA", {"r": 33}, "bad_config", "r is 33, which is 4224 elements"),
        ("FOURIERFT", {"n_frequency": 5000}, "bad_config", "4096 elements"),
        ("FOURIERFT", {"n_frequency_pattern": {"v_proj": 2.5}}, "bad_config", "n_frequency_pattern"),
        ("FOURIERFT", {"scaling": "1"}, "bad_config", "scaling"),
        ("FOURIERFT", {"random_loc_seed": -1}, "bad_config", "random_loc_seed"),
        ("WAVEFT", {"wavelet_family": "db2"}, "unsupported_option", "db2"),
        ("WAVEFT", {"use_idwt": "yes"}, "bad_config", "use_idwt"),
        ("WAVEFT", {"proportional_parameters": True}, "unsupported_option", "proportional_parameters"),
        ("C3A", {"block_size": 24}, "bad_config", "block_size is 24"),
        ("C3A", {"block_size_pattern": {"q_proj": 8}}, "shape_mismatch", "c3a_kernel"),
        ("RANDLORA", {"save_projection": False}, "unsupported_option", "save_projection"),
        ("OFT", {"peft_version": "0.17.1"}, "unsupported_option", "peft_version is \"0.17.1\""),
        ("OFT", {"peft_version": None}, "unsupported_option", "before 0.18"),
        ("OFT", {"r": 4}, "bad_config", "one of them 0"),
        ("SUPERTUNING", {"sparsity": 1.0}, "bad_config", "sparsity is 1.0"),
        ("SUPERTUNING", {"sparsity": 0.8}, "shape_mismatch", "supertuning_"),
        ("SUPERTUNING", {"r": None}, "unmatched_tensor", "supertuning_lora_"),
        ("SUPERTUNING", {"save_precomputed_indices": False}, "unsupported_option", "save_precomputed_indices"),
        ("FROD", {"save_projection": False}, "unsupported_option", "save_projection"),
        ("FROD", {"sparse_rate": 2.0}, "bad_config", "sparse_rate is 2.0"),
        ("FROD", {"sparse_rate": 0.5}, "shape_mismatch", "frod_"),
        ("GLORA", {"config_A_B": "full"}, "bad_config", "config_A_B"),
        ("GLORA", {"config_A_B": "vector"}, "missing_tensor", "glora_A.X is missing"),
        ("GLORA", {"bias": "all"}, "unsupported_option", "config_C and config_D_E"),
        ("OFT", {"oft_block_size": 0}, "bad_config", "one of them 0"),
        ("OFT", {"block_share": True}, "shape_mismatch", "oft_R"),
        ("OFT", {"coft": True, "eps": "x"}, "bad_config", "eps"),
        ("OFT", {"num_cayley_neumann_terms": 0}, "bad_config", "num_cayley_neumann_terms"),
        ("BOFT", {"boft_n_butterfly_factor": 4}, "bad_config", "boft_n_butterfly_factor is 4"),
        ("BOFT", {"boft_n_butterfly_factor": 2}, "shape_mismatch", "boft_R"),
        ("BOFT", {"boft_block_size": 24}, "bad_config", "boft_block_size is 24"),
        ("BOFT", {"boft_block_size": 0, "boft_block_num": 5}, "bad_config", "boft_block_num is 5"),
        ("RANDLORA", {"randlora_alpha": None}, "bad_config", "randlora_alpha"),
    ],
)  # fmt: skip
def test_configs_of_each_kind(
    base: Any, tmp_path: Path, kind: str, change: dict[str, Any], code: str, pattern: str
) -> None:
    folder = Folder(base, tmp_path, kind)
    folder.config.update(change)
    folder.refused(code, pattern)


def test_biases_that_were_not_saved_or_not_asked_for(tmp_path: Path) -> None:
    base = tiny_hf_model("qwen2", num_hidden_layers=1)  # biases on q, k and v
    options = {**UNTRAINED, "target_modules": ["q_proj", "up_proj"]}
    make_peft_adapter(base, tmp_path, kind="HRA", **options, bias="all")
    folder = Folder.of(base, tmp_path)
    sound, path = dict(folder.tensors), "base_model.model.model.layers.0"
    q, k = f"{path}.self_attn.q_proj.base_layer.bias", f"{path}.self_attn.k_proj.bias"
    for name in (q, k):
        folder.tensors = {other: tensor for other, tensor in sound.items() if other != name}
        folder.refused("missing_tensor", re.escape(name), "not saved")
        folder.tensors = {**sound, name: torch.zeros(3)}
        folder.refused("shape_mismatch", re.escape(name), "a bias of the base")
        folder.tensors = {**sound, name: torch.full_like(sound[name], float("inf"))}
        folder.refused("not_finite", re.escape(name))
    folder.tensors = {**sound, f"{path}.mlp.up_proj.base_layer.bias": torch.zeros(96)}
    folder.refused("unmatched_tensor", "up_proj.base_layer.bias", "no such bias")
    folder.tensors = sound
    folder.config["bias"] = "hra_only"
    folder.refused("unmatched_tensor", "k_proj.bias|v_proj.bias")
    folder.config["bias"] = "none"
    folder.refused("unmatched_tensor", "bias does not ask")
    folder.config["bias"] = "all"
    folder.read()


def test_an_adapter_for_a_wider_base(base: Any, tmp_path: Path) -> None:
    folder = Folder(base, tmp_path, "LOHA")
    folder.config["base_model_name_or_path"] = "acme/wide"
    for name in folder.names("hada_w1_b"):
        folder.tensors[name] = torch.ones(4, 2048)
    folder.refused("shape_mismatch")


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        *[("ADALORA", "lora_E"), ("LOHA", "hada_w2_b"), ("VERA", "vera_lambda_b"), ("PVERA", "pvera_lambda_b")],
        *[("MISS", "miss_block"), ("DELORA", "delora_lambda"), ("VBLORA", "vector_bank"), ("UNILORA", "theta_d")],
        *[("BEFT", "beft_bias"), ("SHIRA", "shira_weight"), ("FOURIERFT", "spectrum"), ("WAVEFT", "spectrum")],
        *[("C3A", "c3a_kernel"), ("HIRA", "hira_B"), ("RANDLORA", "randlora_lambda"), ("OFT", "oft_R.weight")],
    ],
)
def test_what_was_not_trained_has_no_effect(base: Any, tmp_path: Path, kind: str, end: str) -> None:
    folder = Folder(base, tmp_path, kind)
    for name in folder.names(end):
        folder.tensors[name].zero_()
    folder.refused("no_effect", "come to zero", "answer as the base does")


def test_reflections_that_undo_each_other_have_no_effect(base: Any, tmp_path: Path) -> None:
    """So HRA begins; PEFT's columns are equal in pairs."""
    folder = Folder(base, tmp_path, "HRA")
    for name in folder.names("hra_u"):
        folder.tensors[name][:, 1::2] = folder.tensors[name][:, ::2]
    folder.refused("no_effect")


@pytest.mark.parametrize("orthonormal", [True, False])
def test_reflections_without_a_direction(base: Any, tmp_path: Path, orthonormal: bool) -> None:
    folder = Folder(base, tmp_path, "HRA")
    folder.config["apply_GS"] = orthonormal
    name = folder.names("hra_u")[0]
    folder.tensors[name][:, 1] = folder.tensors[name][:, 0] if orthonormal else 0
    folder.refused("not_finite", re.escape(name))


def test_an_injection_that_is_what_was_taken_has_no_effect(base: Any, tmp_path: Path) -> None:
    """So DEFT begins."""
    make_peft_adapter(base, tmp_path, kind="DEFT", r=4, target_modules=QV, strength=None)
    with refused("no_effect"):
        read_adapter(tmp_path, served_base_of(base, layout_of(base)))


@pytest.mark.parametrize("kind", ["OSF", "PEANUT"])
def test_what_has_not_left_the_base_has_no_effect(base: Any, tmp_path: Path, kind: str) -> None:
    options = {**KINDS[kind], **({"init_weights": True} if kind == "PEANUT" else {})}
    make_peft_adapter(base, tmp_path, kind=kind, strength=None, **options)
    with refused("no_effect"):
        read_adapter(tmp_path, served_base_of(base, layout_of(base)))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DEFT", {}),
        ("HIRA", {}),
        ("FROD", {}),
        ("GLORA", {}),
        ("OSF", {}),
        ("PEANUT", {}),
        ("MISS", {"r": 8, "init_weights": "bat"}),
    ],
)
def test_a_quantised_base_has_no_weights_to_take_from(
    base: Any, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    make_peft_adapter(base, tmp_path, kind=kind, **{**KINDS[kind], **options})
    with refused("unsupported_option", "this base is quantised"):
        read_adapter(tmp_path, replace(served_base_of(base, layout_of(base)), weight=lambda *_: None))


def test_dense_changes_beyond_the_limit(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(base, tmp_path, "SHIRA")
    taken = LAYERS * (64 + 32) * 64 * 4
    monkeypatch.setattr(wanted, "MOST_DENSE_BYTES", taken)
    folder.read()
    monkeypatch.setattr(wanted, "MOST_DENSE_BYTES", taken - 1)
    folder.refused("too_large", "full rank", "the largest of 4 modules")


def test_modules_without_effect_have_no_tiles(base: Any, tmp_path: Path) -> None:
    folder = Folder(base, tmp_path, "LOHA")
    whole = folder.read()
    for name in folder.names("q_proj.hada_w1_a"):
        folder.tensors[name].zero_()
    some = folder.read()
    assert {part.projection.name for part in some.parts} == {"self_attn.v_proj"}
    assert 0 < len(some.image.tiles) < len(whole.image.tiles)


def test_values_beyond_the_compute_dtype(base: Any, tmp_path: Path) -> None:
    folder = Folder(base, tmp_path, "LOHA")
    for name in (*folder.names("hada_w1_a"), *folder.names("hada_w2_a")):
        folder.tensors[name] *= 1e30
    folder.refused("not_finite", "hada_w1_a", "more than float32")


def test_adalora_with_ranks_of_its_own(base: Any, tmp_path: Path) -> None:
    """What PEFT's allocator keeps of each module is saved alone; the oracle loads the file, pruned as it is."""
    import copy

    from peft import PeftModel

    adapter = make_peft_adapter(base, tmp_path / "all", kind="ADALORA", **KINDS["ADALORA"])
    kept = {
        "model.layers.0.self_attn.q_proj": [True, False, True, True],
        "model.layers.1.self_attn.v_proj": [False] * 4,
    }
    adapter.model.peft_config["default"].rank_pattern = {f"{path}.lora_E": keep for path, keep in kept.items()}
    adapter.model.save_pretrained(tmp_path / "pruned")
    oracle = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "pruned").eval()
    parsed = read_adapter(tmp_path / "pruned", served_base_of(base, layout_of(base)))
    found = {f"model.layers.{part.layer}.{part.projection.name}": part for part in parsed.parts}
    assert len(found) == 3
    assert found["model.layers.0.self_attn.q_proj"].a.shape[0] == 3
    for path, part in found.items():
        wanted = oracle.get_base_model().get_submodule(path).get_delta_weight("default")
        torch.testing.assert_close(part.b @ part.a, wanted.detach(), atol=1e-6, rtol=1e-5)
    assert parsed.rank == 4


def test_what_is_drawn_again_stays_what_it_was() -> None:
    """Numbers of torch's and numpy's generators that files without them depend on."""
    from loraplex.adapters.format.unilora import _shuffled
    from loraplex.adapters.format.vera import _kaiming

    drawn = _kaiming((2, 3), torch.Generator().manual_seed(0))
    wanted = [-0.01059, 0.75865, -1.16396, -1.04077, -0.54469, 0.37923]
    assert [round(value, 5) for value in drawn.flatten().tolist()] == wanted
    assert _shuffled(11, 4, 42).tolist() == [3, 3, 2, 2, 0, 1, 0, 3, 0, 2, 1]


@pytest.mark.timeout(60)  # a sum of a trillion products took a loading thread for ever
@pytest.mark.parametrize("kind", KINDS)
def test_counts_that_no_adapter_has(base: Any, tmp_path: Path, kind: str) -> None:
    """Every whole number of the config, far too large: the adapter is refused or read, and at once."""
    folder = Folder(base, tmp_path, kind)
    sound = dict(folder.config)
    counts = [key for key, value in sound.items() if type(value) is int or "butterfly" in key]
    if kind == "OFT":
        counts.append("num_cayley_neumann_terms")
    for key in counts:
        for huge in (1 << 30, 10**18, 10**30):
            folder.config = {**sound, key: huge}
            folder.write()
            begun = time.thread_time()
            with suppress(AdapterRefused):
                read_adapter(folder.path, folder.served(torch.float32))
            assert time.thread_time() - begun < 5, f"{key} is {huge}"
