"""Merging in files: each factor is what PEFT's merge_utils makes of the factors, and PEFT can load the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file

from loraplex.adapters.errors import AdapterUnavailable
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry
from loraplex.adapters.sources.merge_plan import MergePlan
from loraplex.adapters.tiers.merging import merge_tensors, merge_versions
from loraplex.adapters.version import AdapterVersion
from tests.support.full_disk import full_disk
from tests.support.peft_adapters import make_peft_adapter
from tests.support.refusals import refused
from tests.support.tiny import tiny_hf_model

pytestmark = pytest.mark.filterwarnings("ignore")

PLANS = [
    MergePlan("ties", (1.0, 0.5, -2.0), 0.5),
    MergePlan("ties", (1.0, 0.5, -2.0), 0.3, "frequency"),
    MergePlan("ties", (1.0, 1.0, 1.0), 1.0),
    MergePlan("dare_linear", (1.0, 0.5, -2.0), 0.5),
    MergePlan("dare_ties", (1.0, 0.5, 2.0), 0.7),
    MergePlan("dare_ties", (1.0, 0.5, 2.0), 0.7, "frequency"),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_factors_are_merged_as_peft_merges_them(plan: MergePlan) -> None:
    tensors = [torch.randn(8, 24, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    weights = torch.tensor(plan.weights)
    torch.manual_seed(99)  # PEFT draws from the global generator
    more = {} if plan.strategy == "dare_linear" else {"majority_sign_method": plan.sign_method}
    expected = getattr(merge_utils, plan.strategy)(tensors, weights, plan.density, **more)
    found = merge_tensors(tensors, plan.weights, plan, torch.Generator().manual_seed(99))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def version(registry: Registry, name: str, folder: Path) -> AdapterVersion:
    return registry.register(name, str(folder), AdapterInfo(4, ("q_proj",), 1, 1))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tiny_hf_model("llama")
    options: dict[str, dict[str, Any]] = {
        "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "two": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "dtype": torch.bfloat16},
        "wide": {"r": 8, "target_modules": ["q_proj"]},
        "biased": {"r": 4, "target_modules": ["q_proj"], "lora_bias": True},
        "pissa": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        "asked": {"r": 4, "target_modules": ["q_proj"], "alora_invocation_tokens": [5]},
    }
    folders = {}
    for seed, (name, given) in enumerate(options.items()):
        folders[name] = tmp_path_factory.mktemp(name)
        make_peft_adapter(base, folders[name], seed=seed, **given)
    return folders


def test_a_merged_adapter_is_what_peft_would_merge(adapters: dict[str, Path], tmp_path: Path) -> None:
    """Every tensor; alphas that differ are in B; modules of one of them are merged from that one; PEFT can load it."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    registry = Registry()
    plan = MergePlan("ties", (0.75, 1.5), 0.4)
    key = merge_versions([version(registry, name, adapters[name]) for name in ("one", "two")], plan, tmp_path)
    merged = load_file(tmp_path / key / "adapter_model.safetensors")
    files = [load_file(adapters[name] / "adapter_model.safetensors") for name in ("one", "two")]
    assert merged.keys() == {*files[0], *files[1]}
    for name, tensor in merged.items():
        having = [i for i, file in enumerate(files) if name in file]
        scales = [(2.0, 1.0)[i] if "lora_B" in name else 1.0 for i in having]
        factors = [files[i][name].float() * scale for i, scale in zip(having, scales, strict=True)]
        weights = torch.tensor([plan.weights[i] for i in having])
        torch.testing.assert_close(tensor, merge_utils.ties(factors, weights, plan.density), rtol=1e-6, atol=1e-7)
    loaded = PeftModel.from_pretrained(tiny_hf_model("llama"), str(tmp_path / key))
    layers = [module for module in loaded.modules() if isinstance(module, LoraLayer)]
    assert {scaling for layer in layers for scaling in layer.scaling.values()} == {1.0}


def test_the_same_merge_has_the_same_bytes(adapters: dict[str, Path], tmp_path: Path) -> None:
    plan = MergePlan("dare_ties", (1.0, 1.0), 0.5)
    registry = Registry()
    versions = [version(registry, name, adapters[name]) for name in ("one", "two")]
    keys = [merge_versions(versions, plan, tmp_path / root) for root in ("first", "second", "first")]
    assert len(set(keys)) == 1
    files = [tmp_path / root / keys[0] / "adapter_model.safetensors" for root in ("first", "second")]
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [keys[0]]  # nothing half done is left
    other = merge_versions(versions[::-1], plan, tmp_path / "first")
    assert other != keys[0]


def test_what_cannot_be_merged(adapters: dict[str, Path], tmp_path: Path) -> None:
    registry = Registry()
    plan = MergePlan("ties", (1.0, 1.0), 0.5)
    for name, code, message in (
        ("wide", "shape_mismatch", "needs adapters of equal ranks"),
        ("biased", "unsupported_option", "lora_B.bias"),
        ("pissa", "unsupported_option", "more or other than the A and B of its file"),
        ("asked", "unsupported_option", "more or other than the A and B of its file"),
    ):
        versions = [version(registry, f"one-{name}", adapters["one"]), version(registry, name, adapters[name])]
        with refused(code, message):
            merge_versions(versions, plan, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(adapters: dict[str, Path], tmp_path: Path) -> None:
    registry = Registry()
    versions = [version(registry, name, adapters[name]) for name in ("one", "two")]
    plan = MergePlan("ties", (1.0, 0.5), 0.5)
    with full_disk(), pytest.raises(AdapterUnavailable, match="cannot be kept"):
        merge_versions(versions, plan, tmp_path / "merged")
    assert list((tmp_path / "merged").iterdir()) == []
    merge_versions(versions, plan, tmp_path / "merged")


def test_files_that_have_changed_are_not_merged(adapters: dict[str, Path], tmp_path: Path) -> None:
    registry = Registry()
    leased = version(registry, "one", adapters["one"])
    registry.identify(leased, "0" * 64)
    with refused("changed"):
        merge_versions([leased, leased], MergePlan("ties", (1.0, 1.0), 0.5), tmp_path)


def test_a_key_is_of_all_that_counts() -> None:
    plans = [*PLANS, MergePlan("ties", (1.0, 0.5, -2.0), 0.5, "frequency"), MergePlan("ties", (1.0, 0.5, 2.0), 0.5)]
    keys = {plan.key(digests) for plan in plans for digests in (("a", "b", "c"), ("b", "a", "c"))}
    assert len(keys) == 2 * len(plans)
