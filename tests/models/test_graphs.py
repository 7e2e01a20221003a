"""GraphedDecoder without a GPU: the buffers and their filling, over the Triton kernels in the interpreter.

Capturing is replaced by running the work again, which sees what a graph would: the buffers alone. tests/kernels/gpu
runs this file under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraplex.kernels.backend import load_backend
from loraplex.kernels.metadata import TILE_RANKS, AdapterSegments, Site, TileTable
from loraplex.server.models.graphs import GraphedDecoder, Size
from support.harness import Harness
from support.tiny import make_tiny_model

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by tests/kernels/gpu")


class _Rerun:
    """In place of a CUDA graph."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.captured += 1
        hidden = work()
        return lambda: hidden.copy_(work()), hidden


def _adapter(harness: Harness) -> TileTable:
    """A random tile on the whole of every qkv and down site, in slot 0; two of them in slot 1."""
    config = harness.config
    generator = torch.Generator().manual_seed(5)
    ranges = torch.zeros(2, config.num_layers, 6, 2, dtype=torch.int32)
    rows: list[list[int]] = []
    for slot in (0, 1):
        for layer in range(config.num_layers):
            for site in (Site.QKV, Site.DOWN):
                parts = [p for p in config.projections() if p.site is site]
                n_in, n_out = parts[0].in_features, sum(p.out_features for p in parts)
                first = len(rows)
                for _ in range(slot + 1):
                    at = []
                    for width in (n_in, n_out):
                        page = harness.take_pages(1)[0]
                        matrix = torch.randn(TILE_RANKS, width, generator=generator).mul_(0.1)
                        raw = matrix.view(torch.uint8).flatten()
                        harness.arena[page, : raw.numel()] = raw
                        at.append(page * harness.page_bytes // 64)
                    rows.append([*at, TILE_RANKS, 0, n_out])
                ranges[slot, layer, site] = torch.tensor([first, len(rows)])
    tiles = torch.tensor(rows, dtype=torch.int32)
    return TileTable(ranges, tiles, ranges, tiles)


def _segments(slots: list[int]) -> AdapterSegments:
    """One decode row each, of a mix of all slots so far."""
    mixes = tuple(tuple((slot, 0.5 + slot) for slot in slots[: i + 1]) for i in range(len(slots)))
    sizes = [0, *torch.tensor([len(mix) for mix in mixes]).cumsum(0).tolist()]
    return AdapterSegments(
        indptr=torch.arange(len(slots) + 1, dtype=torch.int32),
        mix_ptr=torch.tensor(sizes, dtype=torch.int32),
        mix_slot=torch.tensor([slot for mix in mixes for slot, _ in mix], dtype=torch.int32),
        mix_weight=torch.tensor([weight for mix in mixes for _, weight in mix]),
        bounds=tuple(range(len(slots) + 1)),
        mixes=mixes,
        num_decode_segments=len(slots),
    )


def _world(path: Path, capture: _Rerun | None) -> list[Tensor]:
    """Prefill of three sequences, then decode steps of three, two and one of them, with and without adapters."""
    harness = Harness(path, ops=load_backend("triton", "cpu"), group_size=1, num_pages=96, page_bytes=1 << 15)
    if capture is not None:
        harness.decoder = GraphedDecoder(harness.decoder, capture)
    tiles = _adapter(harness)
    a, b, c = (harness.sequence(list(range(3, 3 + n))) for n in (20, 9, 5))
    out = harness.step([(a, 19), (b, 8), (c, 4)])
    for running in ([a, b, c], [a, b], [c], [b, a, c]):
        for adapters in (None, _segments([0]), _segments([1, 0][: len(running)])):
            out += harness.step([(s, 1) for s in running], adapters=adapters, tiles=tiles)
            for s in running:
                s.ids.append(int(out[-1].argmax()) % 50 + 2)
    return [logits.clone() for logits in out]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_same_bits_as_the_ops_one_by_one(family: str, tmp_path: Path) -> None:
    path = make_tiny_model(family, tmp_path / "model", num_hidden_layers=1)
    capture = _Rerun()
    graphed, eager = _world(path, capture), _world(path, None)
    assert len(graphed) == len(eager)
    for got, expected in zip(graphed, eager, strict=True):
        # The base linears are torch's, which may sum in another order for a power of two of rows.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # Rows 4, 2 and 1; without adapters, with one tile, and with mixes of two: no step captures anew.
    assert 0 < capture.captured <= 9


def test_sizes_are_powers_of_two_and_apart_by_adapters() -> None:
    """A base-only step launches no adapter kernel, so it is a graph of its own."""
    assert Size(4, 256, 0, 0) != Size(4, 256, 1, 1)
    assert replace(Size(4, 256, 1, 1), tiles=0, mix=0) == Size(4, 256, 0, 0)
