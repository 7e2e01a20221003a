"""What is taken out of the base's weights is kept on the disk: computed once, and again where it is not there."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.format import lora_start
from loraplex.adapters.format.kept_starts import KeptStarts
from tests.support.adapter_reading import read_adapter
from tests.support.peft_adapters import ALL, layout_of, make_peft_adapter, served_base_of
from tests.support.tiny import tiny_hf_model

pytestmark = pytest.mark.filterwarnings("ignore")

MODULES = 14
"""Of two layers."""

KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"r": 4, "target_modules": ALL, "init_lora_weights": "pissa"},
    "olora": {"r": 4, "lora_alpha": 12, "target_modules": ALL, "init_lora_weights": "olora"},
    "kasa": {"r": 4, "target_modules": ALL, "kasa_config": {}},
    "osf": {"kind": "OSF", "target_modules": ALL, "effective_rank": 30},
}


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_hf_model("llama")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each start that is computed."""
    found: list[str] = []
    real = lora_start._start

    def noted(weight: torch.Tensor, rank: int, start: str) -> Any:
        found.append(start)
        return real(weight, rank, start)

    monkeypatch.setattr(lora_start, "_start", noted)
    return found


def read(base: Any, adapter: Path, kept: Path | None) -> torch.Tensor:
    """The image's pages, read by a server that has just started."""
    starts = None if kept is None else KeptStarts(kept)
    served = replace(served_base_of(base, layout_of(base)), starts=starts)
    return read_adapter(adapter, served).image.pages


@pytest.mark.parametrize("kind", KINDS)
def test_computed_once(base: Any, tmp_path: Path, computed: list[str], kind: str) -> None:
    make_peft_adapter(base, tmp_path / "one", **KINDS[kind])
    make_peft_adapter(base, tmp_path / "two", seed=2, **KINDS[kind])
    wanted = read(base, tmp_path / "one", None)
    computed.clear()
    assert torch.equal(read(base, tmp_path / "one", tmp_path / "kept"), wanted)
    assert len(computed) == MODULES
    assert torch.equal(read(base, tmp_path / "one", tmp_path / "kept"), wanted)
    read(base, tmp_path / "two", tmp_path / "kept")
    assert len(computed) == MODULES, "another adapter of the same start has it already"


def test_another_base_or_rank_has_its_own(base: Any, tmp_path: Path) -> None:
    other = tiny_hf_model("llama", seed=9)
    for i, (model, rank) in enumerate(((base, 4), (other, 4), (base, 3))):
        folder = tmp_path / str(i)
        make_peft_adapter(model, folder, **{**KINDS["pissa"], "r": rank})
        assert torch.equal(read(model, folder, tmp_path / "kept"), read(model, folder, None))
    assert len(list((tmp_path / "kept").iterdir())) == 3 * MODULES


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, "other", "nan"])
def test_damaged_files_are_made_again(base: Any, tmp_path: Path, computed: list[str], damage: bytes | str) -> None:
    make_peft_adapter(base, tmp_path / "one", **KINDS["pissa"])
    wanted = read(base, tmp_path / "one", tmp_path / "kept")
    files = sorted((tmp_path / "kept").iterdir())
    sound = {file: file.read_bytes() for file in files}
    for file in files:
        if damage == "nan":
            file.write_bytes(sound[file][:-4] + b"\xff\xff\xff\xff")
        elif damage == "other":
            file.write_bytes(next(data for data in sound.values() if len(data) != len(sound[file])))
        else:
            assert isinstance(damage, bytes)
            file.write_bytes(damage)
    computed.clear()
    assert torch.equal(read(base, tmp_path / "one", tmp_path / "kept"), wanted)
    assert computed
    computed.clear()
    read(base, tmp_path / "one", tmp_path / "kept")
    assert not computed


def test_a_place_that_cannot_be_written_costs_time_alone(base: Any, tmp_path: Path) -> None:
    make_peft_adapter(base, tmp_path / "one", **KINDS["pissa"])
    (tmp_path / "kept").write_text("no folder")
    assert torch.equal(read(base, tmp_path / "one", tmp_path / "kept"), read(base, tmp_path / "one", None))


def test_the_oldest_make_room(tmp_path: Path) -> None:
    weights = [torch.randn(8, 8) for _ in range(12)]
    starts = KeptStarts(tmp_path / "kept", most_bytes=2000)

    def get(i: int) -> None:
        starts.get(weights[i], "pissa-2", lambda: (torch.ones(2, 8), torch.full((8, 2), float(i))))

    for i in range(12):
        get(i)
        for file in (tmp_path / "kept").iterdir():
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 10))
    held = sum(file.stat().st_size for file in (tmp_path / "kept").iterdir())
    assert 0 < held <= 2000
    a0, b0 = starts.get(weights[11], "pissa-2", lambda: pytest.fail("the newest is gone"))
    assert float(b0[0, 0]) == 11
    assert a0.shape == (2, 8)
