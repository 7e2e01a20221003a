"""The widths real models have, and adapters of every rank up to 256, packed and loaded as the server does it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraplex.adapters.image.tiles import BaseLayout, LowRank
from loraplex.adapters.image.writing import pack
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.adapters.tiers.pages import PagePool
from loraplex.kernels.ops import Backend
from loraplex.kernels.records import AdapterSegments, AdapterStep, Projection, element_bytes
from tests.support.rounding import assert_near, exact, rounded


@pytest.mark.parametrize(("n_in", "n_out"), [(576, 960), (640, 256), (896, 1152), (896, 151), (4096, 192), (192, 4096)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_linear(backend: Backend, dtype: torch.dtype, n_in: int, n_out: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(n_in)
    x = torch.randn(tokens, n_in, generator=generator).to(backend.device, dtype)
    w = torch.randn(n_out, n_in, generator=generator).to(backend.device, dtype)
    expected, terms = exact(x) @ exact(w).T, np.abs(exact(x)) @ np.abs(exact(w)).T
    assert_near(backend.linear(x, backend.pack_linear(w)), expected, terms)


CASES = [(640, 256, 4), (896, 128, 100), (896, 1216, 16), (576, 64, 128), (576, 64, 256), (4096, 512, 16)]


@pytest.mark.parametrize(("n_in", "n_out", "rank"), CASES)
@pytest.mark.parametrize("decode", [True, False])
def test_adapter(backend: Backend, dtype: torch.dtype, n_in: int, n_out: int, rank: int, decode: bool) -> None:
    projection = Projection("q", 0, n_in, 0, n_out, False)
    row = n_in * element_bytes(dtype)
    layout = BaseLayout("base", 1, (projection,), -(-90 * row // 64) * 64, dtype)
    generator = torch.Generator().manual_seed(rank)
    a = (torch.randn(rank, n_in, generator=generator) * n_in**-0.5).to(dtype)
    b = torch.randn(n_out, rank, generator=generator).to(dtype)
    image = pack([LowRank(0, projection, a, b, 1.0)], layout)
    pages = len(image.pages) + 1
    arena = torch.full((pages, layout.page_bytes), 0xFF, dtype=torch.uint8, device=backend.device)  # NaN
    residency = DeviceTier(arena, PagePool(pages), layout)
    assert residency.load("one", image)
    slot = residency.slot_of("one")
    assert slot is not None

    tokens = 5
    x = torch.randn(tokens, n_in, generator=generator).to(dtype)
    y = torch.randn(tokens, n_out, generator=generator).to(dtype)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=backend.device)

    segments = AdapterSegments(
        indptr=ints(0, tokens),
        mix_ptr=ints(0, 1),
        mix_slot=ints(slot),
        mix_weight=torch.tensor([0.5], device=backend.device),
        bounds=(0, tokens),
        mixes=(((slot, 0.5),),),
        num_decode_segments=int(decode),
    )
    found = backend.adapter_add_(
        y.clone().to(backend.device), x.to(backend.device), 0, 0, AdapterStep(arena, residency.table, segments)
    )
    u, b64 = rounded(exact(x) @ exact(a).T, dtype), exact(b)
    terms = 0.5 * np.abs(exact(x)) @ np.abs(exact(a)).T @ np.abs(b64).T
    # An element of u that is rounded the other way: at most one in a few, so a tenth of all at once.
    wobble = 0.05 * np.abs(u) @ np.abs(b64).T
    assert_near(found, exact(y) + 0.5 * u @ b64.T, terms, wobble)
