"""What libraries saved and computed (tests/adapters/format/record_*.py), read back, and a harness for it converted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from loraplex.adapters.format.kind import ServedBase
from loraplex.adapters.image.tile_rows import TileRows
from loraplex.adapters.image.tiles import BaseLayout
from loraplex.kernels.ops import Backend
from loraplex.kernels.records import TileTable
from loraplex.server.models.recorded import record
from tests.support.adapter_reading import read_adapter
from tests.support.harness import Harness

OUTCOME = ("logits", "base", "greedy")


def recorded(vectors: Path, case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is said of a case, and its tensors: as saved, and beside these those of OUTCOME."""
    with safe_open(vectors, "pt") as file:
        own = [name for name in file.keys() if name.startswith(f"{case}/")]  # noqa: SIM118  no mapping
        tensors = {name.removeprefix(f"{case}/"): file.get_tensor(name) for name in own}
        return json.loads(file.metadata()[case]), tensors


def recorded_base(vectors: Path, family: str) -> Tensor:
    """Return the base's logits."""
    with safe_open(vectors, "pt") as file:
        return file.get_tensor(f"{family}/base")


def as_saved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that the library wrote."""
    return {name: tensor for name, tensor in tensors.items() if name not in OUTCOME}


def layout_of(harness: Harness) -> BaseLayout:
    config = harness.config
    blocks, dtype = config.blocks(), harness.weights.dtype
    return BaseLayout("tiny", config.num_layers, config.projections(), harness.page_bytes, dtype, blocks)


def served_base_of(layout: BaseLayout) -> ServedBase:
    """A base whose weights nobody may ask for."""

    def none(*_: object) -> Any:
        raise AssertionError("it asks nothing of the base's weights")

    return ServedBase(layout, bias=none, squared_norms=none, products=none, weight=none)


def harness_of(base: Path, ops: Backend) -> Harness:
    """A harness that runs recorded steps where the backend does."""
    harness = Harness(base, ops=ops, num_pages=160)
    harness.decoder = record(harness.decoder, 160, 160)  # type: ignore[arg-type]  # as it was made
    return harness


def place(harness: Harness, folders: Sequence[Path]) -> TileTable:
    """Read and pack what lies in `folders`, one slot for each."""
    layout = layout_of(harness)
    rows = TileRows(len(folders), layout, torch.device("cpu"))
    for slot, folder in enumerate(folders):
        image = read_adapter(folder, served_base_of(layout)).image
        pages = harness.take_pages(len(image.pages))
        harness.arena[pages] = image.pages
        rows.write(slot, image, pages)
    return rows.table
