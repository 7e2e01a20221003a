"""ReFT of `adapters` and pyreft, from what they saved to logits: the libraries' own were recorded beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex.adapters.format.kinds import parse_config
from loraplex.adapters.format.reft_files import Wishes
from loraplex.adapters.positions import Positions, parse_positions
from loraplex.kernels.ops import Backend
from loraplex.kernels.records import AdapterSegments
from loraplex.kernels.select import load_backend
from loraplex.server.command.convert import convert_folder
from loraplex.server.engine.policy.wearing import worn_between
from tests.adapters.format.record_bottlenecks import IDS
from tests.adapters.format.record_reft import ADAPTERS_CASES, CASES, VECTORS
from tests.support.adapter_folder import AdapterFolder
from tests.support.converted import as_saved, harness_of, layout_of, place, recorded, recorded_base, served_base_of
from tests.support.harness import Harness
from tests.support.harness_adapters import Mix, wearing
from tests.support.refusals import refused
from tests.support.tiny import make_tiny_model

CLOSE = 1e-4
"""Of logits in fp32 that move by a unit or several."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: make_tiny_model(family, folder / family) for family in set(CASES.values())}


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> Backend:
    return load_backend(request.param, "cpu")


def save_as_the_library(case: str, folder: Path) -> Path:
    said, tensors = recorded(VECTORS, case)
    own = as_saved(tensors)
    folder.mkdir(parents=True)
    if case in ADAPTERS_CASES:
        (folder / "adapter_config.json").write_text(json.dumps(said["config"]))
        save_file(own, folder / "adapter.safetensors")
        return folder
    (folder / "config.json").write_text(json.dumps(said["config"]))
    for key in said["config"]["sorted_keys"]:
        files = {name.partition("|")[2]: tensor for name, tensor in own.items() if name.startswith(f"{key}|")}
        torch.save(files, folder / f"intkey_{key}.bin")
    return folder


def convert(case: str, folder: Path) -> Path:
    wishes = Wishes(**recorded(VECTORS, case)[0]["wishes"])
    convert_folder(save_as_the_library(case, folder / f"saved {case}"), folder / case, wishes)
    return folder / case


def positions_of(folder: Path) -> Positions:
    found = parse_config((folder / "adapter_config.json").read_bytes()).positions
    assert found is not None
    return found


def worn(rows: Sequence[tuple[int, int, int, Positions | None]], slots: int, num_decode: int = 0) -> AdapterSegments:
    """Segments of rows (slot, first token, count, where in a prompt of IDS)."""
    segments: list[tuple[int, Mix]] = []
    for slot, first, count, positions in rows:
        entries: list[tuple[int, float]] = [(slot, 1.0), (slot + slots, 1.0)]
        spans = positions.spans(len(IDS)) if positions is not None else ()
        acts = [[span for span in spans if span.unit == unit] for unit in (0, 1)]
        last, earlier = worn_between(entries, acts, first, first + count)
        segments += [*earlier, (count - sum(n for n, _ in earlier), last)]
    return wearing(segments, num_decode=num_decode)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_librarys(bases: dict[str, Path], tmp_path: Path, ops: Backend, case: str) -> None:
    """Of a whole prompt beside one of the base, and of one in chunks; then what is drawn, token by token."""
    harness, folder = harness_of(bases[CASES[case]], ops), convert(case, tmp_path)
    tiles, wanted = place(harness, [folder]), recorded(VECTORS, case)[1]
    base, where = recorded_base(VECTORS, CASES[case]), positions_of(folder)
    assert float((wanted["logits"] - base).abs().max()) > 0.5
    whole, plain = harness.sequence(IDS), harness.sequence(IDS)
    segments = worn([(0, 0, len(IDS), where), (0, 0, len(IDS), None)], 1)
    found = harness.step([(whole, len(IDS)), (plain, len(IDS))], segments, tiles)
    torch.testing.assert_close(found[0], wanted["logits"], atol=CLOSE, rtol=0)
    torch.testing.assert_close(found[1], base, atol=CLOSE, rtol=0)
    chunked, parts = harness.sequence(IDS), list[Tensor]()
    for count in (1, 4, 5, 2):
        parts += harness.step([(chunked, count)], worn([(0, chunked.computed, count, where)], 1), tiles)
    torch.testing.assert_close(torch.cat(parts), wanted["logits"], atol=CLOSE, rtol=0)
    last = parts[-1]
    for token in wanted["greedy"].tolist():
        assert int(last[-1].argmax()) == token
        chunked.ids.append(token)
        [last] = harness.step([(chunked, 1)], wearing([(1, ())], num_decode=1), tiles)


