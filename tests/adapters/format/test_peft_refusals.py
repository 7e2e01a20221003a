"""Bad adapters are refused: with a code and one line that says what was found and expected. Files made by hand."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused
from loraplex.adapters.files import beneath
from loraplex.adapters.format import adapter_files, quiet_files, targets
from loraplex.adapters.format.kind import ServedBase
from loraplex.adapters.image.tiles import BaseLayout, BiasDelta, LowRank, OutputScale
from loraplex.kernels.records import Projection
from loraplex.server.models.config import Site
from tests.support.adapter_folder import AdapterFolder
from tests.support.ordinary_user import ordinary_user, reachable_folder
from tests.support.refusals import refused

HIDDEN, INNER, LAYERS, RANK = 32, 48, 2, 4
PROJECTIONS = (
    Projection("self_attn.q_proj", Site.QKV, HIDDEN, 0, 32, True),
    Projection("self_attn.k_proj", Site.QKV, HIDDEN, 32, 16, True),
    Projection("self_attn.o_proj", Site.O, 32, 0, HIDDEN, False, reads_hidden=False),
    Projection("mlp.up_proj", Site.GATE_UP, HIDDEN, 0, INNER, False),
    Projection("mlp.down_proj", Site.DOWN, INNER, 0, HIDDEN, False, reads_hidden=False),
)
WIDTHS = {projection.name: (projection.in_features, projection.out_features) for projection in PROJECTIONS}
LAYER = "base_model.model.model.layers."
Q0 = f"{LAYER}0.self_attn.q_proj"


def served(dtype: torch.dtype = torch.float32, norm: float = 0.0) -> ServedBase:
    """A base with some biases, whose weights are zero, or orthogonal to whatever is added and `norm` long."""

    def squared_norms(layer: int, name: str) -> Tensor:
        return torch.full((WIDTHS[name][1],), norm**2)

    def products(layer: int, name: str, a: Tensor) -> Tensor:
        return torch.zeros(a.shape[0], WIDTHS[name][1])

    layout = BaseLayout("tiny-base", LAYERS, PROJECTIONS, 1024, dtype)
    return ServedBase(layout, base_bias, squared_norms, products, lambda *_: None)


def base_bias(layer: int, name: str) -> Tensor | None:
    return torch.full((WIDTHS[name][1],), 0.25) if name in ("self_attn.q_proj", "self_attn.k_proj") else None


class Folder(AdapterFolder):
    """LoRA of rank 4 on q_proj and down_proj of both layers."""

    def __init__(self, path: Path) -> None:
        self.base_norm = 0.0
        super().__init__(path, lambda dtype: served(dtype, self.base_norm))
        self.config |= {"peft_type": "LORA", "base_model_name_or_path": "acme/other-base", "r": RANK, "lora_alpha": 8}
        self.config["target_modules"] = ["q_proj", "down_proj"]
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            for layer in range(LAYERS):
                self.add(f"{LAYER}{layer}.{name}", *WIDTHS[name])

    def add(self, path: str, width_in: int, width_out: int, rank: int = RANK) -> None:
        generator = torch.Generator().manual_seed(len(self.tensors))
        self.tensors[f"{path}.lora_A.weight"] = torch.randn(rank, width_in, generator=generator)
        self.tensors[f"{path}.lora_B.weight"] = torch.randn(width_out, rank, generator=generator)

    def keep(self, part: str) -> None:
        """The tensors with `part` in their names, and no others."""
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if part in name}

    def add_biases(self, kind: str, of: str, value: float, size: int = HIDDEN) -> None:
        """Beside each lora_B of modules called `of`."""
        for name in [name for name in self.tensors if of in name and name.endswith("lora_B.weight")]:
            self.tensors[name.replace("lora_B.weight", kind)] = torch.full((size,), value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "adapter")


def test_the_adapter_all_others_are_made_from_is_good(folder: Folder) -> None:
    assert len(folder.read().parts) == 4


# files


def test_no_folder(folder: Folder) -> None:
    with pytest.raises(AdapterNotFound, match="no folder"):
        folder.read(write=False)
    with refused("missing_file", r"no such folder.*adapter_config\.json"):
        adapter_files.read_head(folder.path)  # gone a moment later


def _cut(keep: int) -> Callable[[Folder], object]:
    return lambda folder: folder.weights.write_bytes(folder.weights.read_bytes()[:keep])


def _config(text: str) -> Callable[[Folder], object]:
    return lambda folder: (folder.path / "adapter_config.json").write_bytes(text.encode("latin-1"))


HARMED: dict[str, tuple[Callable[[Folder], object], str, str]] = {
    "no config": (lambda f: (f.path / "adapter_config.json").unlink(), "missing_file", "no adapter_config.json"),
    "no weights": (
        lambda f: f.weights.rename(f.path / "model.safetensors"),
        "missing_file",
        "no adapter_model.safetensors.*holds .*model.safetensors",
    ),
    "a folder in their place": (lambda f: (f.weights.unlink(), f.weights.mkdir()), "missing_file", ""),
    "an LFS pointer": (
        lambda f: f.weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "bad_file",
        "Git LFS.*git lfs pull",
    ),
    "longer than it says": (lambda f: f.weights.write_bytes(f.weights.read_bytes() + b"more"), "bad_file", ""),
    "a terabyte": (lambda f: f.weights.write_bytes(struct.pack("<Q", 1 << 40) + b"{}"), "bad_file", ""),
    "a huge config": (_config("x" * (adapter_files.MAX_CONFIG_BYTES + 1)), "too_large", "adapter_config.json"),
    **{f"cut at {keep}": (_cut(keep), "bad_file", "damaged or cut short") for keep in (0, 4, 8, 100, -1, -500)},
    **{
        f"config {text[:8]!r}": (_config(text), "bad_config", "adapter_config.json")
        for text in ("", "{", "[]", "null", '"LORA"', "\xff\xfe", "{'r': 1}", "[" * 100_000, "9" * 5000)
    },
}


@pytest.mark.parametrize(("harm", "code", "told"), HARMED.values(), ids=HARMED)
def test_files_that_are_harmed(folder: Folder, harm: Callable[[Folder], object], code: str, told: str) -> None:
    folder.write()
    harm(folder)
    folder.refused(code, told, write=False)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_the_server_may_not_read(name: str) -> None:
    with reachable_folder() as place:
        folder = Folder(place / "adapter")
        folder.write()
        (folder.path / name).chmod(0)
        with ordinary_user():
            folder.refused("bad_file", name, "Permission denied", write=False)


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_folder_the_server_may_not_enter(mode: int) -> None:
    with reachable_folder() as place:
        folder = Folder(place / "shut" / "adapter")
        folder.path.parent.mkdir()
        folder.write()
        folder.path.parent.chmod(mode)
        with ordinary_user(), refused("missing_file", "may not be opened"):
            folder.read(write=False)
        folder.path.parent.chmod(0o755)


def test_a_folder_that_goes_away(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write()
    folder.weights.unlink()

    def gone(self: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(beneath.Folder, "names", gone)
    with refused("missing_file", r"there is no adapter_model\.safetensors"):
        folder.read(write=False)


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (Path.touch, (Path(BOMB_MARK),))  # type: ignore[return-value]


BOMB_MARK = ""


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pkl"])
def test_pickles_are_never_opened(folder: Folder, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    global BOMB_MARK
    BOMB_MARK = str(tmp_path / "exploded")
    folder.write()
    folder.weights.unlink()
    (folder.path / name).write_bytes(pickle.dumps(Bomb()))
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: (opened.append(str(path)), real(path, *a, **k))[1])
    folder.refused("missing_file", rf"{name}.*never opened", "save_file", write=False)
    assert opened
    assert not any(path.endswith(name) for path in opened)
    assert not Path(BOMB_MARK).exists()
    pickle.loads((folder.path / name).read_bytes())
    assert Path(BOMB_MARK).exists(), "the bomb is a dud and the test shows nothing"


def test_the_conversion_advised_for_pickles_works(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = folder.read()
    torch.save(folder.tensors, folder.path / "adapter_model.bin")
    folder.weights.unlink()
    message = folder.refused("missing_file", write=False)
    code = re.search(r'python -c "(.*)"', message)
    assert code is not None
    monkeypatch.chdir(folder.path)
    exec(code[1], {})
    found = folder.read(write=False)
    assert len(found.parts) == len(expected.parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_other_dtypes(folder: Folder, dtype: torch.dtype) -> None:
    folder.tensors[f"{Q0}.lora_A.weight"] = folder.tensors[f"{Q0}.lora_A.weight"].to(dtype)
    folder.refused("bad_file", re.escape(f"{Q0}.lora_A.weight"), "expected F32, F16, BF16")


def test_a_file_written_to_while_it_is_read(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its middle, again and again: neither half is believed."""
    folder.write()
    data = folder.weights.read_bytes()
    real = adapter_files._read_exactly
    written = 0

    def read_exactly(file: Any, count: int) -> bytes:
        nonlocal written
        read = real(file, count)
        if count == 8:
            written += 1
            folder.weights.write_bytes(data)
            os.utime(folder.weights, ns=(written, written))  # a clock may tick more slowly than this test runs
        return read

    monkeypatch.setattr(adapter_files, "_read_exactly", read_exactly)
    monkeypatch.setattr(quiet_files, "CHANGED_WAIT", 0.0)
    with refused("bad_file", r"changed while it was read.*renaming"):
        folder.read(write=False)
    assert written == quiet_files.CHANGED_RETRIES


