"""Composition: from a model folder and an EngineConfig to an engine ready to start. The module that knows all parts."""

from __future__ import annotations

import ctypes
import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.adapters.files.tokenizer_files import TokenizerFiles
from loraplex.adapters.image.tiles import BaseLayout
from loraplex.adapters.registry import Registry
from loraplex.adapters.sources.addresses import Reach
from loraplex.adapters.sources.downloads import DownloadConfig, Downloads
from loraplex.adapters.tiers.cache import AdapterCache
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.adapters.tiers.eviction import Reclaimer
from loraplex.adapters.tiers.inbox import Inbox
from loraplex.adapters.tiers.loader import Loader
from loraplex.adapters.tiers.pages import PagePool
from loraplex.adapters.tiers.reader import AdapterReader
from loraplex.adapters.tiers.workspace import Workspace
from loraplex.kernels.ops import Backend, BackendUnavailable
from loraplex.kernels.records import BLOCK_SIZE
from loraplex.kernels.select import load_backend
from loraplex.server.address_space import address_space_left
from loraplex.server.catalog.manager import AdapterManager
from loraplex.server.config import DTYPES, EngineConfig
from loraplex.server.engine.engine import Engine
from loraplex.server.engine.policy.budget import (
    LEAST_BUDGET,
    MOST_BUDGET,
    StepCost,
    TokenBudget,
    default_budget,
    scoring_cost,
)
from loraplex.server.engine.policy.kv_cache import KVCache, kv_groups
from loraplex.server.engine.policy.plan import SchedulerLimits
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.step.arena import allocate_arena, kv_layers
from loraplex.server.engine.step.calibrate import DEVICE_COST, SCRATCH_PAGES, calibrate
from loraplex.server.engine.step.memory import (
    GROWTH_BYTES,
    WAITING_TOKEN_BYTES,
    Demand,
    MemoryPlan,
    NotEnoughMemory,
    Surroundings,
    available_memory,
    give_back_freed,
    page_bytes,
    plan_memory,
    resident_memory,
    size,
)
from loraplex.server.engine.step.prefault import Prefault
from loraplex.server.engine.step.worker import LocalWorker
from loraplex.server.models.config import GenerationDefaults, ModelConfig
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.demo import default_cache_dir
from loraplex.server.models.graphs import GraphedDecoder
from loraplex.server.models.recorded import RecordedDecoder, record
from loraplex.server.models.weights import (
    BaseBiases,
    ModelWeights,
    load_weights,
    loading_bytes,
    resident_bytes,
)

logger = logging.getLogger(__name__)

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True)
class EngineParts:
    """What build_engine returns; `engine` is not started yet. Stop: engine.stop(), then adapters.close()."""

    engine: Engine
    prefault: Prefault | None  # on the CPU; not started either, and nobody has to
    adapters: AdapterManager
    cache: AdapterCache
    model_config: ModelConfig
    defaults: GenerationDefaults
    dtype: torch.dtype  # of weights, adapters and KV cache
    memory: MemoryPlan
    max_model_len: int
    token_budget: int  # tokens of a step, at first
    cost: StepCost
    startup: tuple[tuple[str, float], ...]  # what was done, and the seconds it took


