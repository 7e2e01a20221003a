"""How large an engine is: dtype, memory and tokens of a step, from what was chosen and what the machine has."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch

from loraplex.kernels.ops import Backend, BackendUnavailable
from loraplex.server.address_space import address_space_left
from loraplex.server.config_engine import DType, EngineConfig
from loraplex.server.engine.policy.budget import LEAST_BUDGET, MOST_BUDGET, StepCost, TokenBudget, default_budget
from loraplex.server.engine.policy.kv_groups import kv_groups
from loraplex.server.engine.step.arena import kv_layers
from loraplex.server.engine.step.calibrate import DEVICE_COST, SCRATCH_PAGES, calibrate
from loraplex.server.engine.step.memory import (
    GROWTH_BYTES,
    WAITING_TOKEN_BYTES,
    MemoryPlan,
    NotEnoughMemory,
    page_bytes,
    plan_memory,
    size,
)
from loraplex.server.engine.step.scratch import Demand, Surroundings
from loraplex.server.engine.step.system_memory import available_memory, resident_memory
from loraplex.server.models.checkpoint import Checkpoint
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.weight_sizes import format_names, loading_bytes, resident_bytes
from loraplex.server.models.weights import ModelWeights

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DType if name is not DType.auto}


class MachineMemory:
    """The memory there is, to be planned for several token budgets."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        dtype: torch.dtype,
        ops: Backend,
        checkpoint: Checkpoint,
        count_process: bool,
    ) -> None:
        """Look at what there is. count_process: the memory given is also for this process without the engine.

        Raises WeightsError where `checkpoint` is not that of `model_config`.
        """
        device = ops.device
        shared = device.type == "cpu"
        process = resident_memory() + config.max_waiting_tokens * WAITING_TOKEN_BYTES + GROWTH_BYTES
        self._config, self._model_config, self._dtype, self._ops = config, model_config, dtype, ops
        self._checkpoint = checkpoint
        self._addresses = address_space_left() if shared else sys.maxsize
        self._available = min(available_memory(device), self._addresses)
        self._own = resident_memory() if shared and count_process else 0
        self._given = None if config.memory is None else int(config.memory)
        if isinstance(config.memory, float):  # a share: what the process has is not free any more, but its own
            self._given = int(config.memory * (self._available + self._own))
        self._around = Surroundings(
            shared=shared,
            process_bytes=process if count_process else 0,
            loading_bytes=loading_bytes(checkpoint, model_config, dtype),
            threads=torch.get_num_threads(),
            lean=ops.name == "cpu",
            quantised=bool(format_names(checkpoint)),
        )

    def plan(self, token_budget: int, own_head: bool) -> MemoryPlan:
        """Raises NotEnoughMemory."""
        config = self._config
        plan = plan_memory(
            self._model_config,
            self._dtype,
            self._given,
            resident_bytes(self._checkpoint, self._model_config, self._dtype, self._ops, own_head),
            Demand(config.max_model_len, config.max_num_seqs, token_budget, config.host_store_bytes),
            self._available,
            self._around,
        )
        more = plan.total_bytes - self._own
        if more > self._addresses:
            raise NotEnoughMemory(
                f"the address space is limited (ulimit -v): {size(self._addresses)} of it are left for what takes "
                f"{size(more)} more; raise the limit, or give --memory {max(0, self._addresses + self._own) >> 20}M"
            )
        return plan

    def divide(self, cost: StepCost, own_head: bool) -> tuple[MemoryPlan, TokenBudget, int]:
        """Plan memory and steps that cost `cost`; the last is the most tokens that a step may come to have.

        Raises NotEnoughMemory.
        """
        chosen = self._config.token_budget
        tokens = chosen or default_budget(cost)
        try:
            plan = self.plan(tokens, own_head)
        except NotEnoughMemory:
            if chosen is not None:
                raise
            tokens = LEAST_BUDGET
            plan = self.plan(tokens, own_head)
        most, learns = tokens, chosen is None and self._ops.device.type == "cpu"
        if learns:
            most, plan = self._with_room(tokens, plan, own_head)
        token_seconds = cost.fixed_seconds / tokens + cost.token_seconds
        return plan, TokenBudget(tokens, most if learns else None, token_seconds), most

    def _with_room(self, token_budget: int, plan: MemoryPlan, own_head: bool) -> tuple[int, MemoryPlan]:
        """The most tokens that a step may come to have, and the plan for them, where `plan` is for `token_budget`.

        As many as cost no context and no more than a sixteenth of the arena: a budget that is measured too low, or on a
        machine that becomes faster, may grow.
        """
        most = MOST_BUDGET
        while most > token_budget:
            with suppress(NotEnoughMemory):
                larger = self.plan(most, own_head)
                if larger.max_model_len == plan.max_model_len and 16 * larger.num_pages >= 15 * plan.num_pages:
                    return most, larger
            most //= 2
        return token_budget, plan


def calibrated(model_config: ModelConfig, weights: ModelWeights, ops: Backend) -> StepCost:
    """Measure a step's cost, in an arena of its own: how large the real one is depends on the outcome."""
    if ops.device.type != "cpu":
        return DEVICE_COST
    groups = kv_groups(model_config.windows)
    page = page_bytes(model_config, weights.dtype, groups)
    arena = torch.zeros(SCRATCH_PAGES * len(groups), page, dtype=torch.uint8)
    views = kv_layers(arena, model_config, weights.dtype, groups)
    return calibrate(Decoder(model_config, weights, ops, views, arena))


def compute_dtype(name: str, model_path: Path, ops: Backend) -> torch.dtype:
    """Choose what the base is computed in. Raises BackendUnavailable."""
    on_cpu = ops.device.type == "cpu"
    if name == "float16" and on_cpu:
        raise BackendUnavailable("dtype float16 was asked for on the CPU, which computes in bfloat16 and float32")
    if name != "auto":
        return TORCH_DTYPES[name]
    raw = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    found = TORCH_DTYPES.get(raw.get("dtype") or raw.get("torch_dtype") or "float32", torch.float32)
    return torch.bfloat16 if found == torch.float16 and on_cpu else found
