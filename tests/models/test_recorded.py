"""The recorded pass of the CPU backend: the same bits as its ops one by one, the same answers as the reference."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.ops import Backend
from loraplex.kernels.records import AdapterSegments
from loraplex.server.models.recorded import RecordedDecoder, record
from tests.support.harness import Harness
from tests.support.harness_adapters import wearing, write_adapters
from tests.support.tiny import FAMILIES, make_tiny_model


class _World:
    """One model on one backend; every world made from the same seed computes the same steps."""

    def __init__(self, path: Path, ops: Backend | None, *, recorded: bool, dtype: torch.dtype = torch.float32) -> None:
        self.harness = Harness(path, ops=ops, dtype=dtype, group_size=1, page_bytes=1 << 15)
        if recorded:
            self.harness.decoder = record(self.harness.decoder, max_tokens=64, max_rows=64)
            assert isinstance(self.harness.decoder, RecordedDecoder)
        self.tiles = write_adapters(self.harness, 1)

    def run(self) -> list[torch.Tensor]:
        """Prefill, chunked prefill beside decode, decode; with and without adapters. The logits of every step."""
        rng = random.Random(3)
        a, b, c = (self.harness.sequence([rng.randrange(2, 60) for _ in range(n)]) for n in (23, 40, 9))
        out = self.harness.step([(a, 22), (b, 17), (c, 8)])
        out += self.harness.step([(a, 1), (b, 20), (c, 1)], adapters=_segments((1, 20)), tiles=self.tiles)
        for s in (a, b, c):
            s.ids += [rng.randrange(2, 60) for _ in range(3)]
        for n in (1, 2):
            out += self.harness.step([(a, n), (b, n), (c, 1)], adapters=_segments((n, 0)), tiles=self.tiles)
        return [logits.clone() for logits in out]


def _segments(counts: tuple[int, int]) -> AdapterSegments:
    """Slot 0 at weight 1 for the first tokens as decode rows, at weight 0.5 for the next as a prefill chunk."""
    decode, prefill = counts
    chunk = [(prefill, ((0, 0.5),))] if prefill else []
    return wearing([(decode, ((0, 1.0),)), *chunk], num_decode=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_as_one_by_one_and_same_answers_as_the_reference(family: str, tmp_path: Path) -> None:
    path = make_tiny_model(family, tmp_path / "model")
    recorded = _World(path, CpuBackend(), recorded=True).run()
    one_by_one = _World(path, CpuBackend(), recorded=False).run()
    reference = _World(path, None, recorded=False).run()
    spread = max(float(logits.abs().max()) for logits in reference)
    for got, eager, expected in zip(recorded, one_by_one, reference, strict=True):
        assert torch.equal(got, eager)
        torch.testing.assert_close(got, expected, rtol=0.0, atol=2e-5 * spread)


def test_threads_do_not_change_bits(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    one, three = (_World(path, CpuBackend(threads=n), recorded=True, dtype=torch.bfloat16).run() for n in (1, 3))
    assert all(torch.equal(x, y) for x, y in zip(one, three, strict=True))