@pytest.mark.parametrize("change", ["header", "shorter", "longer", "garbage", "gone", "values"])
def test_a_file_that_is_written_anew_after_its_header_was_read(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """It is read again, and what it holds then is what counts."""
    folder.write()
    data = folder.weights.read_bytes()
    name = f"{Q0}.lora_A.weight"
    changed = {
        "header": safetensors.torch.save({**folder.tensors, name: folder.tensors[name].T.contiguous()}),
        "shorter": data[:-4],
        "longer": data + b"more",
        "garbage": b"\xff" * len(data),
        "values": safetensors.torch.save({**folder.tensors, name: folder.tensors[name] + 1}),
    }
    assert all(content != data for content in changed.values())
    real = adapter_files._read_exactly
    pending = [change]

    def read_exactly(file: Any, count: int) -> bytes:
        read = real(file, count)
        if count > 8 and pending:
            if pending.pop() == "gone":
                folder.weights.unlink()
            else:
                folder.weights.write_bytes(changed[change])
        return read

    monkeypatch.setattr(adapter_files, "_read_exactly", read_exactly)
    monkeypatch.setattr(quiet_files, "CHANGED_WAIT", 0.0)
    if change == "values":
        part = folder.read(write=False).parts[0]
        assert isinstance(part, LowRank)
        assert torch.equal(part.a, folder.tensors[name] + 1)
        return
    with refused({"header": "shape_mismatch", "gone": "missing_file"}.get(change, "bad_file")):
        folder.read(write=False)
    assert not pending


def test_the_digest_is_of_the_bytes_used(folder: Folder) -> None:
    before = folder.read().digest
    folder.tensors[f"{Q0}.lora_A.weight"] += 1
    changed = folder.read()
    files = (folder.path / "adapter_config.json", folder.weights)
    assert changed.digest == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() != before


# the config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0), ("r", -4), ("r", 4.0), ("r", "4"), ("r", None), ("r", True), ("r", [4]),
        ("lora_alpha", "8"), ("lora_alpha", None), ("lora_alpha", math.nan), ("lora_alpha", math.inf),
        ("lora_alpha", True), ("lora_alpha", 10**400),
        ("rank_pattern", [1]), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"q_proj": "8"}),
        ("rank_pattern", {"(": 8}), ("alpha_pattern", {"q_proj": None}), ("alpha_pattern", {"*": 8}),
        ("use_rslora", "yes"), ("use_rslora", 1), ("lora_bias", "no"), ("bias", "some"), ("bias", 3),
        ("target_modules", None), ("target_modules", []), ("target_modules", ""), ("target_modules", {"q_proj": 1}),
        ("target_modules", [1]), ("target_modules", [""]), ("target_modules", "(q_proj"),
        ("target_modules", "nothing_like_it"), ("target_modules", ["q_proj", "down_proj", "query_key_value"]),
        ("exclude_modules", 7), ("exclude_modules", "["), ("exclude_modules", ".*"),
        ("layers_to_transform", "1"), ("layers_to_transform", [-1]), ("layers_to_transform", [True]),
        ("layers_to_transform", [9]), ("layers_pattern", {"a": 1}),
        ("alora_invocation_tokens", []), ("alora_invocation_tokens", 5), ("alora_invocation_tokens", "<ask>"),
        ("alora_invocation_tokens", [1, -2]), ("alora_invocation_tokens", [1.0]), ("alora_invocation_tokens", [True]),
        ("alora_invocation_tokens", [1 << 31]), ("alora_invocation_tokens", [1] * 1025),
        ("peft_type", None), ("peft_type", 5), ("peft_type", ""),
    ],
)  # fmt: skip
def test_wrong_values(folder: Folder, key: str, value: Any) -> None:
    folder.config[key] = value
    if key == "layers_pattern":
        folder.config["layers_to_transform"] = [0]
    code = "unsupported_kind" if value == "" and key == "peft_type" else "bad_config"
    folder.refused(code, "target_modules" if value in (".*", [9]) else key)


