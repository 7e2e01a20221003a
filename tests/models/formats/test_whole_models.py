"""Whole models in formats of other people's: linears of one input fused, on both backends, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.kernels.quantized import Activations
from loraplex.kernels.select import load_backend
from tests.support.harness import Harness
from tests.support.quantized_models import KINDS, make_quantized_model
from tests.support.tiny import VOCAB_SIZE

TOLERANCE = 2e-3
"""Of the logits' spread, with exact activations in fp32; found: under 1e-5."""

BACKENDS = ["reference", "cpu"]


def assert_same_logits(folder: Path, oracle: Any, backend: str) -> None:
    """A prompt in one chunk, and seven steps of one token."""
    harness = Harness(folder, ops=load_backend(backend, "cpu"), activations=Activations.EXACT)
    ids = torch.randint(VOCAB_SIZE, (37,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].float()
    sequence = harness.sequence(ids[:30])
    found = [*harness.step([(sequence, 30)])]
    for token in ids[30:]:
        sequence.ids.append(token)
        found += harness.step([(sequence, 1)])
    assert expected.std() > 0.2
    assert (torch.cat(found) - expected).abs().max() < TOLERANCE * expected.std()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "family"), [*((kind, "llama") for kind in KINDS), ("gptq, 8 bits", "phi3")])
def test_logits_are_those_of_the_values(tmp_path: Path, kind: str, family: str, backend: str) -> None:
    """gptq, ordered: q, k and v have inputs in other orders each, so they stay parts. phi3: they are one tensor."""
    folder, oracle = make_quantized_model(kind, family, tmp_path, num_attention_heads=4, num_key_value_heads=2)
    assert_same_logits(folder, oracle, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["w4a16", "w8a8", "gptq, 8 bits", "fp8 in ragged blocks"])
def test_quantised_embedding_and_head(tmp_path: Path, kind: str, tied: bool, backend: str) -> None:
    folder, oracle = make_quantized_model(kind, "llama", tmp_path, tables=True, tie_word_embeddings=tied)
    assert_same_logits(folder, oracle, backend)
