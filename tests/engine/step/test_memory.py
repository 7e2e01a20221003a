"""How memory is divided: who gets what, what is refused, and that the counts are those of what is really allocated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.kernels import hugepages
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.kernels.cpu import weights as cpu_weights
from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.cpu.program import CpuProgram
from loraplex.kernels.cpu.quantised import layout
from loraplex.kernels.quantized import WeightFormat
from loraplex.kernels.select import load_backend
from loraplex.server.engine.policy.kv_groups import kv_groups, peak_pages
from loraplex.server.engine.step.arena import allocate_arena, kv_layers
from loraplex.server.engine.step.memory import STAGING_BYTES, NotEnoughMemory, page_bytes, plan_memory
from loraplex.server.engine.step.scratch import Demand, Surroundings, logit_rows, scratch_bytes
from loraplex.server.engine.step.system_memory import resident_memory
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.quantizing import SCHEMES, QuantizingCheckpoint
from loraplex.server.models.recorded import RecordedDecoder, record
from loraplex.server.models.weight_sizes import packed_parts, resident_bytes
from loraplex.server.models.weights import load_checkpoint
from tests.support.checkpoints import HeldCheckpoint
from tests.support.configs import SMOLLM2, TINY
from tests.support.tiny import make_tiny_model

GIB, MIB = 1 << 30, 1 << 20
BF16 = torch.bfloat16
WEIGHTS = 269_000_000
DEMAND = Demand(max_model_len=2048, max_num_seqs=16, token_budget=256, host_store_bytes=20 * MIB)
PROCESS = Surroundings(process_bytes=400 * MIB, loading_bytes=108 * MIB, threads=2, lean=True)
GPU = Surroundings(shared=False, process_bytes=400 * MIB)


def test_page_of_smollm2_is_the_kv_page() -> None:
    assert page_bytes(SMOLLM2, BF16, kv_groups(SMOLLM2.windows)) == 30 * 2 * 3 * 16 * 64 * 2 == 360 * 1024


def test_a_page_is_no_shorter_than_an_adapters_rows() -> None:
    narrow = replace(TINY, windows=(None,) * 3, num_layers=1, head_dim=2)
    size = page_bytes(narrow, torch.float32, kv_groups(narrow.windows[:1]))
    assert size % 64 == 0
    assert size >= 4 * 96 * (1 + 96 / 64)  # down_proj: a row of A and its share of B


class TestTotals:
    def test_memory_given_is_the_total(self) -> None:
        plan = plan_memory(SMOLLM2, BF16, GIB, WEIGHTS, DEMAND, available_bytes=0, around=PROCESS)
        assert GIB - plan.page_bytes < plan.total_bytes <= GIB
        assert plan.total_bytes == sum(nbytes for _, nbytes, _ in plan.parts())
        assert plan.process_bytes == 400 * MIB
        assert plan.host_store_bytes == 20 * MIB
        assert plan.max_model_len == 2048

    def test_a_device_has_a_budget_of_its_own(self) -> None:
        plan = plan_memory(SMOLLM2, BF16, GIB, WEIGHTS, DEMAND, available_bytes=0, around=GPU)
        assert GIB - plan.page_bytes < plan.weights_bytes + plan.arena_bytes + plan.scratch_bytes <= GIB
        assert plan.total_bytes == plan.weights_bytes + plan.arena_bytes + plan.scratch_bytes
        assert plan.host_bytes == 420 * MIB
        open_size = replace(DEMAND, host_store_bytes=None)
        assert plan_memory(SMOLLM2, BF16, GIB, WEIGHTS, open_size, 0, GPU).host_store_bytes == 2 * GIB

    def test_default_is_what_can_be_used(self) -> None:
        plan = plan_memory(SMOLLM2, BF16, None, WEIGHTS, DEMAND, available_bytes=1000 * GIB)
        kv = 16 * 2048 // BLOCK_SIZE
        assert kv < plan.num_pages < 2 * kv + STAGING_BYTES // plan.page_bytes, "not all there is"

    def test_default_leaves_half_of_the_machine(self) -> None:
        plan = plan_memory(SMOLLM2, BF16, None, WEIGHTS, DEMAND, available_bytes=2 * GIB)
        assert GIB - plan.page_bytes < plan.total_bytes <= GIB

    @settings(max_examples=200)
    @given(
        st.integers(WEIGHTS, 8 * GIB),
        st.integers(1, 64),
        st.integers(1, 2048),
        st.none() | st.integers(1, 8192),
        st.none() | st.integers(1, GIB),
        st.sampled_from([Surroundings(), PROCESS, GPU]),
    )
    def test_a_plan_never_exceeds_what_was_given(
        self, memory: int, seqs: int, budget: int, length: int | None, store: int | None, around: Surroundings
    ) -> None:
        demand = Demand(length, seqs, budget, store)
        try:
            plan = plan_memory(SMOLLM2, BF16, memory, WEIGHTS, demand, 0, around)
        except NotEnoughMemory:
            return
        assert plan.total_bytes <= memory
        assert plan.scratch_bytes == scratch_bytes(SMOLLM2, BF16, plan.max_model_len, demand, around)
        assert plan.num_pages > peak_pages(plan.groups, BLOCK_SIZE, plan.max_model_len, budget)
        assert store is None or plan.host_store_bytes == store
        if around.shared:
            assert plan.process_bytes + WEIGHTS + around.loading_bytes <= memory

    def test_what_the_table_says_fits_does(self) -> None:
        plan = plan_memory(SMOLLM2, BF16, GIB, WEIGHTS, DEMAND, 0, PROCESS)
        assert plan.kv_tokens == plan.num_pages * BLOCK_SIZE
        # rank 16 on q, k, v, o, gate, up and down of 30 layers, two bytes each
        sizes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
        nbytes = 2 * 16 * 30 * sum(a + b for a, b in sizes)
        assert plan.typical_adapters == plan.num_pages // (-(-nbytes // plan.page_bytes) + 1)
        text = " ".join(remark for _, _, remark in plan.parts())
        for number in (plan.num_pages, plan.kv_tokens, plan.typical_adapters):
            assert f"{number:,}" in text


class TestTooLittle:
    def test_context_is_cut_where_it_was_left_open(self) -> None:
        demand = replace(DEMAND, max_model_len=None)
        assert plan_memory(SMOLLM2, BF16, 4 * GIB, WEIGHTS, demand, 0).max_model_len == 8192
        little = WEIGHTS + 280 * MIB
        plan = plan_memory(SMOLLM2, BF16, little, WEIGHTS, demand, 0)
        assert 16 < plan.max_model_len < 8192
        assert plan.num_pages >= -(-plan.max_model_len // BLOCK_SIZE) + 1
        assert plan.total_bytes <= little
        blocks = plan.max_model_len // BLOCK_SIZE
        assert 2 * blocks <= plan.num_pages <= 2 * blocks + plan.typical_pages + 4, (
            "as much again for others, and an adapter"
        )

    def test_context_is_cut_to_what_fits_at_all(self) -> None:
        with pytest.raises(NotEnoughMemory) as caught:
            plan_memory(SMOLLM2, BF16, 1000, WEIGHTS, replace(DEMAND, max_model_len=64), 0)
        least = int(str(caught.value).split("--memory ")[1].split(",")[0])
        plan = plan_memory(SMOLLM2, BF16, least, WEIGHTS, replace(DEMAND, max_model_len=None), 0)
        assert (plan.max_model_len, plan.num_pages) == (64, 5)

    @pytest.mark.parametrize("around", [Surroundings(), PROCESS, GPU], ids=["engine", "process", "gpu"])
    @pytest.mark.parametrize("store", [None, 30 * MIB])
    def test_it_is_refused_with_numbers_that_hold(self, around: Surroundings, store: int | None) -> None:
        demand = replace(DEMAND, host_store_bytes=store)
        with pytest.raises(NotEnoughMemory, match=r"one sequence of 2048 tokens.*45\.35 MiB") as caught:
            plan_memory(SMOLLM2, BF16, 280_000_000, WEIGHTS, demand, 0, around)
        least = int(str(caught.value).split("--memory ")[1].split(",")[0])
        assert plan_memory(SMOLLM2, BF16, least, WEIGHTS, demand, 0, around).num_pages >= 129
        with pytest.raises(NotEnoughMemory):
            plan_memory(SMOLLM2, BF16, least - 1, WEIGHTS, demand, 0, around)

    def test_weights_must_fit_while_they_are_read(self) -> None:
        """A large vocabulary's table lies in memory twice for a moment."""
        around = replace(PROCESS, loading_bytes=GIB)
        with pytest.raises(NotEnoughMemory) as caught:
            plan_memory(SMOLLM2, BF16, GIB, WEIGHTS, DEMAND, 0, around)
        assert f"--memory {400 * MIB + WEIGHTS + GIB}," in str(caught.value)

    def test_nothing_at_all_fits(self) -> None:
        with pytest.raises(NotEnoughMemory):
            plan_memory(SMOLLM2, BF16, 1000, WEIGHTS, replace(DEMAND, max_model_len=None), 0)