@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_a_pattern_that_would_take_for_ever(folder: Folder, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "PATTERN_SECONDS", 0.1)
    pattern = r"(?:\w|.|\w.|...)*[!?]"
    folder.config[key] = {pattern: 8} if key.endswith("k_pattern") or key == "alpha_pattern" else pattern
    if key == "layers_pattern":
        folder.config["layers_to_transform"] = [0]
    folder.refused("bad_config", key, "takes too long")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [3]), ("trainable_token_indices", {"embed_tokens": [3]}),
        ("target_parameters", ["mlp.experts.gate_up_proj"]), ("layer_replication", [[0, 2]]), ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2, "shards": 2}), ("arrow_config", {"top_k": 1}),
        ("velora_config", {"scale": 1.0}), ("monteclora_config", {"num_samples": 2}), ("megatron_config", {"a": 1}),
        ("enable_lora", [True, False]), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "PiSSA_niter_16"),
        ("init_lora_weights", "lora_ga"), ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"),
        ("init_lora_weights", "of_next_year"), ("init_lora_weights", 7),
        ("some_new_option", True), ("some_new_option", {"a": 1}), ("use_flora", 0.5),
    ],
)  # fmt: skip
def test_unsupported_options_are_named(folder: Folder, key: str, value: Any) -> None:
    folder.config[key] = value
    folder.refused("unsupported_option", key)


