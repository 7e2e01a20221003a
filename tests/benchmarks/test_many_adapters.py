"""Random adapters as safetensors reads them, damaged ones, and what the kernel keeps of a file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from loraplex.benchmarks import random_adapters
from loraplex.benchmarks.many import pagecache
from loraplex.benchmarks.many.guests import BAD, CHANGING, change, make_folder
from loraplex.benchmarks.many.world import FIVE, World
from loraplex.benchmarks.random_adapters import ATTENTION, WEIGHTS, DiskFull, adapter_bytes, make_adapters, modules_of
from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny")


def test_adapters_are_what_peft_would_save(base: Path, tmp_path: Path) -> None:
    paths = make_adapters(base, tmp_path / "all", 3, ranks=(8, 4), targets=ATTENTION)
    assert [path.name for path in paths] == ["ad0", "ad1", "ad2"]
    for path, rank in zip(paths, (8, 4, 8), strict=True):
        tensors = load_file(path / WEIGHTS)
        config = json.loads((path / "adapter_config.json").read_text())
        assert config["r"] == rank
        assert set(config["target_modules"]) == set(ATTENTION)
        prefix = "base_model.model.model.layers.1.self_attn"
        assert tensors[f"{prefix}.k_proj.lora_A.weight"].shape == (rank, 64)
        assert tensors[f"{prefix}.k_proj.lora_B.weight"].shape == (32, rank)  # 2 heads of 16
        assert len(tensors) == 2 * 4 * 2
        assert sum(tensor.nbytes for tensor in tensors.values()) == adapter_bytes(modules_of(base, ATTENTION), rank)
        a = torch.cat([t.float().flatten() for name, t in tensors.items() if "lora_A" in name])
        b = torch.cat([t.float().flatten() for name, t in tensors.items() if "lora_B" in name])
        assert float(a.std()) == pytest.approx(64**-0.5, rel=0.1)
        assert float(b.std()) == pytest.approx(0.02, rel=0.1)
    first, last = ((path / WEIGHTS).read_bytes() for path in (paths[0], paths[2]))
    assert first != last


def test_what_is_there_is_kept_and_what_was_begun_is_not(base: Path, tmp_path: Path) -> None:
    (path,) = make_adapters(base, tmp_path, 1, targets=ATTENTION)
    stamp = (path / WEIGHTS).stat().st_mtime_ns
    (tmp_path / ".ad1.partial").mkdir()
    (tmp_path / ".ad1.partial" / "left over").touch()
    make_adapters(base, tmp_path, 2, targets=ATTENTION)
    assert (path / WEIGHTS).stat().st_mtime_ns == stamp
    assert sorted(os.listdir(tmp_path)) == ["ad0", "ad1"]
    assert sorted(os.listdir(tmp_path / "ad1")) == ["adapter_config.json", WEIGHTS]


def test_a_full_disk_is_told_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = adapter_bytes(modules_of(base), 16)
    free = random_adapters.SPARE_BYTES + 2 * need
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    make_adapters(base, tmp_path, 2)
    with pytest.raises(DiskFull, match="3 adapters need"):
        make_adapters(base, tmp_path, 5)
    assert sorted(os.listdir(tmp_path)) == ["ad0", "ad1"]


def test_the_world_counts_bytes_and_pages(base: Path, tmp_path: Path) -> None:
    world = World.make(str(base), "tiny", base, tmp_path, 6)
    files = [load_file(tmp_path / f"ad{i}" / WEIGHTS) for i in range(6)]
    sizes = [sum(tensor.nbytes for tensor in file.values()) for file in files]
    assert [world.bytes_of(f"ad{i}") for i in range(6)] == sizes
    assert world.mean_bytes == pytest.approx(sum(sizes) / 6)
    assert sum(sizes[i] for i in FIVE) / 5 == pytest.approx(world.mean_bytes, rel=0.05)
    assert world.page_bytes == 2 * 2 * 2 * 16 * 16 * 2  # layers, K and V, heads, tokens, head_dim, bf16
    assert world.pages(3, 33, 0) == 9
    assert world.pages(0, 0, 3) == sum(-(-size // world.page_bytes) for size in sizes[:3])


def test_bad_adapters_are_bad_in_the_way_they_are_called(base: Path, tmp_path: Path) -> None:
    modules = modules_of(base, ATTENTION)
    good, folder = tmp_path / "good", tmp_path / "folder"
    make_adapters(base, good, 2, targets=ATTENTION)
    make_folder(folder, good, 2, modules, rank=4)
    assert set(os.listdir(folder)) == {"ad0", "ad1", *BAD, CHANGING}
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "ad1" / WEIGHTS).values())
    found = load_file(folder / "not_finite" / WEIGHTS)
    assert sum(int(tensor.isnan().sum()) for tensor in found.values()) == 1
    with pytest.raises(SafetensorError):
        load_file(folder / "truncated" / WEIGHTS)
    first = f"base_model.model.{modules[0].path}.lora_A.weight"
    assert load_file(folder / "wrong_shape" / WEIGHTS)[first].shape == (4, modules[0].n_in + 1)
    assert os.listdir(folder / "no_weights") == ["adapter_config.json"]

    before = load_file(folder / CHANGING / WEIGHTS)
    change(folder / CHANGING, modules, rank=4, seed=9)
    after = load_file(folder / CHANGING / WEIGHTS)
    assert before.keys() == after.keys()
    assert not torch.equal(before[first], after[first])


def test_files_are_forgotten_and_remembered(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    assert pagecache.resident_share(file) == 1.0
    with file.open("rb") as handle:
        os.fsync(handle.fileno())  # a page that is not on the disk yet stays
    pagecache.drop(file)
    if pagecache.resident_share(file) == 1.0 and str(tmp_path).startswith(("/dev/shm", "/run")):
        pytest.skip("a file system in memory forgets nothing")
    assert pagecache.resident_share(file) == 0.0
    pagecache.fill(file)
    assert pagecache.resident_share(file) == 1.0
    (tmp_path / "empty").touch()
    assert pagecache.resident_share(tmp_path / "empty") == 0.0
