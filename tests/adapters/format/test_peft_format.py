"""What PEFT saves is read as PEFT reads it: the oracle is the installed PEFT, module by module."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.kinds import KINDS, UNSERVED
from loraplex.adapters.image.tiles import BiasDelta, LowRank, OutputScale
from loraplex.adapters.tiers.reader import AdapterReader
from tests.support.adapter_folder import AdapterFolder
from tests.support.adapter_reading import ParsedAdapter, read_adapter
from tests.support.peft_adapters import (
    ALL,
    BASES,
    CASES,
    QV,
    STARTS,
    PeftAdapter,
    layout_of,
    make_peft_adapter,
    randomise_adapter,
    save_adapter,
    served_base_of,
    sum_of_windows,
)
from tests.support.refusals import refused
from tests.support.tiny import tiny_hf_model


@pytest.fixture(scope="module")
def bases() -> dict[str, Any]:
    return {family: tiny_hf_model(family, **fields) for family, fields in BASES.items()}


def read(base: Any, folder: Path, dtype: torch.dtype = torch.float32) -> ParsedAdapter:
    return read_adapter(folder, served_base_of(base, layout_of(base, dtype=dtype)))


def check_against_peft(base: Any, adapter: PeftAdapter) -> ParsedAdapter:
    """Every module PEFT adapts and no other, with the weight delta and the bias PEFT computes with."""
    parsed = read(base, adapter.folder)
    layout = layout_of(base)
    low_rank: dict[str, list[LowRank]] = {}
    for part in parsed.parts:
        if isinstance(part, LowRank):
            low_rank.setdefault(f"model.layers.{part.layer}.{part.projection.name}", []).append(part)
    deltas = {f"model.layers.{p.layer}.{p.projection.name}": p for p in parsed.parts if isinstance(p, BiasDelta)}
    scales = {f"model.layers.{p.layer}.{p.projection.name}": p for p in parsed.parts if isinstance(p, OutputScale)}
    modules = adapter.modules()
    assert set(low_rank) == set(modules)
    config = adapter.model.peft_config["default"]
    start = config.init_lora_weights in STARTS or config.kasa_config is not None
    assert set(scales) == {path for path, module in modules.items() if "default" in module.lora_magnitude_vector}
    for path, module in modules.items():
        parts = low_rank[path]
        assert sum(part.a.shape[0] for part in parts) == module.r["default"] * (2 if start else 1)
        found = sum_of_windows(parts, layout)
        assert len(parts) == 1 or config.use_bdlora is not None
        if start or config.use_bdlora is not None:  # PEFT has taken it out of the weights, or does not write it out
            zero = torch.zeros(1, module.in_features)
            expected = (module(torch.eye(module.in_features)) - module(zero)).T - base.get_submodule(path).weight
        else:
            expected = module.get_delta_weight("default")
        if path in scales:
            found += scales.pop(path).values[:, None] * base.get_submodule(path).weight
            zero = torch.zeros(1, module.in_features)
            expected = (module(torch.eye(module.in_features)) - module(zero)).T
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not scales
    zero = torch.zeros(())
    biases = {}
    for path, linear in adapter.model.get_base_model().named_modules():
        if path.startswith("model.layers.") and hasattr(linear, "in_features") and "lora_" not in path:
            path = path.removesuffix(".base_layer")
            lora = modules.get(path)
            own = base.get_submodule(path).bias
            delta = zero if own is None else (lora.base_layer if lora is not None else linear).bias - own
            of_b = None if lora is None else getattr(lora.lora_B["default"], "bias", None)  # BD-LoRA has none
            if of_b is not None:
                delta = delta + lora.scaling["default"] * of_b
            if delta.any():
                biases[path] = delta
    assert set(deltas) == set(biases)
    for path, delta in biases.items():
        torch.testing.assert_close(deltas[path].delta, delta, atol=1e-6, rtol=1e-5)
    return parsed


@pytest.mark.filterwarnings("ignore")  # PEFT warns of fan_in_fan_out on a linear, of lora_bias without a bias, ...
@pytest.mark.parametrize("case", CASES)
def test_read_as_peft_computes(bases: dict[str, Any], tmp_path: Path, case: str) -> None:
    family, options = CASES[case]
    adapter = make_peft_adapter(bases[family], tmp_path, **options)
    check_against_peft(bases[family], adapter)


@pytest.mark.filterwarnings("ignore")
def test_what_the_cases_are_about(bases: dict[str, Any], tmp_path: Path) -> None:
    """The options above do what their names say, so that the comparison with PEFT cannot be empty."""

    def parts(case: str) -> dict[tuple[int, str], Any]:
        family, options = CASES[case]
        adapter = make_peft_adapter(bases[family], tmp_path / case, **options)
        return {(p.layer, p.projection.name): p for p in read(bases[family], adapter.folder).parts}

    ranks = {place: part.a.shape[0] for place, part in parts("rank_pattern").items()}
    assert ranks[0, "self_attn.q_proj"] == 2
    assert (ranks[1, "mlp.up_proj"], ranks[0, "mlp.up_proj"]) == (7, 4)
    assert (ranks[2, "self_attn.v_proj"], ranks[1, "self_attn.v_proj"]) == (5, 4)
    assert parts("rslora")[0, "self_attn.q_proj"].scaling == pytest.approx(4 / math.sqrt(8))
    assert parts("alpha_pattern")[0, "self_attn.k_proj"].scaling == 8
    assert {layer for layer, _ in parts("layers_to_transform")} == {0, 2}
    assert not any(name == "self_attn.k_proj" for _, name in parts("exclude names"))
    assert len(parts("all-linear")) == 3 * 7
    assert set(parts("whole paths beat layers_to_transform")) == {(0, "self_attn.q_proj"), (1, "self_attn.v_proj")}
    qkv = parts("fused qkv")[0, "self_attn.qkv_proj"]
    assert qkv.b.shape == (qkv.projection.out_features, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_every_dtype(bases: dict[str, Any], tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = make_peft_adapter(bases["qwen2"], tmp_path, dtype=dtype, target_modules=QV, bias="all", lora_bias=True)
    parsed = check_against_peft(bases["qwen2"], adapter)
    assert all(part.a.dtype == part.b.dtype == dtype for part in parsed.parts if isinstance(part, LowRank))


def test_what_is_told_of_an_adapter(bases: dict[str, Any], tmp_path: Path) -> None:
    adapter = make_peft_adapter(
        bases["llama"], tmp_path, r=4, target_modules=["up_proj", "q_proj"], rank_pattern={"up_proj": 6}
    )
    parsed = read(bases["llama"], adapter.folder)
    image = parsed.image
    assert (parsed.rank, parsed.targets) == (6, ("q_proj", "up_proj"))
    files = [(tmp_path / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    assert parsed.digest == hashlib.sha256(b"".join(files)).hexdigest()
    elements = 3 * (4 * (64 + 64) + 6 * (64 + 96))  # layers, ranks, in + out of q_proj and up_proj
    assert image.nbytes == 4 * elements
    assert image.pages.shape[0] <= -(-image.nbytes // 4096) + 1


def test_digest_tells_config_and_weights_apart(bases: dict[str, Any], tmp_path: Path) -> None:
    adapter = make_peft_adapter(bases["llama"], tmp_path, target_modules=QV)
    before = read(bases["llama"], tmp_path).digest
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    after = read(bases["llama"], tmp_path).digest
    assert before != after
    make_peft_adapter(bases["llama"], adapter.folder, seed=2, target_modules=QV)
    assert read(bases["llama"], tmp_path).digest not in (before, after)


def rename(folder: Path, old: str, new: str) -> None:
    """Put `new` in the place of `old` in all tensor names."""
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    safetensors.torch.save_file(renamed, file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.model.layers", "model.model.language_model.layers"),
        ("model.model.layers", "model.language_model.model.layers"),
        ("model.model.layers", "model.language_model.layers"),
        ("model.model.layers", "model._orig_mod.model.layers"),  # torch.compile()
        (".self_attn.", "._orig_mod.self_attn."),
        (".lora_A.", ".lora_A.default."),
        (".lora_B.", ".lora_B.my-adapter_2."),
        (".base_layer.bias", ".bias"),  # older PEFT, whose LoRA layers were linears themselves
    ],
)
def test_names_seen_in_the_wild(bases: dict[str, Any], tmp_path: Path, old: str, new: str) -> None:
    adapter = make_peft_adapter(bases["qwen2"], tmp_path, target_modules=QV, bias="lora_only", lora_bias=True)
    before = check_against_peft(bases["qwen2"], adapter)
    rename(tmp_path, old, new)
    after = check_against_peft(bases["qwen2"], adapter)
    assert [(p.layer, p.projection) for p in before.parts] == [(p.layer, p.projection) for p in after.parts]


def test_saved_over_auto_model(bases: dict[str, Any], tmp_path: Path) -> None:
    """Without a head, as embedding models are trained: the layers' names begin one step later, all else is the same."""
    from peft import LoraConfig, get_peft_model

    base = bases["llama"]
    adapters = []
    for model, task, first in ((base.model, "FEATURE_EXTRACTION", ""), (base, "CAUSAL_LM", "model.")):
        pattern = {f"^{first}layers.1.self_attn.q_proj": 2}
        config = LoraConfig(task_type=task, r=4, target_modules=QV, rank_pattern=pattern)
        adapters.append(get_peft_model(copy.deepcopy(model), config).eval())
        randomise_adapter(adapters[-1], 1, torch.float32, 0.5)
    save_adapter(adapters[0], tmp_path)
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.layers.") for name in names)
    check_against_peft(base, PeftAdapter(adapters[1], tmp_path))


