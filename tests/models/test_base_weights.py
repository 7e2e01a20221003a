"""What adapters are told of the base's own weights, against the checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraplex.kernels.ops import Backend
from loraplex.kernels.select import load_backend
from loraplex.server.models.base_weights import BaseWeights
from loraplex.server.models.checkpoint import WeightsError
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.weights import load_checkpoint
from tests.support.tiny import make_tiny_model

Made = tuple[BaseWeights, ModelConfig, dict[str, Tensor]]


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> Backend:
    return load_backend(request.param, "cpu")


@pytest.fixture
def make(tmp_path: Path, ops: Backend) -> Callable[..., Made]:
    def make(family: str, dtype: torch.dtype = torch.float32) -> Made:
        path = make_tiny_model(family, tmp_path)
        config = ModelConfig.from_hf(path)
        weights = load_checkpoint(open_checkpoint(path), config, ops, dtype)
        return (
            BaseWeights(config, weights, open_checkpoint(path), ops.beside()),
            config,
            load_file(path / "model.safetensors"),
        )

    return make


def test_biases(make: Callable[..., Made]) -> None:
    base, config, tensors = make("llama_biased")
    for layer in range(config.num_layers):
        for projection in config.projections():
            wanted = tensors[f"model.layers.{layer}.{projection.name}.bias"]
            assert torch.equal(base.bias(layer, projection.name), wanted)  # type: ignore[arg-type]


def test_a_base_with_few_biases(make: Callable[..., Made]) -> None:
    base, config, _ = make("qwen2")
    assert {p.name for p in config.projections() if base.bias(0, p.name) is not None} == {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
    }


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_products(make: Callable[..., Made], ops: Backend, family: str, dtype: torch.dtype) -> None:
    """Of the weight as it is computed with: rounded to the compute dtype."""
    base, config, tensors = make(family, dtype)
    for layer in range(config.num_layers):
        for projection in config.projections():
            weight = tensors[f"model.layers.{layer}.{projection.name}.weight"].to(dtype).double()
            torch.testing.assert_close(base.squared_norms(layer, projection.name).double(), weight.square().sum(1))
            a = torch.randn(projection.in_features, 5, generator=torch.Generator().manual_seed(layer)).T
            found = base.products(layer, projection.name, a)
            assert found.dtype == torch.float32
            close = 1e-5 if dtype == torch.float32 or ops.name == "cpu" else 2.0**-8  # a library rounds to bf16
            torch.testing.assert_close(found.double(), a.to(dtype).double() @ weight.T, atol=close, rtol=close)


def test_a_weight_as_the_checkpoint_has_it(make: Callable[..., Made]) -> None:
    """Whatever it is computed in."""
    base, config, tensors = make("phi3", torch.bfloat16)
    for projection in config.projections():
        found = base.weight(1, projection.name)
        assert found is not None
        assert torch.equal(found, tensors[f"model.layers.1.{projection.name}.weight"].float())


def test_a_checkpoint_that_is_gone(make: Callable[..., Made], tmp_path: Path) -> None:
    base, *_ = make("llama")
    first = base.squared_norms(0, "self_attn.q_proj")
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(base.squared_norms(0, "self_attn.q_proj"), first)
    with pytest.raises(WeightsError):
        base.squared_norms(1, "self_attn.q_proj")
