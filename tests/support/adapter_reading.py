"""Reading an adapter's folder in every way there is, and checking that they agree."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import safetensors.torch
import torch
from torch import Tensor

from loraplex.adapters.format import adapter_files
from loraplex.adapters.format.adapter_files import read_bytes
from loraplex.adapters.format.header import parse_header, view_tensors
from loraplex.adapters.format.kind import ServedBase
from loraplex.adapters.format.kinds import KINDS, parse_config
from loraplex.adapters.image.tiles import AdapterImage, BaseLayout, Part
from loraplex.adapters.image.writing import pack, pack_each
from loraplex.adapters.tiers.loader import LoadedContent, Reading
from loraplex.adapters.tiers.reader import AdapterReader


@dataclass(frozen=True)
class ParsedAdapter:
    parts: tuple[Part, ...]
    rank: int
    targets: tuple[str, ...]
    digest: str
    image: AdapterImage


def without_weights(layout: BaseLayout) -> ServedBase:
    """A base without biases, for adapters that ask nothing else of its weights."""

    def asked(*_: object) -> Tensor:
        raise AssertionError("nobody asks for weights here")

    return ServedBase(layout, lambda *_: None, asked, asked, asked)


def no_breath() -> None:
    """Reading.breathe of a reading that nobody cancels."""


def read(reader: AdapterReader, folder: Path, *, fresh: bool = False) -> LoadedContent:
    return reader.read(Reading(str(folder), fresh, no_breath))


def same_image(one: AdapterImage, other: AdapterImage) -> bool:
    return (
        torch.equal(one.pages, other.pages)
        and torch.equal(one.tiles, other.tiles)
        and (one.nbytes, one.extent) == (other.nbytes, other.extent)
    )


def read_adapter(folder: Path, base: ServedBase) -> ParsedAdapter:
    """What AdapterReader makes of it: first and again, and the same as packing part by part.

    The parts come from the way that looks at module after module. Raises AdapterRefused as AdapterReader.read does.
    """
    reader = AdapterReader(base, 1 << 30)
    with patch.object(adapter_files, "SETTLED_SECONDS", -math.inf):
        first = read(reader, folder)
        again = read(reader, folder)
    files = read_bytes(folder, no_breath)
    config = parse_config(files.head.config)
    kind = KINDS[config.kind]
    module_map = kind.plan(config, parse_header(files.head, integers=kind.integers), base, no_breath)
    tensors = view_tensors(files.data, module_map.header)
    parts = list(kind.parts(module_map, tensors, base, no_breath))
    info = reader.examine(str(folder))
    assert same_image(first.image, again.image)
    assert first.digest == again.digest == files.digest
    made = module_map.making_bytes
    packed = pack_each(parts, module_map.shapes, base.layout) if made else pack(parts, base.layout)
    assert same_image(first.image, packed)
    assert (first.info.rank, first.info.targets) == (info.rank, info.targets)
    assert first.info.num_pages == len(first.image.pages) <= info.num_pages
    assert first.info.nbytes == first.image.nbytes <= info.nbytes
    return ParsedAdapter(tuple(parts), first.info.rank, first.info.targets, first.digest, first.image)


def write_adapter(
    folder: Path,
    layout: BaseLayout,
    *,
    rank: int = 4,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    alpha: float = 8,
) -> Path:
    """A random adapter on every projection of the layout's base; by renaming, so that it is there at once."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layout.num_layers):
        for projection in layout.projections:
            name = f"base_model.model.model.layers.{layer}.{projection.name}"
            a = torch.randn(rank, projection.in_features, generator=generator)
            b = torch.randn(projection.out_features, rank, generator=generator)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a.to(dtype), b.to(dtype)
    targets = sorted({projection.name.rpartition(".")[2] for projection in layout.projections})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets}
    put(folder / "adapter_config.json", json.dumps(config).encode())
    put(folder / "adapter_model.safetensors", safetensors.torch.save(tensors))
    return folder


def put(file: Path, content: bytes) -> None:
    """Replace a file as a whole: its inode changes, and with it its stamp."""
    other = file.with_name(f"{file.name}.new")
    other.write_bytes(content)
    other.replace(file)
