"""Kinds that come to one part for each module are read as PEFT reads them: the oracle is the installed PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.adapters.image.tiles import BaseLayout, BiasDelta, DenseDelta, InputTurn, LowRank, OutputScale, Part
from loraplex.adapters.tiers.host import most_bytes
from loraplex.adapters.tiers.inbox import host_bytes
from loraplex.adapters.tiers.reader import AdapterReader
from tests.support.adapter_reading import ParsedAdapter, read_adapter
from tests.support.peft_adapters import (
    BASES,
    MODULE_KIND_CASES,
    PeftAdapter,
    layout_of,
    make_peft_adapter,
    served_base_of,
    sum_of_windows,
)
from tests.support.tiny import tiny_hf_model

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of much that is meant here


@pytest.fixture(scope="module")
def bases() -> dict[str, Any]:
    return {family: tiny_hf_model(family, **fields) for family, fields in BASES.items()}


def read(base: Any, folder: Path, dtype: torch.dtype = torch.float32) -> ParsedAdapter:
    return read_adapter(folder, served_base_of(base, layout_of(base, dtype=dtype)))


def changes_of(base: Any, adapter: PeftAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    """By path: how far the weight and the bias that PEFT computes with are from the base's, fp32."""
    found = {}
    modules = adapter.modules()
    for path, linear in base.named_modules():
        if not isinstance(linear, torch.nn.Linear) or path == "lm_head":
            continue
        own = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        if path in modules:
            module = modules[path]
            with torch.no_grad():
                zero = module(torch.zeros(1, 1, linear.in_features), **adapter.told)[0, 0]
                weight = (module(torch.eye(linear.in_features)[None], **adapter.told)[0] - zero).T
            found[path] = weight - linear.weight.detach(), zero - own
        elif linear.bias is not None:
            bias = adapter.model.get_base_model().get_submodule(path).bias.detach() - own
            if bias.any():  # which the adapter trained beside its targets
                found[path] = torch.zeros_like(linear.weight), bias
    return found


def change_of(parts: Sequence[Part], weight: Tensor, layout: BaseLayout) -> Tensor:
    """How far from W the weight is that parts of one module come to: s W R + D + B A, R the identity and its blocks."""
    whole = weight
    for part in sorted(parts, key=lambda part: (not isinstance(part, InputTurn), not isinstance(part, OutputScale))):
        match part:
            case InputTurn():
                count = weight.shape[1] // part.blocks.shape[1]
                whole = whole @ (torch.eye(weight.shape[1]) + torch.block_diag(*part.blocks.expand(count, -1, -1))).T
            case OutputScale():
                whole = part.values[:, None] * whole
            case DenseDelta():
                whole = whole + part.delta
            case LowRank():
                whole = whole + sum_of_windows([part], layout)
            case _:
                raise AssertionError(part)
    return whole - weight


def check_against_peft(base: Any, adapter: PeftAdapter) -> ParsedAdapter:
    """Every module PEFT adapts and no other, with the change of its weight or bias that PEFT computes with."""
    parsed = read(base, adapter.folder)
    layout, changes = layout_of(base), changes_of(base, adapter)
    found: dict[str, list[Part]] = {}
    for part in parsed.parts:
        found.setdefault(f"model.layers.{part.layer}.{part.projection.name}", []).append(part)
    assert found.keys() == changes.keys()
    for path, (weight, bias) in changes.items():
        deltas = [part.delta for part in found[path] if isinstance(part, BiasDelta)]
        torch.testing.assert_close(sum(deltas, torch.zeros(len(weight))), bias, atol=2e-6, rtol=1e-5)
        others = [part for part in found[path] if not isinstance(part, BiasDelta)]
        if not others:
            assert float(weight.abs().max()) < 1e-6
            continue
        assert float(weight.abs().max()) > 0.01
        made = change_of(others, base.get_submodule(path).weight.detach(), layout)
        torch.testing.assert_close(made, weight, atol=2e-6, rtol=1e-5)
    if len(found) == len(parsed.parts):  # no windows, whose ranks are not the module's
        assert parsed.rank == max(part.a.shape[0] if isinstance(part, LowRank) else 0 for part in parsed.parts)
    info = AdapterReader(served_base_of(base, layout_of(base)), 1 << 30).examine(str(adapter.folder))
    assert (info.num_pages, info.nbytes) == (len(parsed.image.pages), parsed.image.nbytes)
    assert host_bytes(parsed.image) <= most_bytes(layout_of(base), info)
    return parsed


@pytest.mark.parametrize("case", MODULE_KIND_CASES)
def test_read_as_peft_computes(bases: dict[str, Any], tmp_path: Path, case: str) -> None:
    family, options = MODULE_KIND_CASES[case]
    check_against_peft(bases[family], make_peft_adapter(bases[family], tmp_path, **options))