def build_engine(
    config: EngineConfig,
    model_path: Path,
    *base_names: str,
    model_config: ModelConfig | None = None,
    check_tokenizer: Callable[[TokenizerFiles], str] = lambda files: "",
) -> EngineParts:
    """Load the base in the folder `model_path` and lay out its memory.

    base_names: what requests call it, at least one: messages do by the first, and no adapter may have any of them.
    model_config: of the base, where it has been read already: that takes a second. check_tokenizer: see AdapterReader.

    Raises UnsupportedModel, WeightsError, BackendUnavailable, NotEnoughMemory, OSError, ValueError (no such backend).
    """
    watch = _Stopwatch()
    model_config = model_config or ModelConfig.from_hf(model_path)
    defaults = GenerationDefaults.from_hf(model_path)
    ops = load_backend(config.backend, config.device, config.batch_invariant)
    dtype = _dtype(config.dtype, model_path, ops)
    watch.lap("backend")
    memory = _Memory(config, model_config, dtype, ops, model_path)
    memory.plan(config.token_budget or LEAST_BUDGET, not model_config.tie_word_embeddings)  # refuse before reading
    weights = load_weights(model_path, model_config, ops, dtype)
    give_back_freed()
    watch.lap("weights")
    cost = _calibrated(model_config, weights, ops)
    token_budget = config.token_budget or default_budget(cost)
    watch.lap("calibration")
    own_head = weights.head is not weights.embedding
    learns = config.token_budget is None and ops.device.type == "cpu"
    try:
        plan = memory.plan(token_budget, own_head)
    except NotEnoughMemory:
        if config.token_budget is not None:
            raise
        token_budget = LEAST_BUDGET
        plan = memory.plan(token_budget, own_head)
    most = token_budget
    if learns:
        most, plan = memory.with_room(token_budget, plan, own_head)
    budget = TokenBudget(token_budget, most if learns else None, cost.fixed_seconds / token_budget + cost.token_seconds)
    logger.info("%s on %s in %s, steps of %d tokens", base_names[0], ops.device, dtype, token_budget)
    if plan.max_model_len < (config.max_model_len or model_config.max_position):
        logger.warning(
            "context cut from %d to %d tokens by the memory there is", model_config.max_position, plan.max_model_len
        )
    engine, adapters, cache, prefault = _assemble(
        config, model_config, weights, ops, plan, budget, most, base_names, check_tokenizer
    )
    watch.lap("arena")
    return EngineParts(
        engine=engine,
        prefault=prefault,
        adapters=adapters,
        cache=cache,
        model_config=model_config,
        defaults=defaults,
        dtype=dtype,
        memory=plan,
        max_model_len=plan.max_model_len,
        token_budget=token_budget,
        cost=cost,
        startup=watch.laps,
    )


def _assemble(
    config: EngineConfig,
    model_config: ModelConfig,
    weights: ModelWeights,
    ops: Backend,
    plan: MemoryPlan,
    budget: TokenBudget,
    most: int,
    base_names: tuple[str, ...],
    check_tokenizer: Callable[[TokenizerFiles], str],
) -> tuple[Engine, AdapterManager, AdapterCache, Prefault | None]:
    """Allocate the arena and put everything around it together. most: tokens of a step."""
    device, dtype = ops.device, weights.dtype
    arena = allocate_arena(plan, device)
    layout = BaseLayout(base_names[0], model_config.num_layers, model_config.projections(), plan.page_bytes, dtype)
    pool = PagePool(plan.num_pages)
    reclaimer = Reclaimer()
    residency = DeviceTier(arena, pool, layout, config.num_slots, reclaimer)
    inbox = Inbox(plan.images_bytes)
    registry = Registry(taken=base_names)
    downloads = _downloads(config.downloads, registry)
    reader = AdapterReader(
        layout,
        BaseBiases(model_config, weights).get,
        max_pages=plan.num_pages - len(plan.groups),
        workspace=Workspace(plan.loading_bytes),
        locate=downloads.locate,
        check_tokenizer=check_tokenizer,
    )
    loader = Loader(reader.read, inbox.put, registry, config.loader_threads)
    cache = AdapterCache(residency, inbox, loader, registry, exclusive=plan.shared)

    kv = KVCache(pool, plan.groups, BLOCK_SIZE, reclaimer)
    kv.token_seconds = budget.token_seconds
    decoder = Decoder(model_config, weights, ops, kv_layers(arena, model_config, dtype, plan.groups), arena)
    model = _fastest(decoder, most, config.max_num_seqs)
    follows_up = isinstance(model, RecordedDecoder) and model.follows_up
    limits = SchedulerLimits(
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        token_budget=most,
        num_slots=config.num_slots,
        vocab_size=model_config.vocab_size,
        decode_steps=config.decode_steps if follows_up else 1,
        scoring=scoring_cost(
            model_config.vocab_size,
            model_config.hidden_size,
            model_config.num_layers * sum(p.in_features * p.out_features for p in model_config.projections()),
        ),
        rope_switch=model_config.rope_switch,
        prefix_cache=all(rope.kind != "dynamic" for rope in model_config.ropes),  # its keys depend on the length
    )
    halt = ctypes.c_int32()
    worker = LocalWorker(model, residency, BLOCK_SIZE, device, halt)
    engine = Engine(
        Scheduler(kv, cache, limits, budget=budget),
        worker,
        cache,
        config.max_waiting,
        config.max_waiting_tokens,
        halt,
    )
    cache.host.on_ready = inbox.on_arrival = worker.masks.wake = engine.wake
    registry.on_drained = engine.forget_adapter
    prefault = Prefault(arena, pool) if plan.shared else None
    return engine, AdapterManager(registry, loader, reader.examine, downloads, engine.pin_adapter), cache, prefault


