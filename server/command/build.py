"""Composition: from a model folder and an EngineConfig to an engine ready to start. The module that knows all parts."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from loraplex.adapters.files.tokenizer_files import TokenizerFiles
from loraplex.adapters.format.kept_starts import KeptStarts
from loraplex.adapters.format.kind import ServedBase
from loraplex.adapters.format.outside import BaseOutside
from loraplex.adapters.image.tiles import BaseLayout
from loraplex.adapters.registry import Registry
from loraplex.adapters.sources.addresses import Reach
from loraplex.adapters.sources.downloads import Downloads
from loraplex.adapters.tiers.cache import AdapterCache
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.adapters.tiers.eviction import Reclaimer
from loraplex.adapters.tiers.inbox import Inbox
from loraplex.adapters.tiers.loader import Loader
from loraplex.adapters.tiers.measuring import Measurer
from loraplex.adapters.tiers.pages import PagePool
from loraplex.adapters.tiers.reader import AdapterReader
from loraplex.adapters.tiers.workspace import Workspace
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.kernels.ops import Backend
from loraplex.kernels.quantized import Activations
from loraplex.kernels.select import load_backend
from loraplex.server.catalog.manager import AdapterManager
from loraplex.server.command.sizing import MachineMemory, calibrated, compute_dtype
from loraplex.server.config_adapters import DownloadConfig
from loraplex.server.config_engine import EngineConfig, Quantize
from loraplex.server.engine.engine import Engine
from loraplex.server.engine.policy.budget import (
    LEAST_BUDGET,
    StepCost,
    TokenBudget,
    scoring_cost,
)
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.plan import SchedulerLimits
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.step.arena import allocate_arena, kv_layers
from loraplex.server.engine.step.memory import MemoryPlan
from loraplex.server.engine.step.prefault import Prefault
from loraplex.server.engine.step.system_memory import give_back_freed
from loraplex.server.engine.step.worker import LocalWorker
from loraplex.server.facts import BaseFormats
from loraplex.server.models.base_digest import base_digest
from loraplex.server.models.base_weights import BaseWeights
from loraplex.server.models.checkpoint import Checkpoint, WeightsError
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.demo import default_cache_dir
from loraplex.server.models.graphs import GraphedDecoder
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.plain import PlainModel
from loraplex.server.models.quantizing import QuantizingCheckpoint
from loraplex.server.models.recorded import RecordedDecoder, record
from loraplex.server.models.weight_sizes import format_names, norms_in_order
from loraplex.server.models.weights import ModelWeights, activations_name, load_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProofParts:
    """What receipts are made with, beside the engine."""

    measurer: Measurer
    plain: PlainModel
    digest: Callable[[Callable[[], None], Path | None], str]  # of the base: base_digest() but for its first arguments


@dataclass(frozen=True)
class EngineParts:
    """What build_engine returns; `engine` is not started yet. Stop: engine.stop(), then adapters.close()."""

    engine: Engine
    prefault: Prefault | None  # on the CPU; not started either, and nobody has to
    adapters: AdapterManager
    cache: AdapterCache
    model_config: ModelConfig
    dtype: torch.dtype  # of dense weights, adapters and KV cache
    formats: BaseFormats
    proof: ProofParts
    memory: MemoryPlan
    token_budget: int  # tokens of a step, at first
    cost: StepCost
    startup: tuple[tuple[str, float], ...]  # what was done, and the seconds it took


def build_engine(
    config: EngineConfig,
    model_path: Path,
    *base_names: str,
    model_config: ModelConfig | None = None,
    checkpoint: Checkpoint | None = None,
    check_tokenizer: Callable[[TokenizerFiles, int], str] = lambda files, tokens: "",
    downloads: DownloadConfig = DownloadConfig(),
    allow_noop: bool = False,
    count_process: bool = False,
) -> EngineParts:
    """Load the base in the folder `model_path` and lay out its memory.

    base_names: what requests call it, at least one: messages do by the first, and no adapter may have any of them.
    model_config: of the base, where it has been read already: that takes a second. checkpoint: its weights, where they
    are not in the folder. check_tokenizer, allow_noop: see AdapterReader.

    count_process: the memory given is also for this process without the engine (CPU).

    Raises UnsupportedModel, WeightsError, BackendUnavailable, NotEnoughMemory, OSError, ValueError (no such backend).
    """
    watch = _Stopwatch()
    model_config = model_config or ModelConfig.from_hf(model_path)
    ops = load_backend(config.backend, config.device, config.batch_invariant)
    dtype = compute_dtype(config.dtype, model_path, ops)
    watch.lap("backend")
    checkpoint = _as_chosen(config, checkpoint or open_checkpoint(model_path))
    activations = None if config.activations is None else Activations(config.activations.value)
    memory = MachineMemory(config, model_config, dtype, ops, checkpoint, count_process)
    memory.plan(config.token_budget or LEAST_BUDGET, not model_config.tie_word_embeddings)  # refuse before reading
    weights = load_checkpoint(checkpoint, model_config, ops, dtype, activations=activations)
    give_back_freed()
    watch.lap("weights")
    cost = calibrated(model_config, weights, ops)
    watch.lap("calibration")
    plan, budget, most = memory.divide(cost, own_head=weights.head is not weights.embedding)
    formats = BaseFormats(
        str(dtype).removeprefix("torch."),
        format_names(checkpoint),
        activations_name(checkpoint, model_config, ops.device, activations),
    )
    logger.info("%s on %s in %s, steps of %d tokens", base_names[0], ops.device, formats, budget.tokens)
    if plan.max_model_len < (config.max_model_len or model_config.max_position):
        logger.warning(
            "context cut from %d to %d tokens by the memory there is", model_config.max_position, plan.max_model_len
        )
    engine, adapters, cache, prefault, measurer = _assemble(
        config,
        model_config,
        weights,
        BaseWeights(model_config, weights, checkpoint, ops.beside()),
        ops,
        plan,
        budget,
        most,
        base_names,
        check_tokenizer,
        downloads,
        allow_noop,
    )
    watch.lap("arena")
    return EngineParts(
        engine=engine,
        prefault=prefault,
        adapters=adapters,
        cache=cache,
        model_config=model_config,
        dtype=dtype,
        formats=formats,
        proof=ProofParts(
            measurer, PlainModel(model_config, checkpoint), partial(base_digest, Path(model_path), checkpoint)
        ),
        memory=replace(plan, weights_remark=str(formats)),
        token_budget=budget.tokens,
        cost=cost,
        startup=watch.laps,
    )


def _as_chosen(config: EngineConfig, checkpoint: Checkpoint) -> Checkpoint:
    """Have the base's weights as they shall be kept. Raises WeightsError where what was chosen cannot be."""
    if config.quantize not in (None, Quantize.native):
        checkpoint = QuantizingCheckpoint(checkpoint, config.quantize.value)
    if config.activations is not None and not format_names(checkpoint):
        raise WeightsError(
            f"--activations {config.activations.value}: {checkpoint.folder} is not quantised; leave the option out, or "
            "give --quantize too"
        )
    return checkpoint


