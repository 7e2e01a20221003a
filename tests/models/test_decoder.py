"""What the decoder asks of the ops: where adapters act, what a step without them costs, what is done once per step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.kernels.constants import ALIGN, TileKind
from loraplex.kernels.records import AdapterSegments, Projection, TileTable
from loraplex.kernels.reference import ReferenceBackend
from loraplex.server.models.config import Site
from loraplex.server.models.decoder import Decoder
from tests.support.harness import Harness
from tests.support.tiny import VOCAB_SIZE, load_oracle, make_tiny_model

RANK = 2


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def one_segment(stop: int) -> AdapterSegments:
    """Tokens before `stop` wear slot 0, the rest the base."""
    return AdapterSegments(
        indptr=torch.tensor([0, stop], dtype=torch.int32),
        mix_ptr=torch.tensor([0, 1], dtype=torch.int32),
        mix_slot=torch.tensor([0], dtype=torch.int32),
        mix_weight=torch.ones(1),
        bounds=(0, stop),
        mixes=(((0, 1.0),),),
        num_decode_segments=0,
    )


@dataclass
class Written:
    """An adapter put into the arena by hand, one tile per projection and layer, and the same as dense matrices."""

    table: TileTable
    dense: dict[str, Tensor] = field(default_factory=dict)  # "layers.0.mlp.up_proj": what it adds to the weight


def write_adapter(harness: Harness, seed: int) -> Written:
    config, generator = harness.config, torch.Generator().manual_seed(seed)
    ranges = torch.zeros(1, config.num_layers, config.num_sites, 2, dtype=torch.int32)
    tiles: list[list[int]] = []
    written = Written(TileTable(ranges, ranges, ranges, ranges))
    for layer in range(config.num_layers):
        for site in Site:
            ranges[0, layer, site] = len(tiles)
            for projection in (p for p in config.projections() if p.site == site):
                a = torch.randn(RANK, projection.in_features, generator=generator) * 0.1
                b = torch.randn(RANK, projection.out_features, generator=generator)
                tiles.append(place(harness, a, b, projection))
                written.dense[f"layers.{layer}.{projection.name}"] = b.T @ a
            ranges[0, layer, site, 1] = len(tiles)
    rows = torch.tensor(tiles, dtype=torch.int32)
    written.table = TileTable(ranges, rows, ranges, rows)
    return written


def place(harness: Harness, a: Tensor, b: Tensor, projection: Projection) -> list[int]:
    """Write A and B each to the start of a page of their own; the tile that points at them."""
    offsets = []
    for part in (a, b):
        (page,) = harness.take_pages(1)
        data = part.contiguous().view(-1).view(torch.uint8)
        harness.arena[page, : len(data)] = data
        offsets.append(page * harness.page_bytes // ALIGN)
    window = (projection.out_start, projection.out_features)
    return [*offsets, RANK, *window, TileKind.LOW_RANK, 0, projection.in_features]


@pytest.mark.parametrize("family", ["llama_biased", "qwen2", "gemma2", "gemma3", "phi4mini"])
def test_an_adapter_is_a_merged_weight(tmp_path: Path, family: str) -> None:
    """A low-rank update of every projection of every layer, beside a sequence without any, against transformers with
    the update added into its weights."""
    path = make_tiny_model(family, tmp_path)
    harness = Harness(path, num_pages=160, page_bytes=RANK * 192 * 4)
    adapter = write_adapter(harness, seed=5)
    with_adapter, without = harness.sequence(tokens(21, 1)), harness.sequence(tokens(13, 2))
    found = harness.step([(with_adapter, 21), (without, 13)], adapters=one_segment(21), tiles=adapter.table)
    oracle = load_oracle(path)
    with torch.no_grad():
        base = oracle(torch.tensor([without.ids])).logits[0]
        unadapted = oracle(torch.tensor([with_adapter.ids])).logits[0]
        for name, update in adapter.dense.items():
            oracle.model.get_submodule(name).weight += update
        merged = oracle(torch.tensor([with_adapter.ids])).logits[0]
    assert (merged - unadapted).abs().mean() > 0.1
    torch.testing.assert_close(found[0], merged, atol=3e-4, rtol=0)
    torch.testing.assert_close(found[1], base, atol=3e-4, rtol=0)


class CountingOps(ReferenceBackend):
    """The reference ops, counted by name."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.calls: dict[str, int] = {}
        self.rotations: dict[int, Tensor] = {}  # by address; kept, so that no address is used twice

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and callable(getattr(ReferenceBackend, name, None)):
            calls = object.__getattribute__(self, "calls")
            calls[name] = calls.get(name, 0) + 1
        return object.__getattribute__(self, name)

    def rope_store_kv(self, qkv: Tensor, cos: Tensor, *rest: Any) -> Tensor:
        self.rotations[cos.data_ptr()] = cos
        return super().rope_store_kv(qkv, cos, *rest)


def test_calls_of_a_step(tmp_path: Path) -> None:
    """Without adapters not one call is made for them; with some, one per site and layer."""
    ops = CountingOps()
    harness = Harness(make_tiny_model("llama", tmp_path, num_hidden_layers=3), ops=ops, num_pages=64)
    sequence = harness.sequence(tokens(9, 1))
    ops.calls.clear()
    harness.step([(sequence, 4)])
    wanted = {"embed": 1, "rms_norm": 3 * 2 + 1, "linear": 3 * 4, "rope_store_kv": 3, "attention": 3, "act_mul": 3}
    wanted |= {"take_rows": 2, "logits": 1}
    assert ops.calls == wanted
    adapter = write_adapter(harness, seed=1)
    ops.calls.clear()
    harness.step([(sequence, 5)], adapters=one_segment(5), tiles=adapter.table)
    assert ops.calls == {**wanted, "adapter_add_": 3 * 7}


@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("gemma3", 2)])
def test_rotations_are_made_once_per_step(tmp_path: Path, family: str, kinds: int) -> None:
    ops = CountingOps()
    harness = Harness(make_tiny_model(family, tmp_path), ops=ops)
    harness.step([(harness.sequence(tokens(7, 1)), 7)])
    assert len(ops.rotations) == kinds


def test_a_layer_without_pages_is_refused(tmp_path: Path) -> None:
    harness = Harness(make_tiny_model("llama", tmp_path))
    with pytest.raises(ValueError, match="1 KV layers for a model of 2"):
        Decoder(harness.config, harness.weights, harness.ops, harness.kv_layers[:1], harness.arena)