def _downloads(config: DownloadConfig, registry: Registry) -> Downloads:
    """The files of every adapter that is registered, or still in use, are kept."""

    def in_use() -> set[str]:
        return {version.source for version in (*registry.list(), *registry.draining())}

    folder = config.folder or default_cache_dir() / "downloads"
    return Downloads(folder, config.limits, Reach(config.allowed_hosts), in_use)


class _Memory:
    """The memory there is, for plans of several token budgets."""

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, ops: Backend, path: Path
    ) -> None:
        device = ops.device
        shared = device.type == "cpu"
        process = resident_memory() + config.max_waiting_tokens * WAITING_TOKEN_BYTES + GROWTH_BYTES
        self._config, self._model_config, self._dtype, self._ops = config, model_config, dtype, ops
        self._addresses = address_space_left() if shared else sys.maxsize
        self._available = min(available_memory(device), self._addresses)
        self._given = config.memory_bytes
        self._own = resident_memory() if shared and config.count_process else 0
        if config.memory_fraction is not None:  # what the process has is not free any more, but its own
            self._given = int(config.memory_fraction * (self._available + self._own))
        self._around = Surroundings(
            shared=shared,
            process_bytes=process if config.count_process else 0,
            loading_bytes=loading_bytes(path, model_config, dtype),
            threads=torch.get_num_threads(),
            lean=ops.name == "cpu",
        )

    def plan(self, token_budget: int, own_head: bool) -> MemoryPlan:
        """Raises NotEnoughMemory."""
        config = self._config
        plan = plan_memory(
            self._model_config,
            self._dtype,
            self._given,
            resident_bytes(self._model_config, self._dtype, self._ops, own_head),
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

    def with_room(self, token_budget: int, plan: MemoryPlan, own_head: bool) -> tuple[int, MemoryPlan]:
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


class _Stopwatch:
    """Where the time of the start goes."""

    def __init__(self) -> None:
        self.laps: tuple[tuple[str, float], ...] = ()
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What was done since the last lap."""
        now = time.perf_counter()
        self.laps += ((name, now - self._last),)
        self._last = now


def _calibrated(model_config: ModelConfig, weights: ModelWeights, ops: Backend) -> StepCost:
    """Measured in an arena of its own: how large the real one is depends on the outcome."""
    if ops.device.type != "cpu":
        return DEVICE_COST
    groups = kv_groups(model_config.windows)
    page = page_bytes(model_config, weights.dtype, groups)
    arena = torch.zeros(SCRATCH_PAGES * len(groups), page, dtype=torch.uint8)
    views = kv_layers(arena, model_config, weights.dtype, groups)
    return calibrate(Decoder(model_config, weights, ops, views, arena))


def _fastest(decoder: Decoder, most: int, max_num_seqs: int) -> Decoder | RecordedDecoder | GraphedDecoder:
    """The decoder as the backend runs it best: recorded on the CPU, decode steps as CUDA graphs on a GPU."""
    if decoder.ops.name == "triton" and decoder.ops.device.type == "cuda":
        return GraphedDecoder(decoder)
    return record(decoder, most, max_num_seqs + most)  # rows: all of a prompt's may be wanted


def _dtype(name: str, model_path: Path, ops: Backend) -> torch.dtype:
    """The compute dtype."""
    on_cpu = ops.device.type == "cpu"
    if name == "float16" and on_cpu:
        raise BackendUnavailable("dtype float16 was asked for on the CPU, which computes in bfloat16 and float32")
    if name != "auto":
        return TORCH_DTYPES[name]
    raw = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    found = TORCH_DTYPES.get(raw.get("dtype") or raw.get("torch_dtype") or "float32", torch.float32)
    return torch.bfloat16 if found == torch.float16 and on_cpu else found
