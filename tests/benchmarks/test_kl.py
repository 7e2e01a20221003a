"""The divergence of quantised bases: against torch's own, and the ways that are measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from loraplex.benchmarks import kl
from loraplex.kernels.quantized import Activations
from loraplex.kernels.select import load_backend
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.opening import open_checkpoint
from tests.support.tiny import load_oracle, make_tiny_model


def test_divergence_is_torchs() -> None:
    found, expected = torch.randn(2, 200, 50, generator=torch.Generator().manual_seed(0))
    divergence = kl.Divergence.of(found, expected)
    nats = kl_div(found.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert divergence.mean == pytest.approx(float(nats.mean()), rel=1e-4)
    assert divergence.high == pytest.approx(float(nats.quantile(0.99)), rel=1e-4)
    assert divergence.same == pytest.approx(float((found.argmax(-1) == expected.argmax(-1)).float().mean()))
    assert kl.Divergence.of(expected, expected) == kl.Divergence(0.0, 0.0, 1.0)


def test_logits_of_a_text_in_pieces_are_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "LENGTH", 20)
    path = make_tiny_model("llama", tmp_path)
    ids = torch.randint(320, (50,), generator=torch.Generator().manual_seed(1))
    base, config = open_checkpoint(path), ModelConfig.from_hf(path)
    found = kl.logits(base, config, load_backend("cpu", "cpu"), torch.float32, None, ids)
    with torch.no_grad():
        wanted = torch.cat([load_oracle(path)(part[None]).logits[0] for part in ids.split(20)])
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_ways_to_keep_a_base(tmp_path: Path) -> None:
    base = open_checkpoint(make_tiny_model("llama", tmp_path))
    ways = list(kl.ways(base))
    names = {frozenset(way.name.partition(",")[0].split(" + ")) for way in ways}
    assert names == {frozenset(kinds) for kinds in (["dense"], ["int8"], ["int4", "int8"], ["nf4"])}
    assert [way.activations for way in ways] == [None, *Activations, *Activations, *Activations]
    quantised = ways[1].checkpoint
    assert [way.checkpoint for way in kl.ways(quantised)] == [quantised] * len(Activations)
    dense = kl.Dequantised(quantised)
    assert all(stored.format is None for stored in dense.tensors.values())
    assert all(dense.read(name).shape == stored.shape for name, stored in dense.tensors.items())


def test_the_text_is_long_enough() -> None:
    assert len(kl.text()) > 16 * kl.TOKENS
