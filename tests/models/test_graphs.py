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

from loraplex.kernels.records import AdapterSegments
from loraplex.kernels.select import load_backend
from loraplex.server.models.graphs import GraphedDecoder, Size
from tests.support.harness import Harness
from tests.support.harness_adapters import wearing, write_adapters, write_own_rows
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by tests/kernels/gpu")


class _Rerun:
    """In place of a CUDA graph."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.captured += 1
        hidden = work()
        return lambda: hidden.copy_(work()), hidden


def _segments(slots: list[int]) -> AdapterSegments:
    """One decode row each, of a mix of all slots so far."""
    mixes = [tuple((slot, 0.5 + slot) for slot in slots[: i + 1]) for i in range(len(slots))]
    return wearing([(1, mix) for mix in mixes], num_decode=len(mixes))


def _world(path: Path, capture: _Rerun | None) -> list[Tensor]:
    """Prefill of three sequences, then decode steps of three, two and one of them, with and without adapters.

    capture: None for the reference's ops one by one.
    """
    ops = load_backend("reference" if capture is None else "triton", "cpu")
    harness = Harness(path, ops=ops, group_size=1, num_pages=96, page_bytes=1 << 15)
    if capture is not None:
        harness.decoder = GraphedDecoder(harness.decoder, capture)
    tiles = write_adapters(harness, 2)
    a, b, c = (harness.sequence(list(range(3, 3 + n))) for n in (20, 9, 5))
    out = harness.step([(a, 19), (b, 8), (c, 4)])
    for running in ([a, b, c], [a, b], [c], [b, a, c]):
        for adapters in (None, _segments([0]), _segments([1, 0][: len(running)])):
            out += harness.step([(s, 1) for s in running], adapters=adapters, tiles=tiles)
            for s in running:
                s.ids.append(int(out[-1].argmax()) % 50 + 2)
    return [logits.clone() for logits in out]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_same_as_the_reference_one_op_at_a_time(family: str, tmp_path: Path) -> None:
    path = make_tiny_model(family, tmp_path / "model", num_hidden_layers=1)
    capture = _Rerun()
    graphed, eager = _world(path, capture), _world(path, None)
    assert len(graphed) == len(eager)
    for got, expected in zip(graphed, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # Rows 4, 2 and 1; without adapters, with one tile, and with mixes of two: no step captures anew.
    assert 0 < capture.captured <= 9


def _own_world(path: Path, capture: _Rerun | None) -> list[Tensor]:
    """Decode steps of three sequences, of which none, the first or two wear rows of their own."""
    ops = load_backend("reference" if capture is None else "triton", "cpu")
    harness = Harness(path, ops=ops, group_size=1, num_pages=96, page_bytes=1 << 15)
    if capture is not None:
        harness.decoder = GraphedDecoder(harness.decoder, capture)
    vocab = harness.config.vocab_size
    tiles = write_own_rows(harness, write_adapters(harness, 2), 1, (7, 8, 30, vocab))
    a, b, c = (harness.sequence([5, 7]) for _ in range(3))
    out = harness.step([(a, 2), (b, 2), (c, 2)])
    for s in (a, b, c):
        s.ids.append(30)
    for mixes in ([], [1], [0, 1], [1, 1], [0]):
        adapters = wearing([(1, ((slot, 1.0),)) for slot in mixes], num_decode=len(mixes)) if mixes else None
        out += harness.step([(s, 1) for s in (a, b, c)], adapters=adapters, tiles=tiles)
        for s, token in zip((a, b, c), (8, 7, 9), strict=True):
            s.ids.append(token)
    return [logits.clone() for logits in out]


def test_rows_of_an_adapters_own_are_in_a_graph_of_their_own(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    capture = _Rerun()
    graphed, eager = _own_world(path, capture), _own_world(path, None)
    for got, expected in zip(graphed, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert eager[6].shape[1] == eager[0].shape[1] + 1, "the step's logits have a column for the added token"
    assert capture.captured == 3, "without adapters, with rows of their own, and without these"


def test_sizes_are_powers_of_two_and_apart_by_adapters() -> None:
    """A base-only step launches no adapter kernel, so it is a graph of its own."""
    assert Size(4, 256, 0, 0) != Size(4, 256, 1, 1)
    assert replace(Size(4, 256, 1, 1), tiles=0, mix=0) == Size(4, 256, 0, 0)