def test_patterns_see_the_names_of_a_multimodal_model(bases: dict[str, Any], tmp_path: Path) -> None:
    adapter = make_peft_adapter(bases["gemma3"], tmp_path, r=3, target_modules=QV)
    rename(tmp_path, "model.model.layers", "model.model.language_model.layers")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = r"model\.language_model\..*\.(q|v)_proj"
    config["rank_pattern"] = {"^model.language_model.layers.0.self_attn.q_proj": 3}
    config["r"] = 3
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    check_against_peft(bases["gemma3"], adapter)


def test_all_linear_written_in_the_file(bases: dict[str, Any], tmp_path: Path) -> None:
    """PEFT saves what "all-linear" came to; other tools save the word, and PEFT reads it."""
    adapter = make_peft_adapter(bases["llama"], tmp_path, target_modules="all-linear")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] != "all-linear"
    config["target_modules"] = "All-Linear"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    check_against_peft(bases["llama"], adapter)


def test_defaults_of_keys_left_out(bases: dict[str, Any], tmp_path: Path) -> None:
    adapter = make_peft_adapter(bases["llama"], tmp_path, target_modules=QV)  # PEFT's own r and lora_alpha
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": QV}))
    check_against_peft(bases["llama"], adapter)


def test_modules_without_effect_make_no_part(bases: dict[str, Any], tmp_path: Path) -> None:
    adapter = make_peft_adapter(bases["llama"], tmp_path, target_modules=QV)
    modules = adapter.modules()
    with torch.no_grad():
        for layer in (0, 2):
            modules[f"model.layers.{layer}.self_attn.q_proj"].lora_B["default"].weight.zero_()
        modules["model.layers.1.self_attn.v_proj"].lora_A["default"].weight.zero_()
    save_adapter(adapter.model, tmp_path)
    left = {(part.layer, part.projection.name) for part in read(bases["llama"], tmp_path).parts}
    assert left == {(1, "self_attn.q_proj"), (0, "self_attn.v_proj"), (2, "self_attn.v_proj")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_took_from_the_base(bases: dict[str, Any], tmp_path: Path, init: str) -> None:
    """Such an adapter is wrong on the base as it is. Where its start is a matter of random numbers it is refused;
    converted by PEFT it is plain LoRA, and right."""
    base = bases["llama"]
    adapter = make_peft_adapter(base, tmp_path / "bare", r=4, target_modules=QV, init_lora_weights=init, strength=0.1)
    residual = adapter.modules()["model.layers.0.self_attn.q_proj"].base_layer.weight
    assert not torch.equal(residual, base.model.layers[0].self_attn.q_proj.weight), "PEFT does not do so any more"
    if init not in STARTS:
        with refused("unsupported_option", rf"{init}.*path_initial_model_for_weight_conversion"):
            read(base, tmp_path / "bare")

    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_hf_model("llama", num_hidden_layers=3), LoraConfig(r=4, target_modules=QV, init_lora_weights=init)
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
    expected = {
        name: module.base_layer.weight + module.get_delta_weight("default")
        for name, module in PeftAdapter(model, tmp_path).modules().items()
    }
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    parts = read(base, tmp_path / "plain").parts
    assert len(parts) == len(expected) == 6
    for part in parts:
        assert isinstance(part, LowRank)
        path = f"model.layers.{part.layer}.{part.projection.name}"
        found = base.get_submodule(path).weight + part.scaling * part.b @ part.a
        torch.testing.assert_close(found, expected[path], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_conversion_of_an_untrained_adapter_has_no_effect(bases: dict[str, Any], tmp_path: Path) -> None:
    """Its B A is the difference of two equal products: not zero factor by factor, yet zero."""
    base = bases["llama"]
    adapter = make_peft_adapter(base, tmp_path, r=4, target_modules=QV)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    for name, tensor in tensors.items():
        tensors[name] = torch.cat((tensor, tensor), 0) if "lora_A" in name else torch.cat((tensor, -tensor), 1)
    safetensors.torch.save_file(tensors, file)
    config = json.loads((adapter.folder / "adapter_config.json").read_text())
    config["r"] = 8
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with refused("no_effect", "cancels"):
        read(base, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", STARTS)
def test_a_start_that_was_not_trained_has_no_effect(bases: dict[str, Any], tmp_path: Path, init: str) -> None:
    make_peft_adapter(bases["llama"], tmp_path, r=4, target_modules=ALL, init_lora_weights=init, strength=0.0)
    with refused("no_effect", "once its start is taken out"):
        read(bases["llama"], tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_what_is_asked_of_a_start(bases: dict[str, Any], tmp_path: Path) -> None:
    """The base as it was before it was quantised, no magnitudes, twice the ranks; and it says how close it is."""
    base = bases["llama"]
    make_peft_adapter(base, tmp_path, r=4, target_modules=QV, init_lora_weights="pissa")
    served = served_base_of(base, layout_of(base))
    info = AdapterReader(served, 1 << 30).examine(str(tmp_path))
    assert (info.rank, info.kind) == (8, "lora")
    assert "its start (pissa) is computed again" in info.remark
    with refused("unsupported_option", "this base is quantised"):
        read_adapter(tmp_path, replace(served, weight=lambda *_: None))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    refusals = (({"use_dora": True}, "unsupported_option"), ({"kasa_config": {"beta": 1}}, "unsupported_option"))
    for more, code in (*refusals, ({"r": 513}, "too_large")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **more}))
        with refused(code):
            read(base, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_what_is_asked_of_kasa(bases: dict[str, Any], tmp_path: Path) -> None:
    base = bases["llama"]
    make_peft_adapter(base, tmp_path, r=4, target_modules=QV, kasa_config={})
    folder = AdapterFolder(tmp_path, lambda dtype: served_base_of(base, layout_of(base, dtype=dtype)))
    folder.config = json.loads((tmp_path / "adapter_config.json").read_text())
    folder.tensors = safetensors.torch.load(folder.weights.read_bytes())
    sound, name = dict(folder.tensors), "base_model.model.model.layers.1.self_attn.v_proj.lora_diag"
    folder.tensors = {**sound, name: sound[name][:3]}
    folder.refused("shape_mismatch", "lora_diag has shape")
    folder.tensors = {other: tensor for other, tensor in sound.items() if other != name}
    folder.refused("missing_tensor", "lora_diag is missing")
    folder.tensors = {**sound, name: sound[name] * math.inf}
    folder.refused("not_finite", "lora_diag")
    folder.tensors = sound
    folder.config["kasa_config"] = None
    folder.refused("unmatched_tensor", "lora_diag.*no kasa_config")
    folder.config |= {"kasa_config": {"beta": 0.1}, "r": 32}
    folder.tensors = {n: torch.ones([32 if size == 4 else size for size in t.shape]) for n, t in sound.items()}
    folder.refused("bad_config", "32 singular parts")


@pytest.mark.filterwarnings("ignore")
def test_a_change_smaller_than_its_start_is_not_lost_in_bfloat16(bases: dict[str, Any], tmp_path: Path) -> None:
    """s B A and its start are each a large part of W; only their difference is rounded, to 2^-8 of itself."""
    base = bases["llama"]
    adapter = make_peft_adapter(base, tmp_path, r=4, target_modules=QV, init_lora_weights="pissa", strength=0.05)
    parsed = read(base, tmp_path, torch.bfloat16)
    for part in parsed.parts:
        assert isinstance(part, LowRank)
        path = f"model.layers.{part.layer}.{part.projection.name}"
        module = adapter.modules()[path]
        wanted = module.base_layer.weight + module.get_delta_weight("default") - base.get_submodule(path).weight
        found = part.b.bfloat16().float() @ part.a.bfloat16().float()
        assert float((found - wanted).norm() / wanted.norm()) < 2.0**-8
        assert float(wanted.norm() / module.get_delta_weight("default").norm()) < 0.1


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica", True, False])
def test_inits_that_leave_the_base_alone(bases: dict[str, Any], tmp_path: Path, init: Any) -> None:
    adapter = make_peft_adapter(bases["llama"], tmp_path, r=4, target_modules=QV, init_lora_weights=init)
    for name, module in adapter.modules().items():
        assert torch.equal(module.base_layer.weight, bases["llama"].get_submodule(name).weight)


def test_recipes_of_training_are_ordinary_files(bases: dict[str, Any], tmp_path: Path) -> None:
    """LoRA+, LoRA-FA and LoRA-Pro are optimisers: at most their numbers are in the config, and the file is LoRA's."""
    base = bases["llama"]
    adapter = make_peft_adapter(base, tmp_path, r=4, target_modules=ALL)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for recipe in ({"lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6}, {"init_lora_weights": "gaussian"}, {}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **recipe}))
        check_against_peft(base, adapter)


def test_every_other_peft_type_is_refused_by_name(bases: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftType

    make_peft_adapter(bases["llama"], tmp_path, target_modules=QV)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    others = [str(kind.value) for kind in PeftType if kind.lower() not in KINDS]
    assert {kind.lower() for kind in others} == UNSERVED.keys(), "each is served or refused with its reason"
    for kind in others:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": kind}))
        with refused("unsupported_kind", f"'{kind}'"):
            read(bases["llama"], tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_variants_saved_by_peft_are_refused_by_name(bases: dict[str, Any], tmp_path: Path) -> None:
    base = bases["llama"]
    cases: dict[str, dict[str, Any]] = {
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "trainable_token_indices": {"trainable_token_indices": [1, 2]},
        "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
        "lm_head": {"target_modules": [*QV, "lm_head"]},
        "embed_tokens": {"target_modules": [*QV, "embed_tokens"]},
        "lm_head by pattern": {"target_modules": ".*(q_proj|lm_head)"},
    }
    for name, options in cases.items():
        adapter = make_peft_adapter(base, tmp_path / name, **{"target_modules": QV, **options})
        with refused("unsupported_option", name.split()[0]):
            read(base, adapter.folder)


def test_a_runs_folder_says_where_its_adapters_are(bases: dict[str, Any], tmp_path: Path) -> None:
    for name in ("checkpoint-100", "checkpoint-90", "best", "checkpoint-1000"):
        make_peft_adapter(bases["llama"], tmp_path / "run" / name, target_modules=QV)
    with pytest.raises(
        AdapterRefused, match=r"checkpoint-1000, checkpoint-100, checkpoint-90, best: .*run/checkpoint-1000"
    ):
        read(bases["llama"], tmp_path / "run")
    with pytest.raises(AdapterRefused) as refusal:
        read(bases["llama"], tmp_path)
    assert "folders" not in str(refusal.value)
