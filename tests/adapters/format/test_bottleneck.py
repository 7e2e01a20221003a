"""Bottlenecks of the `adapters` library, from what it saved to logits: the library's own were recorded beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraplex.kernels.ops import Backend
from loraplex.kernels.select import load_backend
from loraplex.server.command.convert import convert_folder
from tests.adapters.format.record_bottlenecks import CASES, IDS, VECTORS
from tests.support.adapter_folder import AdapterFolder
from tests.support.converted import as_saved, harness_of, layout_of, place, recorded, served_base_of
from tests.support.harness import Harness
from tests.support.harness_adapters import Mix, wearing
from tests.support.refusals import refused
from tests.support.tiny import make_tiny_model

CLOSE = 1e-4
"""Of logits in fp32 that move by several units."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: make_tiny_model(family, folder / family) for family in {case[0] for case in CASES.values()}}


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> Backend:
    return load_backend(request.param, "cpu")


def saved(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return recorded(VECTORS, case)


def save_as_the_library(case: str, folder: Path, *, pickled: bool = False) -> Path:
    config, tensors = saved(case)
    own = as_saved(tensors)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(own, folder / "pytorch_adapter.bin")
    else:
        save_file(own, folder / "adapter.safetensors")
    return folder


def convert(cases: list[str], folder: Path) -> list[Path]:
    """Convert what the library saved, into a folder each."""
    for case in cases:
        convert_folder(save_as_the_library(case, folder / f"saved {case}"), folder / case)
    return [folder / case for case in cases]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_librarys(bases: dict[str, Path], tmp_path: Path, ops: Backend, case: str) -> None:
    """Of a whole prompt, of one in chunks, and of tokens one by one; beside rows of the base."""
    harness = harness_of(bases[CASES[case][0]], ops)
    tiles, wanted = place(harness, convert([case], tmp_path)), saved(case)[1]
    assert float((wanted["logits"] - wanted["base"]).abs().max()) > 0.5
    own: Mix = ((0, 1.0),)
    whole, plain = harness.sequence(IDS), harness.sequence(IDS)
    found = harness.step([(whole, len(IDS)), (plain, len(IDS))], wearing([(len(IDS), own)]), tiles)
    torch.testing.assert_close(found[0], wanted["logits"], atol=CLOSE, rtol=0)
    torch.testing.assert_close(found[1], wanted["base"], atol=CLOSE, rtol=0)
    chunked, parts = harness.sequence(IDS), []
    chunked.prompt_len = 8
    for count in (5, 3, 1, 1, 1, 1):
        decode = int(chunked.computed >= 8)
        parts += harness.step([(chunked, count)], wearing([(count, own)], num_decode=decode), tiles)
    torch.testing.assert_close(torch.cat(parts), wanted["logits"], atol=CLOSE, rtol=0)
    last = parts[-1]
    for token in wanted["greedy"].tolist():
        assert int(last[-1].argmax()) == token
        chunked.ids.append(token)
        [last] = harness.step([(chunked, 1)], wearing([(1, own)], num_decode=1), tiles)


def test_one_batch_of_all(bases: dict[str, Path], tmp_path: Path, ops: Backend) -> None:
    """Each answers as alone, and halves of one adapter are the adapter."""
    cases = [case for case, (family, *_) in CASES.items() if family == "llama"]
    harness = harness_of(bases["llama"], ops)
    tiles = place(harness, convert(cases, tmp_path))
    mixes: list[Mix] = [((slot, 1.0),) for slot in range(len(cases))] + [((0, 0.5), (0, 0.5)), ((1, 0.0),)]
    wanted = [saved(case)[1]["logits"] for case in [*cases, cases[0]]] + [saved(cases[0])[1]["base"]]
    prompts = [harness.sequence(IDS) for _ in mixes]
    for sequence in prompts:
        sequence.prompt_len = 7
    steps = [harness.step([(s, 7) for s in prompts], wearing([(7, mix) for mix in mixes]), tiles)]
    for _ in range(len(IDS) - 7):
        decode = wearing([(1, mix) for mix in mixes], num_decode=len(mixes))
        steps.append(harness.step([(s, 1) for s in prompts], decode, tiles))
    for number, expected in enumerate(wanted):
        found = torch.cat([step[number] for step in steps])
        torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)


