"""IA3 files are read as PEFT reads them, or refused by name. The oracle is the installed PEFT, module by module."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from loraplex.adapters.image.tiles import BiasDelta, OutputScale
from loraplex.adapters.tiers.host import most_bytes
from loraplex.adapters.tiers.inbox import host_bytes
from loraplex.adapters.tiers.reader import AdapterReader
from loraplex.server.models.config import Site
from tests.support.adapter_folder import AdapterFolder
from tests.support.adapter_reading import ParsedAdapter, read_adapter
from tests.support.peft_adapters import (
    BASES,
    DOWN,
    IA3_CASES,
    PeftAdapter,
    layout_of,
    make_peft_adapter,
    served_base_of,
)
from tests.support.refusals import refused
from tests.support.tiny import tiny_hf_model

K0 = "base_model.model.model.layers.0.self_attn.k_proj"
DOWN0 = "base_model.model.model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def bases() -> dict[str, Any]:
    return {family: tiny_hf_model(family, **fields) for family, fields in BASES.items()}


def read(base: Any, folder: Path, dtype: torch.dtype = torch.float32) -> ParsedAdapter:
    return read_adapter(folder, served_base_of(base, layout_of(base, dtype=dtype)))


def scales_of(adapter: PeftAdapter, base: Any) -> dict[tuple[int, Site, int], Tensor]:
    """(layer, site, column) -> what PEFT multiplies that column's output by, written out column by column."""
    projections = {projection.name: projection for projection in layout_of(base).projections}
    found: dict[tuple[int, Site, int], float] = {}
    for path, module in adapter.modules().items():
        layer, name = int(path.split(".")[2]), path.split(".", 3)[3]
        vector = module.ia3_l["default"].detach().flatten()
        site, start = projections[name].site, projections[name].out_start
        if module.is_feedforward:
            site, start = Site.GATE_UP, len(vector)
        for i, value in enumerate(vector.tolist()):
            place = (layer, site, start + i)
            found[place] = found.get(place, 1.0) * value
    return {place: torch.tensor(value) for place, value in found.items()}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of fan_in_fan_out on a linear
@pytest.mark.parametrize("case", IA3_CASES)
def test_read_as_peft_computes(bases: dict[str, Any], tmp_path: Path, case: str) -> None:
    family, options = IA3_CASES[case]
    base = bases[family]
    adapter = make_peft_adapter(base, tmp_path, **options)
    parsed = read(base, tmp_path)
    expected = scales_of(adapter, base)
    found = {}
    biases = {}
    for part in parsed.parts:
        assert isinstance(part, OutputScale | BiasDelta)
        values = part.values if isinstance(part, OutputScale) else part.delta
        assert values.dtype == torch.float32
        for i, value in enumerate(values):
            place = (part.layer, part.projection.site, part.projection.out_start + i)
            into = found if isinstance(part, OutputScale) else biases
            assert place not in into
            into[place] = value
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        torch.testing.assert_close(found[place], value, atol=1e-6, rtol=1e-6)
    own = served_base_of(base, layout_of(base)).bias
    for projection in layout_of(base).projections:
        bias = own(0, projection.name)
        columns = [(0, projection.site, projection.out_start + i) for i in range(projection.out_features)]
        scaled = [place for place in columns if place in expected]
        assert [place in biases for place in scaled] == [bias is not None] * len(scaled)
        for place in scaled:
            if bias is not None:
                wanted = (expected[place] - 1) * bias[place[2] - projection.out_start]
                torch.testing.assert_close(biases[place], wanted.detach(), atol=1e-6, rtol=1e-5)
    info = AdapterReader(served_base_of(base, layout_of(base)), 1 << 30).examine(str(tmp_path))
    assert host_bytes(parsed.image) <= most_bytes(layout_of(base), info)
    assert parsed.rank == 0
    assert parsed.targets == tuple(
        p.name.rpartition(".")[2]
        for p in layout_of(base).projections
        if any(path.endswith(p.name) for path in adapter.modules())
    )