@pytest.mark.parametrize(
    ("value", "code", "pattern"),
    [
        ([2], "bad_config", "expected an object"),
        ({"nblocks": 2}, "bad_config", "neither A nor B of .*q_proj"),
        ({"target_modules_bd_a": ["q_"], "target_modules_bd_b": ["proj"]}, "bad_config", "both A and B of .*q_proj"),
        ({"target_modules_bd_b": ["_proj"], "nblocks": 0}, "bad_config", "nblocks is 0"),
        ({"target_modules_bd_b": ["_proj"], "nblocks": 3}, "bad_config", "nblocks 3, which divides not both"),
        ({"target_modules_bd_b": ["_proj"], "nblocks": 2, "match_strict": 1}, "bad_config", "match_strict"),
        ({"target_modules_bd_a": ["_proj"], "nblocks": 2}, "shape_mismatch", "lora_A.weight"),
        ({"target_modules_bd_b": ["_proj"], "nblocks": 2}, "shape_mismatch", "lora_B.weight"),
    ],
)
def test_blocks_that_cannot_be(folder: Folder, value: Any, code: str, pattern: str) -> None:
    folder.config["use_bdlora"] = value
    folder.refused(code, pattern)


@pytest.mark.parametrize(
    ("change", "code", "pattern"),
    [
        ({"target_parameters": ["q_proj.weight"]}, "bad_config", "target_modules and target_parameters both"),
        ({"target_parameters": ["q_proj.bias"]}, "unsupported_option", "'q_proj.bias'"),
        ({"target_parameters": ["embed_tokens.weight"]}, "unsupported_option", "takes in model.embed_tokens"),
        ({"target_parameters": [3]}, "bad_config", "target_parameters is"),
        ({"target_parameters": ["o_proj.weight"]}, "missing_tensor", "o_proj.lora_A.weight is missing"),
        ({"target_parameters": ["o_proj.weight"], "use_dora": True}, "unsupported_option", "beside use_dora"),
        ({"target_parameters": ["o_proj.weight"], "bias": "all"}, "unsupported_option", "beside bias 'all'"),
        (
            {"target_parameters": ["o_proj.weight"], "use_bdlora": {"target_modules_bd_b": ["_proj"]}},
            *("unsupported_option", "beside target_parameters"),
        ),
        (
            {"use_bdlora": {"target_modules_bd_b": ["_proj"]}, "init_lora_weights": "pissa"},
            *("unsupported_option", "beside pissa"),
        ),
    ],
)
def test_parameters_and_blocks_beside_others(folder: Folder, change: dict[str, Any], code: str, pattern: str) -> None:
    folder.config.update(change)
    folder.refused(code, pattern)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("use_dora", True), ("init_lora_weights", "pissa"), ("kasa_config", {"beta": 1}), ("bias", "all")),
        ("use_bdlora", {"target_modules_bd_b": ["_proj"]}),
    ],
)
def test_what_would_change_the_base_before_an_invocation(folder: Folder, key: str, value: Any) -> None:
    folder.config.update({"alora_invocation_tokens": [1, 2], key: value})
    folder.refused("unsupported_option", key, "alora_invocation_tokens")


@pytest.mark.parametrize("key", ["modules_to_save", "layer_replication", "use_qalora", "some_new_option"])
@pytest.mark.parametrize("value", [None, False, [], {}, 0, ""])
def test_options_that_are_off_are_fine(folder: Folder, key: str, value: Any) -> None:
    folder.config[key] = value
    assert len(folder.read().parts) == 4