def _assemble(
    config: EngineConfig,
    model_config: ModelConfig,
    weights: ModelWeights,
    base: BaseWeights,
    ops: Backend,
    plan: MemoryPlan,
    budget: TokenBudget,
    most: int,
    base_names: tuple[str, ...],
    check_tokenizer: Callable[[TokenizerFiles, int], str],
    download_config: DownloadConfig,
    allow_noop: bool,
) -> tuple[Engine, AdapterManager, AdapterCache, Prefault | None, Measurer]:
    """Allocate the arena and put everything around it together. most: tokens of a step."""
    device, dtype = ops.device, weights.dtype
    arena = allocate_arena(plan, device)
    layout = BaseLayout(
        base_names[0],
        model_config.num_layers,
        model_config.projections(),
        plan.page_bytes,
        dtype,
        model_config.blocks(),
    )
    outside = BaseOutside(
        norms=norms_in_order(model_config),
        vocab=model_config.vocab_size,
        hidden=model_config.hidden_size,
        tied=base.is_tied,
        embed_scale=model_config.embed_scale,
        read=base.tensor,
    )
    pool = PagePool(plan.num_pages)
    reclaimer = Reclaimer()
    residency = DeviceTier(arena, pool, layout, config.num_slots, reclaimer)
    inbox = Inbox(plan.images_bytes)
    registry = Registry(taken=base_names)
    downloads = _downloads(download_config, registry)
    starts = KeptStarts(default_cache_dir() / "starts")
    served = ServedBase(
        layout, base.bias, base.squared_norms, base.products, base.weight, base.formats, starts, outside
    )
    reader = AdapterReader(
        served,
        max_pages=plan.num_pages - len(plan.groups),
        workspace=Workspace(plan.loading_bytes),
        locate=downloads.locate,
        check_tokenizer=check_tokenizer,
        allow_noop=allow_noop,
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
    manager = AdapterManager(registry, loader, reader.examine, downloads, engine.pin_adapter)
    return engine, manager, cache, prefault, Measurer(reader, served)


def _downloads(config: DownloadConfig, registry: Registry) -> Downloads:
    """The files of every adapter that is registered, or still in use, are kept."""

    def in_use() -> set[str]:
        return {version.source for version in (*registry.list(), *registry.draining())}

    folder = config.folder or default_cache_dir() / "downloads"
    return Downloads(folder, config.limits, Reach(config.allowed_hosts), in_use)


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


def _fastest(decoder: Decoder, most: int, max_num_seqs: int) -> Decoder | RecordedDecoder | GraphedDecoder:
    """The decoder as the backend runs it best: recorded on the CPU, decode steps as CUDA graphs on a GPU."""
    if decoder.ops.name == "triton" and decoder.ops.device.type == "cuda":
        return GraphedDecoder(decoder)
    return record(decoder, most, max_num_seqs + most)  # rows: all of a prompt's may be wanted