def test_one_batch_of_all(bases: dict[str, Path], tmp_path: Path, ops: Backend) -> None:
    """Each answers as alone, bit for bit."""
    cases = [case for case, family in CASES.items() if family == "llama"]
    harness = harness_of(bases["llama"], ops)
    folders = [convert(case, tmp_path) for case in cases]
    tiles = place(harness, folders)
    rows = [(slot, 0, len(IDS), positions_of(folder)) for slot, folder in enumerate(folders)]
    together = harness.step([(harness.sequence(IDS), len(IDS)) for _ in rows], worn(rows, len(rows)), tiles)
    for case, row, found in zip(cases, rows, together, strict=True):
        [alone] = harness.step([(harness.sequence(IDS), len(IDS))], worn([row], len(rows)), tiles)
        assert torch.equal(alone, found)
        torch.testing.assert_close(found, recorded(VECTORS, case)[1]["logits"], atol=CLOSE, rtol=0)


def test_all_tokens(bases: dict[str, Path], tmp_path: Path, ops: Backend) -> None:
    """Wherever each token is edited, a chunked prompt is the whole one, and decoded tokens are edited, too."""
    harness, folder = harness_of(bases["llama"], ops), convert("LoReFT", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    for key in ("shared", "short_prompts", "skip_last"):
        del config[key]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "positions": "all"}))
    assert parse_config((folder / "adapter_config.json").read_bytes()).positions is None
    tiles, own = place(harness, [folder]), ((0, 1.0),)
    [whole] = harness.step([(harness.sequence(IDS), len(IDS))], wearing([(len(IDS), own)]), tiles)
    chunked, parts = harness.sequence(IDS), list[Tensor]()
    chunked.prompt_len = 8
    for count in (5, 3, 1, 1, 1, 1):
        decode = int(chunked.computed >= 8)
        parts += harness.step([(chunked, count)], wearing([(count, own)], num_decode=decode), tiles)
    torch.testing.assert_close(torch.cat(parts), whole, atol=CLOSE, rtol=0)
    torch.testing.assert_close(whole[:1], recorded(VECTORS, "LoReFT")[1]["logits"][:1], atol=CLOSE, rtol=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("f3+l2", (3, 2)), ("f3", (3, 0)), ("l2", (0, 2))),
        *((text, None) for text in ("", "f0+l2", "f3+l0", "f3l2", "f3+", "l2+f3", "f-1", "f4097", "f99999", "all")),
    ],
)
def test_positions_are_written_as_pyreft_does(text: str, expected: tuple[int, int] | None) -> None:
    assert parse_positions(text) == expected
    assert expected is None or str(Positions(*expected)) == text


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("units", [1, 2])
def test_which_tokens_are_meant(halves: bool, units: int) -> None:
    """Against both libraries' words, written down again: their index lists for each length."""
    for length in range(12):
        for first, last, skipped in ((3, 2, 0), (2, 4, 1), (3, 0, 0), (0, 2, 0), (5, 5, 2)):
            end = max(0, length - skipped)
            most = end // 2 if halves else end
            unit = dict.fromkeys(range(min(first, most)), 0)
            unit |= dict.fromkeys(range(end - min(last, most), end), units - 1)
            spans = Positions(first, last, skipped, halves, units).spans(length)
            assert {at: span.unit for span in spans for at in range(span.first, span.end)} == unit
            assert sum(span.end - span.first for span in spans) == len(unit)