def test_options_without_bearing_on_inference_are_fine(folder: Folder) -> None:
    folder.config.update(
        task_type="CAUSAL_LM", auto_mapping={"unsloth_fixed": True}, peft_version="0.21", revision="main",
        inference_mode=True, lora_dropout=0.1, fan_in_fan_out=True, megatron_core="megatron.core",
        loftq_config={"loftq_bits": 4}, eva_config={"rho": 2}, qalora_group_size=16, init_lora_weights="eva",
        runtime_config={"ephemeral_gpu_offload": False}, lorap_emb_lr=1e-6, layers_pattern="layers",
        ensure_weight_tying=True,
    )  # fmt: skip
    assert len(folder.read().parts) == 4


@pytest.mark.parametrize("exclude", [["lm_head"], ".*lm_head"])
def test_a_head_that_is_excluded_again(folder: Folder, exclude: Any) -> None:
    folder.config["target_modules"].append("lm_head")
    folder.config["exclude_modules"] = exclude
    assert len(folder.read().parts) == 4


# tensors and names


@pytest.mark.parametrize(
    ("name", "code", "pattern"),
    [
        ("base_model.model.lm_head.lora_A.weight", "unsupported_option", "lm_head"),
        ("base_model.model.lm_head.weight", "unsupported_option", "lm_head"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "unsupported_option", "embed_tokens"),
        ("base_model.model.model.embed_tokens.weight", "unsupported_option", "embed_tokens"),
        (f"{Q0}.lora_magnitude_vector", "unmatched_tensor", "use_dora is false"),
        ("base_model.model.score.modules_to_save.weight", "unsupported_option", "modules_to_save"),
        (f"{LAYER}2.self_attn.q_proj.lora_A.weight", "unmatched_tensor", "2 layers.*3 or more"),
        (f"{LAYER}31.self_attn.q_proj.lora_A.weight", "unmatched_tensor", "32 or more"),
        (f"{LAYER}0.self_attn.query.lora_A.weight", "unmatched_tensor", "self_attn.q_proj, "),
        (f"{LAYER}0.mlp.q_proj.lora_A.weight", "unmatched_tensor", "mlp.down_proj"),
        (f"{LAYER}00.self_attn.q_proj.lora_A.weight", "unmatched_tensor", "expected"),
        ("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", "unmatched_tensor", r"model\.layers\.N\."),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "unmatched_tensor", r"base_model\.model\.model\.layers\.N\."),
        ("base_model.model.vision.model.layers.0.self_attn.q_proj.lora_A.weight", "unmatched_tensor", "begin with"),
        ("base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight", "unmatched_tensor", "one"),
        (f"{Q0}.lora_E", "unmatched_tensor", "lora_A.weight"),
        (f"{Q0}.lora_A.bias", "unmatched_tensor", "lora_A.weight"),
        (f"{Q0}.base_layer.weight", "unmatched_tensor", "expected"),
        (f"{Q0}.weight", "unmatched_tensor", "expected"),
        (f"{Q0}.lora_A.default.weight", "unmatched_tensor", "the same thing twice"),
        (f"{LAYER}0.self_attn.k_proj.lora_A.weight", "unmatched_tensor", "does not target"),
        (f"{Q0}.base_layer.bias", "unmatched_tensor", "bias is 'none'"),
        (f"{Q0}.lora_B.bias", "unmatched_tensor", "lora_bias is false"),
        (f"{LAYER}{'9' * 5000}.q_proj.lora_A.weight", "unmatched_tensor", "tiny|999"),
        ("odd\nname" * 500, "unmatched_tensor", "odd name"),
    ],
)  # fmt: skip
def test_tensors_that_match_nothing(folder: Folder, name: str, code: str, pattern: str) -> None:
    folder.tensors[name] = torch.ones(RANK, HIDDEN)
    folder.refused(code, re.escape(" ".join(name.split())[:200]), pattern)


def _without(name: str) -> Callable[[Folder], object]:
    return lambda folder: folder.tensors.pop(name)


def _zeroed(leaf: str) -> Callable[[Folder], object]:
    return lambda folder: zero(folder, leaf)


def _never_meeting(folder: Folder) -> None:
    """A has its values in ranks 0 and 1, B in 2 and 3."""
    for name, tensor in folder.tensors.items():
        (tensor[2:] if "lora_A" in name else tensor[:, :2]).zero_()


def _overflowing(folder: Folder) -> None:
    folder.config["lora_alpha"] = 3e38
    folder.tensors[f"{Q0}.lora_B.weight"][0, 0] = 100


def _bias_of_another_length(folder: Folder) -> None:
    folder.config["lora_bias"] = True
    folder.add_biases("lora_B.bias", "proj", 1.0)
    folder.tensors[f"{Q0}.lora_B.bias"] = torch.ones(31)


def _bias_the_base_has_not(folder: Folder) -> None:
    folder.config.update(target_modules=["down_proj"], bias="lora_only")
    folder.keep("down_proj")
    folder.tensors[f"{LAYER}0.mlp.down_proj.base_layer.bias"] = torch.ones(HIDDEN)