class TestCounts:
    """Against what is really allocated."""

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
    @pytest.mark.parametrize("dtype", [torch.float32, BF16])
    def test_packed_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
    ) -> None:
        path = make_tiny_model(family, tmp_path / "model")
        config, ops = ModelConfig.from_hf(path), load_backend("cpu", "cpu")
        shapes: list[tuple[int, int]] = []
        pack = ops.pack_linear
        monkeypatch.setattr(ops, "pack_linear", lambda w: shapes.append(tuple(w.shape)) or pack(w))  # type: ignore[func-returns-value]
        weights = load_checkpoint(open_checkpoint(path), config, ops, dtype)
        parts = packed_parts(open_checkpoint(path), config, weights.head is not weights.embedding)
        assert parts == [[(*shape, None)] for shape in shapes]

    @pytest.mark.parametrize("kind", SCHEMES)
    def test_quantised_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        """What is taken for packed weights: neighbours of a format have whole panels here, so no padding is doubled."""
        shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
        path = make_tiny_model("llama", tmp_path / "model", intermediate_size=192, **shape)
        config, ops = ModelConfig.from_hf(path), CpuBackend()
        regions: list[torch.Tensor] = []

        def noted(nbytes: int) -> torch.Tensor:
            regions.append(hugepages.huge_zeros(nbytes))
            return regions[-1]

        monkeypatch.setattr(cpu_weights, "REGION", 1 << 14)
        monkeypatch.setattr(cpu_weights, "HUGE_PAGE", 4096)
        monkeypatch.setattr(cpu_weights, "huge_zeros", noted)
        checkpoint = QuantizingCheckpoint(open_checkpoint(path), kind)
        weights = load_checkpoint(checkpoint, config, ops, BF16)
        touched = 4096 * sum(int((part != 0).any()) for region in regions for part in region.split(4096))
        parts = packed_parts(checkpoint, config, weights.head is not weights.embedding)
        assert 0.9 * ops.packed_bytes(parts, BF16) <= touched <= ops.packed_bytes(parts, BF16)
        dense = packed_parts(open_checkpoint(path), config, own_head=True)
        assert touched < 0.6 * ops.packed_bytes(dense, BF16) or kind == "nf4"

    @settings(max_examples=60)
    @given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 20).map(lambda n: 2 * n)), min_size=1, max_size=30))
    def test_regions_and_padding(self, shapes: list[tuple[int, int]]) -> None:
        """The bytes of the huge pages that packed weights touch, with regions so small that many are needed."""
        regions: list[tuple[int, int]] = []

        def noted(nbytes: int) -> torch.Tensor:
            region = hugepages.huge_zeros(nbytes)
            regions.append((region.data_ptr(), nbytes))
            return region

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_weights, "REGION", 8192)
            patch.setattr(cpu_weights, "HUGE_PAGE", 4096)
            patch.setattr(cpu_weights, "huge_zeros", noted)
            ops = load_backend("cpu", "cpu")
            packed = [ops.pack_linear(torch.ones(shape)) for shape in shapes]
            touched = set()
            for weight in packed:
                start = weight.packed.data_ptr()  # type: ignore[attr-defined]
                base = next(base for base, nbytes in regions if base <= start < base + nbytes)
                end = start + weight.packed.nbytes  # type: ignore[attr-defined]
                touched |= {(base, page) for page in range((start - base) // 4096, -(-(end - base) // 4096))}
            assert ops.packed_bytes([[(*shape, None)] for shape in shapes], torch.float32) == 4096 * len(touched)

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "phi3"])
    @pytest.mark.parametrize("tokens", [64, 1024])
    def test_workspace_is_within_the_scratch(self, tmp_path: Path, family: str, tokens: int) -> None:
        path = make_tiny_model(family, tmp_path / "model")
        config = ModelConfig.from_hf(path)
        model = record(_decoder(path, config), tokens, 8 + tokens)  # every token's logits may be wanted
        assert isinstance(model, RecordedDecoder)
        program = model._program
        assert isinstance(program, CpuProgram)
        around = Surroundings(threads=0, lean=True)

        def scratch(budget: int) -> int:
            return scratch_bytes(config, torch.float32, 256, Demand(256, 8, budget), around)

        per_token = (scratch(tokens) - scratch(0)) / tokens
        taken = sum(tensor.nbytes for tensor in program._workspace)
        assert taken <= per_token * tokens, "what a step's results take is planned for"

    @pytest.mark.parametrize("group", [8, 16, 32, 128, None])
    def test_inputs_of_quantised_linears_are_planned_for(self, group: int | None) -> None:
        """As prepared_bytes of records.h has them: fp32, two numbers for each unit, and an alignment."""
        tokens, around = 256, Surroundings(lean=True)
        demand = Demand(1024, 8, tokens)
        plain, more = (scratch_bytes(SMOLLM2, BF16, 1024, demand, s) for s in (around, replace(around, quantised=True)))
        widest = max(projection.in_features for projection in SMOLLM2.projections())
        found = layout(WeightFormat("any", bits=4, group=group), widest)
        assert found is not None
        assert found.units * (found.unit * 4 + 8) * tokens <= more - plain <= 5 * widest * tokens

    def test_the_arena_takes_its_bytes_and_no_more(self) -> None:
        """Zero pages until touched: then all of it is resident, and little else."""
        plan = replace(plan_memory(SMOLLM2, BF16, GIB, WEIGHTS, DEMAND, 0), num_pages=200)
        before = resident_memory()
        arena = allocate_arena(plan, torch.device("cpu"))
        untouched = resident_memory() - before
        assert untouched < 4 * MIB
        arena.fill_(1)
        taken = resident_memory() - before
        assert plan.arena_bytes - MIB <= taken <= plan.arena_bytes + 4 * MIB


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.55), ("int4", 0.45), ("nf4", 0.51)])
def test_share_of_smollm2s_weights_that_quantised_ones_take(kind: str, most: float) -> None:
    dense, ops = HeldCheckpoint.of_shapes(SMOLLM2), load_backend("cpu", "cpu")
    whole = resident_bytes(dense, SMOLLM2, BF16, ops, own_head=False)
    share = resident_bytes(QuantizingCheckpoint(dense, kind), SMOLLM2, BF16, ops, own_head=False) / whole
    assert most - 0.1 < share < most


def _decoder(path: Path, config: ModelConfig) -> Decoder:
    ops = load_backend("cpu", "cpu")
    weights = load_checkpoint(open_checkpoint(path), config, ops, torch.float32)
    plan = plan_memory(config, torch.float32, 64 * MIB, 0, Demand(64, 1, 16, MIB), 0)
    arena = allocate_arena(plan, torch.device("cpu"))
    return Decoder(config, weights, ops, kv_layers(arena, config, torch.float32, plan.groups), arena)


def test_logit_slices_are_bounded() -> None:
    assert (logit_rows(49152), logit_rows(131072)) == (64, 64)
    assert logit_rows(262144) * 262144 * 4 <= 32 << 20
    assert logit_rows(10**9) == 1


def test_weights_take_no_less_than_their_numbers() -> None:
    ops, checkpoint = load_backend("cpu", "cpu"), HeldCheckpoint.of_shapes(SMOLLM2)
    assert resident_bytes(checkpoint, SMOLLM2, BF16, ops, own_head=False) >= 2 * 134_515_008