class Folder(AdapterFolder):
    """A converted adapter of the tiny Llama."""

    def __init__(self, base: Path, path: Path) -> None:
        harness = Harness(base)
        convert_folder(save_as_the_library("Houlsby", path / "saved"), path / "served")
        super().__init__(path / "served", lambda dtype: served_base_of(layout_of(harness)))
        self.config = json.loads((self.path / "adapter_config.json").read_text())
        with safe_open(self.weights, "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping


@pytest.fixture
def folder(bases: dict[str, Path], tmp_path: Path) -> Folder:
    return Folder(bases["llama"], tmp_path)


AT = "base_model.model.model.layers.1.mlp_out"


@pytest.mark.parametrize(
    ("change", "code", "pattern"),
    [
        ({"non_linearity": "swiglu"}, "bad_config", "expected one of identity, relu"),
        ({"non_linearity": None}, "bad_config", "non_linearity"),
        ({"source": "nowhere"}, "bad_config", "expected one of branch, sum, residual"),
        ({"source": 1}, "bad_config", "source"),
        ({"another": 1}, "unsupported_option", "another"),
    ],
)
def test_configs_that_are_refused(folder: Folder, change: dict[str, Any], code: str, pattern: str) -> None:
    folder.config.update(change)
    folder.refused(code, pattern)


@pytest.mark.parametrize(
    ("name", "tensor", "code", "pattern"),
    [
        (f"{AT}.down", None, "missing_tensor", "mlp_out.down is missing"),
        (f"{AT}.up_bias", None, "missing_tensor", "mlp_out.up_bias is missing"),
        (f"{AT}.down", torch.ones(8, 32), "shape_mismatch", "hidden size 32"),
        (f"{AT}.down", torch.ones(0, 64), "shape_mismatch", "mlp_out.down"),
        (f"{AT}.down", torch.ones(1025, 64), "too_large", "1025 rows"),
        (f"{AT}.down_bias", torch.ones(7), "shape_mismatch", "mlp_out.down_bias"),
        (f"{AT}.up", torch.ones(8, 64), "shape_mismatch", "mlp_out.up"),
        (f"{AT}.up", torch.full((64, 8), torch.nan), "not_finite", "mlp_out.up"),
        (f"{AT}.up", torch.ones(64, 8, dtype=torch.int32), "bad_file", "mlp_out.up"),
        (f"{AT}.gate", torch.ones(1), "unmatched_tensor", "expected down or down_bias"),
        (AT.replace("1.mlp_out", "7.mlp_out") + ".up", torch.ones(64, 8), "unmatched_tensor", "2 layers"),
        (
            AT.replace("mlp_out", "mlp.down_proj") + ".up",
            torch.ones(64, 8),
            "unmatched_tensor",
            "attention_out, mlp_out",
        ),
    ],
)
def test_files_that_are_refused(folder: Folder, name: str, tensor: Tensor | None, code: str, pattern: str) -> None:
    if tensor is None:
        del folder.tensors[name]
    else:
        folder.tensors[name] = tensor
    folder.refused(code, pattern)


def test_what_was_not_trained_has_no_effect(folder: Folder) -> None:
    for name, tensor in folder.tensors.items():
        if name.endswith((".up", ".up_bias")):
            tensor.zero_()
    folder.refused("no_effect", "zero")


def test_a_pickle_of_tensors_is_converted_and_no_other(tmp_path: Path) -> None:
    from_pickle = convert_folder(save_as_the_library("Pfeiffer", tmp_path / "a", pickled=True), tmp_path / "served")
    assert from_pickle == convert_folder(save_as_the_library("Pfeiffer", tmp_path / "b"), tmp_path / "other")
    weights = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("served", "other")]
    assert weights[0] == weights[1]
    with pytest.raises(FileExistsError):
        convert_folder(tmp_path / "a", tmp_path / "served")
    torch.save({"model.layers.0": Path("anything")}, tmp_path / "a" / "pytorch_adapter.bin")
    with refused("bad_file", "more than tensors"):
        convert_folder(tmp_path / "a", tmp_path / "third")


@pytest.mark.parametrize(
    ("change", "code", "pattern"),
    [
        ({"use_gating": True}, "unsupported_option", "use_gating"),
        ({"ln_before": True}, "unsupported_option", "layer norm"),
        ({"inv_adapter": "nice"}, "unsupported_option", "inv_adapter"),
        ({"non_linearity": "mish"}, "unsupported_option", "mish"),
        ({"architecture": "union"}, "unsupported_kind", "union"),
        ({"phm_layer": True}, "missing_tensor", "adapter_down.0.W"),
        ({"scaling": "learned"}, "missing_tensor", "scaling"),
    ],
)
def test_what_is_not_converted(tmp_path: Path, change: dict[str, Any], code: str, pattern: str) -> None:
    folder = save_as_the_library("Houlsby", tmp_path / "saved")
    config, _ = saved("Houlsby")
    config["config"].update(change)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with refused(code, pattern):
        convert_folder(folder, tmp_path / "served")


def test_adapters_of_another_name_or_none(tmp_path: Path) -> None:
    with refused("missing_file", "save_adapter"):
        convert_folder(tmp_path, tmp_path / "served")
    folder = save_as_the_library("Houlsby", tmp_path / "saved")
    config, _ = saved("Houlsby")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "name": "another"}))
    with refused("unmatched_tensor", "'another'"):
        convert_folder(folder, tmp_path / "served")