def _biases_of_some(folder: Folder) -> None:
    folder.config["bias"] = "all"
    folder.add_biases("base_layer.bias", "q_proj", 1.0)


def _biases_of_the_base(folder: Folder) -> None:
    zero(folder, "lora_B")
    folder.config["bias"] = "lora_only"
    folder.add_biases("base_layer.bias", "q_proj", 0.25)


WRONG: dict[str, tuple[Callable[[Folder], object], str, str]] = {
    "a rank beyond reason": (lambda f: f.config.update(r=4096), "too_large", "4096.*1024"),
    "a layers_pattern that is none": (
        lambda f: f.config.update(layers_to_transform=[0], layers_pattern="("), "bad_config", "layers_pattern.*valid"
    ),
    "layers beside a pattern": (
        lambda f: f.config.update(layers_to_transform=[0], target_modules=".*q_proj"), "bad_config", "layers_to_trans"
    ),
    "a module that is not there": (
        lambda f: f.config["target_modules"].append("k_proj"), "missing_tensor", r"layers\.0\.self_attn\.k_proj\.lora_A"
    ),
    "too few layers": (lambda f: f.keep("layers.0"), "missing_tensor", "ends at layer 0.*fewer layers"),
    "no tensor at all": (lambda f: f.tensors.clear(), "missing_tensor", "no LoRA tensor at all"),
    "a scaling that overflows": (_overflowing, "not_finite", rf"{re.escape(Q0)}\.lora_B\.weight.*inf"),
    "lora_A zero": (_zeroed("lora_A"), "no_effect", "lora_A is zero.*answer as the base does"),
    "lora_B zero": (_zeroed("lora_B"), "no_effect", "lora_B is zero.*answer as the base does"),
    "alpha zero": (lambda f: f.config.update(lora_alpha=0), "no_effect", "lora_alpha is 0"),
    "factors that never meet": (_never_meeting, "no_effect", "cancels"),
    "the base's own biases": (_biases_of_the_base, "no_effect", ""),
    "no lora_bias": (lambda f: f.config.update(lora_bias=True), "missing_tensor", r"lora_B\.bias is missing"),
    "no trained biases": (  # what was trained into them is gone, and the adapter would half apply
        lambda f: f.config.update(bias="lora_only"), "missing_tensor", "trained biases were not saved"
    ),
    "not all trained biases": (_biases_of_some, "missing_tensor", r"layers\.0\.self_attn\.k_proj\.bias is missing"),
    "a bias the base has not": (_bias_the_base_has_not, "unmatched_tensor", "down_proj.base_layer.bias.*base has none"),
    "a bias of another length": (_bias_of_another_length, "shape_mismatch", r"has shape \[31\], expected \[32\]"),
    **{
        f"{name} as a target": (
            lambda f, name=name: f.config["target_modules"].append(name), "unsupported_option", f"takes in .*{name}"
        )
        for name in ("lm_head", "embed_tokens", "model.embed_tokens")
    },
    **{
        f"no {name}": (_without(f"{LAYER}{name}.weight"), "missing_tensor", re.escape(f"{LAYER}{name}.weight"))
        for name in (f"{layer}.mlp.down_proj.lora_{factor}" for layer in range(LAYERS) for factor in "AB")
    },
}  # fmt: skip


@pytest.mark.parametrize(("change", "code", "told"), WRONG.values(), ids=WRONG)
def test_what_does_not_go_together(folder: Folder, change: Callable[[Folder], object], code: str, told: str) -> None:
    change(folder)
    folder.refused(code, told)


@pytest.mark.parametrize(
    ("module", "leaf", "shape", "expected", "hint"),
    [
        ("self_attn.q_proj", "lora_A", (RANK, 2048), [4, 32], "hidden size 2048.*'acme/other-base'"),
        ("mlp.down_proj", "lora_B", (2048, RANK), [32, 4], "hidden size 2048"),
        ("mlp.down_proj", "lora_A", (RANK, 96), [4, 48], "another base.*'acme/other-base'"),
        ("self_attn.q_proj", "lora_B", (64, RANK), [32, 4], "another base"),
        ("self_attn.q_proj", "lora_A", (8, HIDDEN), [4, 32], "config says rank 4 and the file 8"),
        ("self_attn.q_proj", "lora_B", (32, 2), [32, 4], "config says rank 4 and the file 2"),
        ("self_attn.q_proj", "lora_A", (HIDDEN, RANK), [4, 32], ""),
        ("self_attn.q_proj", "lora_A", (RANK * HIDDEN,), [4, 32], "shard"),
        ("self_attn.q_proj", "lora_A", (), [4, 32], "shard"),
        ("self_attn.q_proj", "lora_A", (RANK, HIDDEN, 1), [4, 32], ""),
        ("self_attn.q_proj", "lora_A", (0, HIDDEN), [4, 32], ""),
    ],
)
def test_wrong_shapes(
    folder: Folder, module: str, leaf: str, shape: tuple[int, ...], expected: list[int], hint: str
) -> None:
    name = f"{LAYER}1.{module}.{leaf}.weight"
    folder.tensors[name] = torch.ones(shape)
    wrong = re.escape(f"{name} has shape {list(shape)}, expected {expected}")
    folder.refused("shape_mismatch", wrong, "'tiny-base'", hint)


