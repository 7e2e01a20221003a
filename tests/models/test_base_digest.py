"""A base's digest: the same for the same files, another for others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

from loraplex.server.models.base_digest import base_digest
from loraplex.server.models.checkpoint import WeightsError
from loraplex.server.models.opening import open_checkpoint
from tests.support.tiny import make_tiny_model


def digest(path: Path) -> str:
    return base_digest(path, open_checkpoint(path))


def nudge(path: Path) -> None:
    """A training step: the last bit of every weight."""
    file = path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: tensor * (1 + 2**-22) for name, tensor in tensors.items()}, file)


def configure(path: Path) -> None:
    config = path / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps"', '"comment": 1, "rms_norm_eps"'))


@pytest.mark.parametrize("change", [nudge, configure])
def test_it_tells_bases_apart_and_not_places(change: Callable[[Path], None], tmp_path: Path) -> None:
    first = make_tiny_model("llama", tmp_path / "first")
    second = tmp_path / "second" / "elsewhere"
    shutil.copytree(first, second)
    assert digest(first) == digest(second)
    change(second)
    assert digest(first) != digest(second)


def test_all_shards_count(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    seen = {digest(path)}
    for shard in shards:
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        seen.add(digest(path))
    assert len(seen) == len(shards) + 1


def test_files_that_are_gone_are_told(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    checkpoint = open_checkpoint(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        base_digest(path, checkpoint)