def test_an_ia3_adapter_takes_exactly_its_bytes(bases: dict[str, Any], tmp_path: Path) -> None:
    """Four bytes a value, each vector padded to 64 bytes, in ceil(bytes / page) pages: nothing is lost at an end."""
    adapter = make_peft_adapter(
        bases["llama"], tmp_path, kind="IA3", target_modules=["q_proj", "v_proj", *DOWN], feedforward_modules=DOWN
    )
    vectors = [module.ia3_l["default"].numel() for module in adapter.modules().values()]
    nbytes = sum(-(-4 * n // 64) * 64 for n in vectors)
    layout = layout_of(bases["llama"], dtype=torch.bfloat16, page_bytes=1024)
    parsed = read_adapter(tmp_path, served_base_of(bases["llama"], layout))
    assert parsed.image.nbytes == nbytes
    assert parsed.image.pages.shape[0] == math.ceil(nbytes / 1024) == 3
    info = AdapterReader(served_base_of(bases["llama"], layout), 100).examine(str(tmp_path))
    assert (info.num_pages, info.nbytes, info.rank, info.kind) == (3, nbytes, 0, "ia3")


class Folder(AdapterFolder):
    """IA3 on k_proj, v_proj and down_proj of the tiny Llama, made by PEFT."""

    def __init__(self, base: Any, path: Path) -> None:
        make_peft_adapter(base, path, kind="IA3", target_modules=["k_proj", "v_proj", *DOWN], feedforward_modules=DOWN)
        super().__init__(path, lambda dtype: served_base_of(base, layout_of(base, dtype=dtype)))
        self.config = json.loads((path / "adapter_config.json").read_text())
        self.tensors = safetensors.torch.load(self.weights.read_bytes())


@pytest.fixture
def folder(bases: dict[str, Any], tmp_path: Path) -> Folder:
    return Folder(bases["llama"], tmp_path / "adapter")


def test_the_adapter_that_the_bad_ones_are_made_from_is_good(folder: Folder) -> None:
    assert len(folder.read().parts) == 9


@pytest.mark.parametrize(
    ("key", "value", "code", "pattern"),
    [
        ("feedforward_modules", None, "bad_config", "feedforward_modules is not there"),
        ("feedforward_modules", 7, "bad_config", "feedforward_modules is 7"),
        ("feedforward_modules", ["up_proj"], "shape_mismatch", "down_proj.*module's output"),
        ("feedforward_modules", "(", "bad_config", "feedforward_modules.*not valid"),
        ("feedforward_modules", r".*v_proj", "unsupported_option", r"layers\.0\.self_attn\.v_proj.*only down_proj's"),
        ("feedforward_modules", ["k_proj"], "unsupported_option", r"layers\.0\.self_attn\.k_proj"),
        ("feedforward_modules", [], "shape_mismatch", r"layers\.0\.mlp\.down_proj\.ia3_l.*module's output"),
        ("target_modules", None, "bad_config", "target_modules"),
        ("target_modules", ["k_proj", "v_proj", "down_proj", "lm_head"], "unsupported_option", "lm_head"),
        ("target_modules", ["k_proj", "v_proj", "down_proj", "embed_tokens"], "unsupported_option", "embed_tokens"),
        ("target_modules", ["k_proj", "v_proj", "down_proj", "c_attn"], "bad_config", "c_attn"),
        ("target_modules", "all-linear", "missing_tensor", r"layers\.0\.self_attn\.q_proj\.ia3_l is missing"),
        ("target_modules", ["v_proj", "down_proj"], "unmatched_tensor", r"k_proj\.ia3_l.*does not target"),
        ("exclude_modules", ["layers.0.self_attn.k_proj"], "unmatched_tensor", re.escape(K0)),
        ("modules_to_save", ["lm_head"], "unsupported_option", "modules_to_save"),
        ("layers_to_transform", [1], "unsupported_option", "layers_to_transform"),
        ("some_new_option", 3, "unsupported_option", "some_new_option"),
        ("peft_type", "LORA", "unsupported_option", "feedforward_modules"),
        ("peft_type", "IA4", "unsupported_kind", "'IA4'.*'LORA', 'IA3'"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(folder: Folder, key: str, value: Any, code: str, pattern: str) -> None:
    folder.config[key] = value
    folder.refused(code, pattern)


@pytest.mark.parametrize(
    ("name", "shape", "pattern"),
    [
        (f"{K0}.ia3_l", (1, 32), "module's output|expected"),
        (f"{K0}.ia3_l", (48, 1), "another base"),
        (f"{K0}.ia3_l", (32,), r"expected \[32, 1\]"),
        (f"{K0}.ia3_l", (32, 2), r"expected \[32, 1\]"),
        (f"{DOWN0}.ia3_l", (64, 1), r"expected \[1, 96\].*module's input"),
        (f"{DOWN0}.ia3_l", (1, 192), "another base"),
        (f"{DOWN0}.ia3_l", (1, 0), r"expected \[1, 96\]"),
    ],
)
def test_wrong_shapes(folder: Folder, name: str, shape: tuple[int, ...], pattern: str) -> None:
    folder.tensors[name] = torch.ones(shape)
    folder.refused("shape_mismatch", re.escape(f"{name} has shape {list(shape)}"), pattern)


def test_an_adapter_for_a_wider_base(folder: Folder) -> None:
    folder.config["target_modules"], folder.config["feedforward_modules"] = ["o_proj"], []
    folder.config["base_model_name_or_path"] = "acme/wide"
    folder.tensors = {K0.replace("k_proj", "o_proj") + ".ia3_l": torch.ones(2048, 1)}
    folder.config["target_modules"] = ["model.layers.0.self_attn.o_proj"]
    folder.refused("shape_mismatch", "made for a base of hidden size 2048.*'acme/wide'")


@pytest.mark.parametrize(
    ("name", "code", "pattern"),
    [
        (f"{K0}.ia3_x", "unmatched_tensor", "expected ia3_l of self_attn.q_proj"),
        (f"{K0}.ia3_l.a.b.c", "unmatched_tensor", "expected ia3_l"),
        (f"{K0}.ia3_l.default", "unmatched_tensor", "the same thing twice"),
        (f"{K0}.lora_A.weight", "unmatched_tensor", "expected ia3_l"),
        (f"{K0}.base_layer.bias", "unmatched_tensor", "expected ia3_l"),
        (f"{DOWN0.replace('layers.0', 'layers.7')}.ia3_l", "unmatched_tensor", "3 layers.*8 or more"),
        ("base_model.model.lm_head.ia3_l", "unsupported_option", "lm_head"),
        ("base_model.model.model.embed_tokens.ia3_l", "unsupported_option", "embed_tokens"),
        ("base_model.model.score.modules_to_save.weight", "unsupported_option", "modules_to_save"),
        ("model.layers.0.self_attn.k_proj.ia3_l", "unmatched_tensor", "expected names that begin with"),
    ],
)
def test_tensors_that_match_nothing(folder: Folder, name: str, code: str, pattern: str) -> None:
    folder.tensors[name] = torch.ones(32, 1)
    folder.refused(code, re.escape(name), pattern)


def test_missing_tensors(folder: Folder) -> None:
    del folder.tensors[f"{DOWN0}.ia3_l"]
    folder.refused("missing_tensor", re.escape(f"{DOWN0}.ia3_l is missing"))
    folder.tensors = {name: tensor for name, tensor in folder.tensors.items() if "layers.2" not in name}
    folder.tensors[f"{DOWN0}.ia3_l"] = torch.ones(1, 96)
    folder.refused("missing_tensor", "ends at layer 1.*fewer layers")
    folder.tensors = {}
    folder.refused("missing_tensor", "no IA3 tensor at all")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [K0, DOWN0])
def test_values_that_are_not_finite(folder: Folder, name: str, value: float) -> None:
    folder.tensors[f"{name}.ia3_l"].view(-1)[5] = value
    folder.refused("not_finite", re.escape(f"{name}.ia3_l"), "1 values of")


def test_vectors_of_ones_make_no_part_and_zeros_do(folder: Folder) -> None:
    for tensor in folder.tensors.values():
        tensor.fill_(1.0)
    folder.refused("no_effect", "every ia3_l is 1", "answer as the base does")
    folder.tensors[f"{K0}.ia3_l"].zero_()
    (part,) = folder.read().parts
    assert isinstance(part, OutputScale)
    assert (part.layer, part.projection.name) == (0, "self_attn.k_proj")
    assert not part.values.any()


def test_vectors_that_undo_each_other_make_no_part(folder: Folder) -> None:
    """Of up's output and down's input only the product counts."""
    folder.config["target_modules"] = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    folder.config["feedforward_modules"] = ".*down_proj"
    up = DOWN0.replace("down", "up")
    folder.tensors = {f"{up}.ia3_l": torch.full((96, 1), 0.5), f"{DOWN0}.ia3_l": torch.full((1, 96), 2.0)}
    folder.refused("no_effect")
    folder.tensors[f"{up}.ia3_l"][3] = 3.0
    (part,) = folder.read().parts
    assert isinstance(part, OutputScale)
    assert part.values.tolist() == [6.0 if i == 3 else 1.0 for i in range(96)]
    folder.tensors[f"{up}.ia3_l"][3], folder.tensors[f"{DOWN0}.ia3_l"][0, 3] = 3e38, 3e38
    folder.refused("not_finite", "mlp.up_proj")


def test_a_bias_that_the_compute_dtype_does_not_hold(bases: dict[str, Any], tmp_path: Path) -> None:
    base = bases["qwen2"]
    make_peft_adapter(base, tmp_path, kind="IA3", target_modules=["q_proj"], feedforward_modules=[])
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    name = f"{K0.replace('k_proj', 'q_proj')}.ia3_l"
    tensors[name].fill_(1e7)
    safetensors.torch.save_file(tensors, file)
    read(base, tmp_path)
    with refused("not_finite", re.escape(name)):
        read(base, tmp_path, torch.float16)