def test_an_adapter_for_a_wider_base(folder: Folder) -> None:
    folder.tensors.clear()
    for layer in range(LAYERS):
        folder.add(f"{LAYER}{layer}.self_attn.q_proj", 2 * HIDDEN, 2 * HIDDEN)
        folder.add(f"{LAYER}{layer}.mlp.down_proj", 2 * INNER, 2 * HIDDEN)
    folder.refused("shape_mismatch", rf"{re.escape(Q0)}.lora_A.weight", "made for a base of hidden size 64")


# values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("leaf", ["lora_A.weight", "lora_B.weight"])
def test_values_that_are_not_finite(folder: Folder, value: float, dtype: torch.dtype, leaf: str) -> None:
    name = f"{LAYER}1.mlp.down_proj.{leaf}"
    folder.tensors[name] = folder.tensors[name].to(dtype)
    folder.tensors[name][1, 2] = value
    folder.refused("not_finite", re.escape(name), f"1 values of {folder.tensors[name].numel()}")


@pytest.mark.parametrize("leaf", ["lora_B.bias", "base_layer.bias"])
def test_biases_that_are_not_finite(folder: Folder, leaf: str) -> None:
    folder.config.update(target_modules=["q_proj"], lora_bias=True, bias="lora_only")
    folder.keep("q_proj")
    for kind in ("lora_B.bias", "base_layer.bias"):
        folder.add_biases(kind, "q_proj", 1.0)
    assert sum(isinstance(part, BiasDelta) for part in folder.read().parts) == LAYERS
    folder.tensors[f"{Q0}.{leaf}"][3] = math.nan
    folder.refused("not_finite", re.escape(f"{Q0}.{leaf}"))
    folder.tensors[f"{Q0}.{leaf}"][3] = 1e6
    folder.read()
    folder.refused("not_finite", re.escape(Q0), "float16", dtype=torch.float16)


@pytest.mark.parametrize(("leaf", "what"), [("lora_A", "it reaches 1e"), ("lora_B", "it times 2 reaches 2e")])
def test_values_beyond_the_compute_dtype(folder: Folder, leaf: str, what: str) -> None:
    name = f"{Q0}.{leaf}.weight"
    folder.tensors[name][0, 0] = 1e5
    folder.read()
    folder.read(torch.bfloat16)
    folder.refused("not_finite", re.escape(name), re.escape(what), "float16.*65504", dtype=torch.float16)


def test_scaling_counts_before_rounding(folder: Folder) -> None:
    """40000 fits float16 and 40000 times alpha / r does not; 1e5 does not and 1e5 times a small one does."""
    name = f"{Q0}.lora_B.weight"
    folder.tensors[name][0, 0] = 40000
    folder.refused("not_finite", re.escape(name), "8e", dtype=torch.float16)
    folder.tensors[name][0, 0] = 1e5
    folder.config["lora_alpha"] = 1
    folder.read(torch.float16)


# adapters that do nothing


def zero(folder: Folder, leaf: str) -> None:
    for name, tensor in folder.tensors.items():
        if leaf in name:
            tensor.zero_()


def test_effects_that_vanish_in_the_compute_dtype(folder: Folder) -> None:
    for name, tensor in folder.tensors.items():
        if "lora_B" in name:
            tensor.fill_(1e-9)
    assert len(folder.read().parts) == 4
    folder.refused("no_effect", "vanishes in float16", dtype=torch.float16)


def test_one_value_is_an_effect(folder: Folder) -> None:
    zero(folder, "lora_B")
    folder.tensors[f"{LAYER}1.mlp.down_proj.lora_B.weight"][-1, -1] = 1e-6
    (part,) = folder.read().parts
    assert (part.layer, part.projection.name) == (1, "mlp.down_proj")


