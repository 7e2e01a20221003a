"""A base's digest: the same for the same files, another for others."""

from __future__ import annotations

import hashlib
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


def test_every_byte_counts(tmp_path: Path) -> None:
    """Also between the first MiB and what samples would have seen, of files that are changed in place."""
    path = make_tiny_model("llama", tmp_path, vocab_size=16384, hidden_size=64)
    file = path / "model.safetensors"
    size, before = file.stat().st_size, digest(path)
    assert size > 4 << 20
    with file.open("r+b") as handle:
        handle.seek(size // 2 + 4097)
        byte = handle.read(1)[0]
        handle.seek(size // 2 + 4097)
        handle.write(bytes([byte ^ 1]))
    assert digest(path) != before


def test_it_is_what_sha256sum_says_put_together(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    data = (path / "model.safetensors").read_bytes()
    told = f"\0model.safetensors\0{len(data)}\0{hashlib.sha256(data).hexdigest()}".encode()
    assert digest(path) == hashlib.sha256((path / "config.json").read_bytes() + told).hexdigest()


def test_files_are_read_once_until_they_change(tmp_path: Path) -> None:
    path, known = make_tiny_model("llama", tmp_path / "base"), dict[str, str]()
    checkpoint, breaths = open_checkpoint(path), list[int]()

    def taken() -> tuple[str, int]:
        breaths.clear()
        return base_digest(path, checkpoint, lambda: breaths.append(1), known), len(breaths)

    first, reads = taken()
    assert reads > 0
    assert taken() == (first, 0)
    nudge(path)
    assert taken() == (digest(path), reads)
    assert len(known) == 1  # the old one is forgotten


def test_files_that_are_gone_are_told(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    checkpoint = open_checkpoint(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        base_digest(path, checkpoint)
