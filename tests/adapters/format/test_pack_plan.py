"""Recipes: all layers at once, and bit for bit what packing part by part gives."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraplex.adapters.format import pack_plan
from loraplex.adapters.format.adapter_files import read_head
from loraplex.adapters.format.header import TensorInfo, parse_header
from loraplex.adapters.format.kind import ModuleMap
from loraplex.adapters.format.kinds import KINDS, parse_config
from loraplex.adapters.format.pack_plan import PackPlan
from loraplex.adapters.image.tiles import BaseLayout
from loraplex.adapters.tiers.loader import Reading
from loraplex.adapters.tiers.reader import AdapterReader
from loraplex.adapters.tiers.workspace import Workspace
from loraplex.kernels.records import Projection, element_bytes
from loraplex.server.models.config import Site
from tests.support.adapter_reading import read_adapter, without_weights, write_adapter

Q = Projection("self_attn.q_proj", Site.QKV, 32, 0, 32, False)
K = Projection("self_attn.k_proj", Site.QKV, 32, 32, 16, False)
UP = Projection("mlp.up_proj", Site.GATE_UP, 32, 0, 48, False)
LAYOUT = BaseLayout("tiny", 23, (Q, K, UP), 1024, torch.bfloat16)


def map_of(folder: Path, layout: BaseLayout) -> ModuleMap:
    head = read_head(folder)
    config, base = parse_config(head.config), without_weights(layout)
    return KINDS[config.kind].plan(config, parse_header(head), base, lambda: None)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 8, 17])
def test_dtypes_and_ranks(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, rank: int) -> None:
    """read_adapter compares with writing.pack."""
    for alpha in (rank, 3 * rank):  # with and without a scale
        folder = write_adapter(tmp_path / f"a{alpha}", LAYOUT, rank=rank, dtype=stored, alpha=alpha)
        assert len(read_adapter(folder, without_weights(replace(LAYOUT, dtype=dtype))).parts) == 3 * 23


def write_tensors(folder: Path, tensors: dict[str, Tensor], order: list[str]) -> None:
    """A safetensors file with its tensors in any order, so that they may start anywhere."""
    header: dict[str, Any] = {}
    data = b""
    for name in order:
        raw = safetensors.torch.save({"x": tensors[name]})
        raw = raw[8 + struct.unpack("<Q", raw[:8])[0] :]
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[tensors[name].dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_tensors_at_odd_addresses(tmp_path: Path) -> None:
    """fp16 tensors of an odd number of elements, and fp32 ones behind them."""
    odd = Projection("self_attn.q_proj", Site.QKV, 33, 0, 31, False)
    layout = BaseLayout("tiny", 2, (odd,), 1024, torch.bfloat16)
    folder = write_adapter(tmp_path, layout, rank=1)
    tensors = safetensors.torch.load((folder / "adapter_model.safetensors").read_bytes())
    names = sorted(tensors)
    tensors[names[0]] = tensors[names[0]].half()
    write_tensors(folder, tensors, names)
    module_map = map_of(folder, layout)
    assert module_map.header[names[1]].offset % 4 == 2
    assert len(module_map.pairs) == 2
    assert len(read_adapter(folder, without_weights(layout)).parts) == 2


@st.composite
def _cases(draw: st.DrawFn) -> tuple[BaseLayout, dict[str, Tensor], list[str], int]:
    """Any widths, page size, dtypes, order of tensors in the file; some factors zero."""
    ragged = draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    unit = 1 if ragged else 64 // element_bytes(dtype)
    widths = st.integers(1, 3).map(lambda n: n * unit) if not ragged else st.integers(1, 90)
    projections, starts = [], dict.fromkeys(Site, 0)
    for name, site in (("self_attn.q_proj", Site.QKV), ("self_attn.k_proj", Site.QKV), ("mlp.down_proj", Site.DOWN)):
        n_out = draw(widths)
        projections.append(Projection(name, site, draw(widths), starts[site], n_out, False))
        starts[site] += n_out
    layers = draw(st.integers(1, 13))
    row = max(-(-p.in_features * element_bytes(dtype) // 64) * 64 for p in projections)
    layout = BaseLayout("base", layers, tuple(projections), row + 64 * draw(st.integers(0, 40)), dtype)
    rank = draw(st.sampled_from([1, 2, 5, 16, 20]))
    stored = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tensors = {}
    for layer in range(layers):
        for p in projections:
            path = f"base_model.model.model.layers.{layer}.{p.name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, p.in_features).to(stored)
            tensors[f"{path}.lora_B.weight"] = torch.randn(p.out_features, rank).to(stored)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), max_size=6)):
        tensors[name].zero_()
    tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"][:] = 1
    tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"][:] = 1
    order = draw(st.permutations(sorted(tensors))) if draw(st.booleans()) else sorted(tensors)
    return layout, tensors, order, rank


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(_cases())
def test_any_adapter_and_the_pages_promised_at_registration(
    tmp_path: Path, case: tuple[BaseLayout, dict[str, Tensor], list[str], int]
) -> None:
    """The image is that of packing part by part, in the pages that were told by the header alone, or fewer."""
    layout, tensors, order, rank = case
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": "all-linear"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_tensors(tmp_path, tensors, order)
    own = AdapterReader(without_weights(layout), 1 << 30)
    info = own.examine(str(tmp_path))
    idle = {name.rpartition(".lora_")[0] for name, tensor in tensors.items() if not tensor.any()}
    parsed = read_adapter(tmp_path, without_weights(layout))
    assert len(parsed.parts) == len(tensors) // 2 - len(idle)
    if not idle:
        assert (len(parsed.image.pages), parsed.image.nbytes) == (info.num_pages, info.nbytes)


def test_ranks_that_differ_and_a_file_in_reverse_order(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, LAYOUT)
    tensors = safetensors.torch.load((folder / "adapter_model.safetensors").read_bytes())
    write_tensors(folder, tensors, sorted(tensors, reverse=True))
    read_adapter(folder, without_weights(LAYOUT))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["rank_pattern"] = {r"layers\.(3|4|11|20)\..*": 7, r"layers\.15\.mlp\..*": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for name, tensor in tensors.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        rank = 7 if layer in (3, 4, 11, 20) else 2 if layer == 15 and "mlp" in name else 4
        shape = (rank, tensor.shape[1]) if "lora_A" in name else (tensor.shape[0], rank)
        tensors[name] = torch.randn(shape)
    write_tensors(folder, tensors, sorted(tensors))
    assert len(read_adapter(folder, without_weights(LAYOUT)).parts) == 69


def test_the_offsets_of_a_header(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, LAYOUT)
    file = folder / "adapter_model.safetensors"
    found = parse_header(read_head(folder))
    with safetensors.safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        assert set(found) == set(names)
        data = file.read_bytes()
        for name in names:
            tensor = opened.get_tensor(name)
            info = found[name]
            assert info == TensorInfo(tensor.dtype, tuple(tensor.shape), info.offset)
            start = read_head(folder).start + info.offset
            assert data[start : start + tensor.nbytes] == tensor.numpy().tobytes()


def test_what_is_sound_is_said_without_looking_at_single_modules(tmp_path: Path) -> None:
    """Each kind of trouble, in one value of one module, is noticed; -0.0 is zero."""
    folder = write_adapter(tmp_path, LAYOUT)
    module_map = map_of(folder, LAYOUT)
    own = PackPlan(module_map.pairs, LAYOUT)
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())

    def is_sound() -> bool:
        raw = safetensors.torch.save(tensors)
        data = torch.frombuffer(bytearray(raw[8 + struct.unpack("<Q", raw[:8])[0] :]), dtype=torch.uint8)
        return own.make(data, torch.empty(own.nbytes, dtype=torch.uint8), lambda: None)[1]

    assert is_sound()
    for name in [f"base_model.model.model.layers.17.mlp.up_proj.lora_{factor}.weight" for factor in "AB"]:
        kept = tensors[name].clone()
        for value in (float("nan"), float("inf"), -float("inf"), 3.4e38):  # the last one overflows bfloat16
            tensors[name][0, 0] = value
            assert not is_sound(), value
        tensors[name] = torch.full_like(kept, -0.0)
        assert not is_sound()
        tensors[name][-1, -1] = -1e-30
        assert is_sound()
        tensors[name] = kept
    assert is_sound()


def test_infinities_as_integers() -> None:
    for dtype, bits in pack_plan._INFINITY.items():
        whole = torch.int32 if dtype.itemsize == 4 else torch.int16
        as_int = torch.tensor([bits, bits - 1], dtype=whole).view(dtype)
        assert as_int[0] == float("inf")
        assert as_int[1] == torch.finfo(dtype).max


def test_memory_is_used_again_and_holds_nothing_of_what_it_held(tmp_path: Path) -> None:
    """Ragged widths, so that rows and pages have gaps; images of other adapters were there before."""
    projections = (
        Projection("self_attn.q_proj", Site.QKV, 33, 0, 31, False),
        Projection("mlp.down_proj", Site.DOWN, 90, 0, 17, False),
    )
    layout = BaseLayout("tiny", 5, projections, 1024, torch.bfloat16)
    workspace = Workspace(1 << 24)
    own, fresh = (AdapterReader(without_weights(layout), 1 << 30, workspace=space) for space in (workspace, None))
    folders = [write_adapter(tmp_path / str(seed), layout, rank=3, seed=seed) for seed in range(3)]
    for turn in range(3):
        for folder in folders:
            image = own.read(Reading(str(folder), False, lambda: None)).image
            expected = fresh.read(Reading(str(folder), True, lambda: None)).image
            assert torch.equal(image.pages, expected.pages)
            del image
            assert workspace.left_bytes > 0
        if turn == 0:
            left = workspace.left_bytes
    assert workspace.left_bytes <= left, "later loads took what the first ones had left"