def test_a_bias_is_an_effect(folder: Folder) -> None:
    zero(folder, "lora_B")
    folder.config["lora_bias"] = True
    folder.add_biases("lora_B.bias", "proj", 0.0)
    folder.refused("no_effect")
    folder.tensors[f"{Q0}.lora_B.bias"][5] = 1.5
    (part,) = folder.read().parts
    assert isinstance(part, BiasDelta)
    assert part.delta.nonzero().tolist() == [[5]]
    assert part.delta[5] == 1.5 * 8 / RANK


# anything at all


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "bias", "lora_bias", "init_lora_weights", "base_model_name_or_path",
    "use_dora", "modules_to_save", "else",
])  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(changes=st.dictionaries(KEYS, JSON, min_size=1, max_size=4))
def test_any_config_is_read_or_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = Folder(tmp_path / "adapter")
    folder.config.update(changes)
    try:
        folder.read()
    except AdapterRefused as error:
        assert str(error).startswith(str(folder.path))  # noqa: PT017  both outcomes are right
        assert "\n" not in str(error)  # noqa: PT017


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), header=st.booleans())
def test_any_byte_changed_is_read_or_refused(tmp_path: Path, place: float, value: int, header: bool) -> None:
    folder = Folder(tmp_path / "adapter")
    folder.write()
    data = bytearray(folder.weights.read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0] if header else len(data)
    data[int(place * end)] = value
    folder.weights.write_bytes(data)
    try:
        folder.read(write=False)
    except AdapterRefused as error:
        assert "\n" not in str(error)  # noqa: PT017  both outcomes are right


# ------------------------------------------------------------------------------------------------------- DoRA


@pytest.fixture
def dora(folder: Folder) -> Folder:
    """A DoRA adapter on a base whose weights are zero: each row of W + B A is B A's, and its magnitude as long."""
    folder.config["use_dora"] = True
    for name in [name for name in folder.tensors if name.endswith("lora_A.weight")]:
        path = name.removesuffix(".lora_A.weight")
        delta = 2 * folder.tensors[f"{path}.lora_B.weight"] @ folder.tensors[name]  # alpha / r is 2
        folder.tensors[f"{path}.lora_magnitude_vector"] = torch.linalg.norm(delta, dim=1)
    return folder


MAGNITUDE = f"{Q0}.lora_magnitude_vector"


def test_a_dora_adapter_is_read_whatever_stands_behind_its_magnitudes_name(dora: Folder) -> None:
    first = dora.read()
    for end in (".weight", ".default.weight"):
        dora.tensors = {f"{name}{end}" if "magnitude" in name else name: t for name, t in dora.tensors.items()}
        assert torch.equal(dora.read().image.pages, first.image.pages)
        dora.tensors = {name.removesuffix(end) if "magnitude" in name else name: t for name, t in dora.tensors.items()}


def test_scales_of_one_are_left_out(dora: Folder) -> None:
    dora.tensors[MAGNITUDE] *= 1.5
    scales = [part for part in dora.read().parts if isinstance(part, OutputScale)]
    assert [(part.layer, part.projection.name) for part in scales] == [(0, "self_attn.q_proj")]
    torch.testing.assert_close(scales[0].values, torch.full((32,), 1.5))


NO_DORA: dict[str, tuple[Callable[[Folder], object], str]] = {
    "no magnitude": (lambda f: f.tensors.pop(MAGNITUDE), "missing_tensor"),
    "another shape": (lambda f: f.tensors.update({MAGNITUDE: torch.ones(31)}), "shape_mismatch"),
    "of a row that is zero": (lambda f: f.tensors[f"{Q0}.lora_B.weight"][3].zero_(), "not_finite"),
    "nan": (lambda f: f.tensors[MAGNITUDE][3].fill_(math.nan), "not_finite"),
    "inf": (lambda f: f.tensors[MAGNITUDE][3].fill_(math.inf), "not_finite"),
}


@pytest.mark.parametrize(("change", "code"), NO_DORA.values(), ids=NO_DORA)
def test_magnitudes_that_are_refused(dora: Folder, change: Callable[[Folder], object], code: str) -> None:
    change(dora)
    dora.refused(code, re.escape(MAGNITUDE))


def test_dora_with_biases_of_b(dora: Folder) -> None:
    dora.config["lora_bias"] = True
    dora.refused("unsupported_option", "use_dora", "lora_bias")


def test_a_dora_adapter_that_was_not_trained(dora: Folder) -> None:
    """B is zero as at its start, and the magnitudes are the base's norms."""
    for name, tensor in dora.tensors.items():
        if name.endswith("lora_B.weight"):
            tensor.zero_()
    dora.base_norm = 1.0
    for name in dora.tensors:
        if "magnitude" in name:
            dora.tensors[name] = torch.full_like(dora.tensors[name], 1.0).bfloat16().float()
    dora.refused("no_effect", "lora_B is zero")
