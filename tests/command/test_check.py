"""`loraplex adapters check`: outcomes, their exit codes, and the same receipt as a server's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.command import cli
from loraplex.server.command.check import Verdict, check_adapter, describe
from loraplex.server.command.convert import convert_folder
from loraplex.server.config_engine import Device, DType, EngineConfig
from tests.adapters.format.test_bottleneck import save_as_the_library
from tests.adapters.format.test_reft import convert as convert_reft
from tests.proof.test_receipt import RECEIPT
from tests.support.peft_adapters import make_peft_adapter
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = EngineConfig(Device.cpu, DType.float32, memory=256 << 20)
OPTIONS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "o_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(make_tiny_model("llama", tmp_path_factory.mktemp("base")))


def make(base: Path, folder: Path, strength: float | None = 0.5) -> Path:
    return make_peft_adapter(load_oracle(base), folder, strength=strength, **OPTIONS).folder


def cut_short(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def widen_targets(folder: Path) -> None:
    """Half an adapter: modules that have no tensors."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"target_modules": ["q_proj", "o_proj", "v_proj"]}))


def test_a_sound_one_has_the_receipt_of_a_server(base: Path, tmp_path: Path) -> None:
    found = check_adapter(make(base, tmp_path), "tiny", base, CONFIG, allow_noop=False)
    assert (found.outcome, found.code, found.message) == (Verdict.sound, None, None)
    assert found.receipt is not None
    told = json.loads(found.as_json())
    assert (told["outcome"], told["digest"]) == ("sound", found.receipt.digest)
    assert told["receipt"] == found.receipt.as_json()
    assert told["receipt"]["tensors"]["matched"] == 8
    assert "8 tensors matched, 0 ignored" in found.as_text()


@pytest.mark.parametrize("case", ["Houlsby", "Pfeiffer", "parallel"])
def test_a_bottleneck_answers_as_the_plain_base_with_it(base: Path, tmp_path: Path, case: str) -> None:
    convert_folder(save_as_the_library(case, tmp_path / "saved"), tmp_path / "made")
    found = check_adapter(tmp_path / "made", "tiny", base, CONFIG, allow_noop=False)
    assert (found.outcome, found.message) == (Verdict.sound, None)
    assert found.receipt is not None
    assert found.receipt.probe is not None


@pytest.mark.parametrize("case", ["LoReFT, both ends", "LoReFT, relu", "pyreft LobiReFT"])
def test_a_reft_answers_as_the_plain_base_edited_where_it_says(base: Path, tmp_path: Path, case: str) -> None:
    found = check_adapter(convert_reft(case, tmp_path), "tiny", base, CONFIG, allow_noop=False)
    assert (found.outcome, found.message) == (Verdict.sound, None)
    assert found.receipt is not None
    assert found.receipt.probe is not None
    assert found.receipt.probe.adapter < 1e-4


@pytest.mark.parametrize(("spoil", "code"), [(cut_short, "bad_file"), (widen_targets, "missing_tensor")])
def test_what_is_refused_says_why(base: Path, tmp_path: Path, spoil: Callable[[Path], None], code: str) -> None:
    folder = make(base, tmp_path)
    spoil(folder)
    found = check_adapter(folder, "tiny", base, CONFIG, allow_noop=True)
    assert (found.outcome, found.code, found.receipt) == (Verdict.refused, code, None)
    assert code in found.as_text()


def test_a_noop_is_refused_unless_it_is_allowed(base: Path, tmp_path: Path) -> None:
    folder = make(base, tmp_path, strength=None)
    assert check_adapter(folder, "tiny", base, CONFIG, allow_noop=False).code == "no_effect"
    found = check_adapter(folder, "tiny", base, CONFIG, allow_noop=True)
    assert (found.outcome, "changes nothing" in found.as_text()) == (Verdict.sound, True)


def test_a_receipt_in_lines() -> None:
    assert describe(RECEIPT)[0] == "lora of rank 8, 4 modules, 8 tensors matched, 0 ignored"


def test_exit_codes_of_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(base, tmp_path)
    given = ["adapters", "check", str(folder), "--base", str(base), "--memory", "256M", "--dtype", "float32", "--json"]
    assert cli.app(given, standalone_mode=False) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "sound"
    cut_short(folder)
    assert cli.app(given, standalone_mode=False) == 1
    given[4] = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as ended:
        cli.app(given, standalone_mode=False)
    assert ended.value.code == 2
    assert "there is no folder" in capsys.readouterr().err
