"""What is measured of an adapter, against PEFT's merged weights and sums in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from loraplex.adapters.format.effect import product_square, rounding_square
from loraplex.adapters.receipt import Measured
from loraplex.adapters.tiers.measuring import Measurer
from loraplex.adapters.tiers.reader import AdapterReader
from tests.support.adapter_reading import no_breath, read
from tests.support.peft_adapters import (
    BASES,
    CASES,
    IA3_CASES,
    MODULE_KIND_CASES,
    PeftAdapter,
    layout_of,
    make_peft_adapter,
    served_base_of,
)
from tests.support.refusals import refused
from tests.support.tiny import tiny_hf_model

MERGED = {
    **{name: CASES[name] for name in ("plain", "all seven", "rank_pattern", "pissa", "kasa")},
    **{name: case for name, case in CASES.items() if "dora" in name.lower() or "base biases" in name},
    **{
        name: IA3_CASES[name] for name in ("ia3 on k_proj", "ia3, biases and outputs alone")
    },  # on outputs, as PEFT merges them
    **{
        name: case
        for name, case in MODULE_KIND_CASES.items()
        if name.endswith(", all") or name.startswith(("lokr", "boft", "glora, by"))
    },
}


def measure(base: Any, folder: Path, dtype: torch.dtype = torch.float32, *, allow_noop: bool = False) -> Measured:
    served = served_base_of(base, layout_of(base, dtype=dtype))
    measurer = Measurer(AdapterReader(served, 1 << 30, allow_noop=allow_noop), served)
    with measurer.opened(str(folder), no_breath) as adapter:
        return measurer.measure(adapter, no_breath)


def peft_norms(base: Any, adapter: PeftAdapter) -> dict[str, tuple[float, float]]:
    """|delta W|^2 and |W|^2 of each of the base's linears as PEFT merges them, and of biases, in float64."""
    before = {name: value.detach().double() for name, value in base.model.layers.named_parameters()}
    merged = dict(adapter.model.merge_and_unload().model.layers.named_parameters())
    return {
        name: (float((merged[name].detach().double() - value).square().sum()), float(value.square().sum()))
        for name, value in before.items()
        if "_proj." in name
    }


@pytest.mark.parametrize("case", MERGED)
def test_norms_are_those_of_what_peft_merges(case: str, tmp_path: Path) -> None:
    family, options = MERGED[case]
    base = tiny_hf_model(family, **BASES[family])
    adapter = make_peft_adapter(base, tmp_path, **options)
    found, norms = measure(base, tmp_path), peft_norms(base, adapter)
    weights = {name: pair for name, pair in norms.items() if name.endswith("weight")}
    expected = sum(change for change, _ in weights.values()) / sum(whole for _, whole in weights.values())
    assert found.relative == pytest.approx(expected**0.5, rel=2e-4)
    assert found.bias == pytest.approx(
        sum(change for name, (change, _) in norms.items() if name.endswith("bias")) ** 0.5, rel=1e-4, abs=1e-6
    )
    for site in found.sites:
        own = {n: pair for n, pair in weights.items() if n.split(".")[-2] in site.projections}
        layers = [
            sum(c for n, (c, _) in own.items() if n.startswith(f"{layer}."))
            / sum(w for n, (_, w) in own.items() if n.startswith(f"{layer}."))
            for layer in range(len(base.model.layers))
        ]
        share = sum(change for change, _ in own.values()) / sum(whole for _, whole in own.values())
        assert site.relative == pytest.approx(share**0.5, rel=2e-4)
        assert (site.largest, site.layer) == (pytest.approx(max(layers) ** 0.5, rel=2e-4), layers.index(max(layers)))
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert found.tensors + len(found.ignored) == len(names)
    assert set(found.ignored) <= {name for name in names if name.endswith(("randlora_A", "randlora_B"))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_what_packing_leaves_of_the_products(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 96, generator=generator), torch.randn(64, 7, generator=generator) * 1e-2
    exact = b.double() @ a.double()
    rounded = b.to(dtype).double() @ a.to(dtype).double()
    assert product_square(a, b) == pytest.approx(float(exact.square().sum()), rel=1e-5)
    assert rounding_square(a, b, dtype) == pytest.approx(float((rounded - exact).square().sum()), rel=1e-4)
    assert rounding_square(a.to(dtype).float(), b.to(dtype).float(), dtype) == 0


def test_types_and_modules_that_come_to_nothing_are_told(tmp_path: Path) -> None:
    base = tiny_hf_model("llama", num_hidden_layers=2)
    make_peft_adapter(base, tmp_path, r=4, target_modules=["q_proj", "o_proj"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors = {
        name: value.clone() * ("o_proj.lora_B" not in name or "layers.1" in name) for name, value in tensors.items()
    }
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.bfloat16)
    safetensors.torch.save_file(tensors, file)
    found = measure(base, tmp_path, torch.bfloat16)
    assert (found.modules, found.idle, found.dtypes, found.dtype) == (4, 1, ("bfloat16", "float32"), "bfloat16")
    assert [(site.modules, site.projections) for site in found.sites] == [
        (2, ("q_proj", "k_proj", "v_proj")),
        (1, ("o_proj",)),
    ]
    assert 1e-4 < found.rounding < 4e-3  # bfloat16 has 8 bits


def test_a_noop_is_measured_as_one_and_is_read_only_where_it_is_allowed(tmp_path: Path) -> None:
    base = tiny_hf_model("llama", num_hidden_layers=2)
    make_peft_adapter(base, tmp_path, strength=None, r=4, target_modules=["q_proj"])
    found = measure(base, tmp_path, allow_noop=True)
    assert (found.is_noop, found.sites, found.relative, found.idle) == (True, (), 0.0, 2)
    served = served_base_of(base, layout_of(base))
    with refused("no_effect"):
        read(AdapterReader(served, 1 << 30), tmp_path)
    content = read(AdapterReader(served, 1 << 30, allow_noop=True), tmp_path)
    assert (content.info.num_tiles, content.info.num_pages) == (1, 1)
    assert not content.image.pages.any()