class Folder(AdapterFolder):
    """A converted adapter of the tiny Llama, with tiles of its own for the last positions."""

    def __init__(self, base: Path, path: Path) -> None:
        from safetensors.torch import load_file

        harness = Harness(base)
        folder = convert("LoReFT, both ends", path)
        super().__init__(folder, lambda dtype: served_base_of(layout_of(harness)))
        self.config = json.loads((self.path / "adapter_config.json").read_text())
        self.tensors = load_file(self.weights)


@pytest.fixture
def folder(bases: dict[str, Path], tmp_path: Path) -> Folder:
    return Folder(bases["llama"], tmp_path)


@pytest.mark.parametrize(
    ("change", "code", "pattern"),
    [
        ({"positions": None}, "needs_setting", "f3\\+l2"),
        ({"positions": "f3+l0"}, "bad_config", "first and last ones"),
        ({"positions": "first"}, "bad_config", "positions"),
        ({"positions": ["f3"]}, "bad_config", "positions"),
        ({"positions": "f9999999999+l2"}, "bad_config", "up to 4096"),
        ({"positions": "f3", "skip_last": 1}, "bad_config", "no last ones"),
        ({"positions": "all", "short_prompts": "halves"}, "bad_config", "neither"),
        ({"positions": "all"}, "unmatched_tensor", "layer_out_last"),
        ({"positions": "l3"}, "unmatched_tensor", "layer_out_last"),
        ({"shared": True}, "unmatched_tensor", "layer_out_last"),
        ({"shared": "no"}, "bad_config", "true or false"),
        ({"skip_last": -1}, "bad_config", "skip_last"),
        ({"short_prompts": "thirds"}, "bad_config", "overlap, halves"),
        ({"subtract": None}, "bad_config", "subtract"),
        ({"non_linearity": "mish"}, "bad_config", "identity, relu"),
        ({"layers": [1]}, "unsupported_option", "layers"),
        ({"modules_to_save": ["norm"]}, "unsupported_option", "modules_to_save"),
    ],
)
def test_configs_that_are_refused(folder: Folder, change: dict[str, Any], code: str, pattern: str) -> None:
    folder.config.update(change)
    folder.refused(code, pattern)


AT = "base_model.model.model.layers.1.layer_out"


@pytest.mark.parametrize(
    ("change", "code", "pattern"),
    [
        ({f"{AT}.projection": None}, "missing_tensor", "layer_out.projection is missing"),
        ({f"{AT}_last.source_bias": None}, "missing_tensor", "layer_out_last.source_bias is missing"),
        ({f"{AT}.projection": torch.ones(2, 32)}, "shape_mismatch", "hidden size 32"),
        ({f"{AT}.projection": torch.ones(0, 64)}, "shape_mismatch", "layer_out.projection"),
        ({f"{AT}.projection": torch.ones(1025, 64)}, "too_large", "1025 rows"),
        ({f"{AT}.projection": torch.tensor(1.0)}, "shape_mismatch", "layer_out.projection"),
        ({f"{AT}.source": torch.ones(3, 64)}, "shape_mismatch", "layer_out.source"),
        ({f"{AT}.source_bias": torch.ones(2, 1)}, "shape_mismatch", "source_bias"),
        ({f"{AT}.projection_bias": torch.ones(3)}, "shape_mismatch", "projection_bias"),
        ({f"{AT}.source": torch.full((2, 64), torch.nan)}, "not_finite", "layer_out.source"),
        ({f"{AT}.projection": torch.full((2, 64), torch.inf)}, "not_finite", "layer_out.projection"),
        ({f"{AT}.source": torch.ones(2, 64, dtype=torch.int32)}, "bad_file", "layer_out.source"),
        ({f"{AT}.rotation": torch.ones(2, 64)}, "unmatched_tensor", "expected projection or source"),
        ({AT.replace("1.", "9.") + ".source": torch.ones(2, 64)}, "unmatched_tensor", "2 layers"),
        ({AT.replace("layer_out", "mlp_out") + ".source": torch.ones(2, 64)}, "unmatched_tensor", "layer_out_last"),
    ],
)
def test_files_that_are_refused(folder: Folder, change: Mapping[str, Tensor | None], code: str, pattern: str) -> None:
    for name, tensor in change.items():
        if tensor is None:
            del folder.tensors[name]
        else:
            folder.tensors[name] = tensor
    folder.refused(code, pattern)


