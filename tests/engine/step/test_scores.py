"""What processed log-probabilities are of: as transformers' own processors leave the logits."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraplex.server.engine.request import SamplingParams
from loraplex.server.engine.step.scores import drawn_from

CASES = {
    "nothing": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(5))
def test_as_transformers_has_it(case: str, seed: int) -> None:
    params = SamplingParams(max_tokens=1, **CASES[case])
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(seed)) * 3
    processors = LogitsProcessorList()
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    expected = processors(torch.zeros(1, 1, dtype=torch.int64), logits)[0].log_softmax(0)
    found = drawn_from(logits[0], params).log_softmax(0)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_greedy_draw_is_of_the_logits_themselves() -> None:
    logits = torch.randn(50)
    assert torch.equal(drawn_from(logits, SamplingParams(max_tokens=1, temperature=0.0, top_k=2)), logits)
