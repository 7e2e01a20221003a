"""Rows as the sampler sees them: without tokens to compute and pages to put them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loraplex.server.engine.policy.rows import Row, SamplingState
from loraplex.server.engine.request import SamplingParams


def drawing_row(params: SamplingParams, position: int, prompt: Sequence[int], output: Sequence[int]) -> Row:
    """One that draws the token at `position`."""
    return Row(0, position - 1, (), position, (), (), True, 1, SamplingState(params, prompt, output, None), None)


def with_params(row: Row, **changes: Any) -> Row:
    """The same row with other sampling parameters."""
    assert row.sampling is not None
    return row._replace(sampling=replace(row.sampling, params=replace(row.sampling.params, **changes)))