def test_no_tensors_where_the_positions_need_some(folder: Folder) -> None:
    folder.tensors = {name: tensor for name, tensor in folder.tensors.items() if "layer_out_last" not in name}
    folder.refused("missing_tensor", "layer_out_last.projection is missing", "in some layer")


def test_a_bias_of_what_is_not_subtracted(folder: Folder) -> None:
    folder.config["subtract"] = False
    folder.tensors[f"{AT}.projection_bias"] = torch.ones(2)
    folder.refused("unmatched_tensor", "no projection is subtracted")


def test_what_vanishes_has_no_effect(folder: Folder) -> None:
    for name, tensor in folder.tensors.items():
        if name.endswith(".projection"):
            tensor.zero_()
    folder.refused("no_effect", "projection is zero")


@pytest.mark.parametrize(
    ("case", "wishes", "code", "pattern"),
    [
        ("NoReFT", Wishes(), "needs_setting", "--kind"),
        ("DiReFT", Wishes(kind="loreft"), "needs_setting", "--kind"),
        ("pyreft LoReFT", Wishes(), "needs_setting", "--positions"),
        ("pyreft LoReFT", Wishes(positions="everywhere"), "bad_config", "positions"),
        ("pyreft LoReFT", Wishes(positions="f3", skip_last=1), "bad_config", "skip_last"),
        ("pyreft LoReFT", Wishes(positions="f3", non_linearity="mish"), "unsupported_option", "mish"),
        ("pyreft LoReFT, apart", Wishes(positions="f3"), "unsupported_option", "expected both"),
    ],
)
def test_what_is_not_converted_as_it_is_said(
    tmp_path: Path, case: str, wishes: Wishes, code: str, pattern: str
) -> None:
    with refused(code, pattern):
        convert_folder(save_as_the_library(case, tmp_path / "saved"), tmp_path / "served", wishes)
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize(
    ("change", "code", "pattern"),
    [
        ({"intervention_types": ["<class 'pyvene.VanillaIntervention'>"]}, "unsupported_kind", "vanilla"),
        ({"intervention_types": None}, "unsupported_kind", "expected one of loreft"),
        ({"sorted_keys": ["layer_0_comp_mlp_output_unit_pos_nunit_1#0"]}, "unsupported_option", "block_output"),
        ({"sorted_keys": ["../../secret"]}, "unsupported_option", "secret"),
        ({"sorted_keys": ["layer_0_comp_block_output_unit_pos_nunit_1#2"]}, "unsupported_option", "one or two"),
        ({"sorted_keys": ["layer_7_comp_block_output_unit_pos_nunit_1#0"]}, "missing_file", "layer_7"),
        ({"sorted_keys": []}, "missing_tensor", "no tensor"),
    ],
)
def test_pyreft_folders_that_are_refused(tmp_path: Path, change: dict[str, Any], code: str, pattern: str) -> None:
    folder = save_as_the_library("pyreft LoReFT", tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with refused(code, pattern):
        convert_folder(folder, tmp_path / "served", Wishes(positions="f3"))


def test_a_pickle_of_more_than_tensors_is_refused(tmp_path: Path) -> None:
    folder = save_as_the_library("pyreft LoReFT", tmp_path / "saved")
    torch.save({"weight": Path("anything")}, folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin")
    with refused("bad_file", "more than tensors"):
        convert_folder(folder, tmp_path / "served", Wishes(positions="f3"))
