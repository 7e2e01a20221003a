"""The same tests run over every backend that can run here."""

from __future__ import annotations

import pytest
import torch

from loraplex.kernels.backend import Backend, load_backend

BACKENDS = ["reference-cpu"] + (["reference-cuda"] if torch.cuda.is_available() else [])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    name, device = request.param.rsplit("-", 1)
    return load_backend(name, device)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
