"""Put together what works on one arena: device tier, loaders, cache, scheduler, worker, engine, manager."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from torch import Tensor

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
from loraplex.server.catalog.manager import AdapterManager
from loraplex.server.command.loaded_base import LoadedBase
from loraplex.server.config_adapters import DownloadConfig
from loraplex.server.config_engine import EngineConfig
from loraplex.server.engine.engine import Engine
from loraplex.server.engine.policy.budget import scoring_cost
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.plan import SchedulerLimits
from loraplex.server.engine.policy.scheduler import Scheduler
from loraplex.server.engine.step.arena import allocate_arena, kv_layers
from loraplex.server.engine.step.prefault import Prefault
from loraplex.server.engine.step.worker import LocalWorker
from loraplex.server.models.base_weights import BaseWeights
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.demo import default_cache_dir
from loraplex.server.models.graphs import GraphedDecoder
from loraplex.server.models.recorded import RecordedDecoder, record
from loraplex.server.models.weight_sizes import norms_in_order

Model = Decoder | RecordedDecoder | GraphedDecoder


def assemble(
    config: EngineConfig,
    base: LoadedBase,
    base_names: tuple[str, ...],
    check_tokenizer: Callable[[TokenizerFiles, int], str],
    download_config: DownloadConfig,
    allow_noop: bool,
) -> tuple[Engine, AdapterManager, AdapterCache, Prefault | None, Measurer]:
    """Allocate the arena and put everything around it together."""
    plan = base.plan
    arena = allocate_arena(plan, base.ops.device)
    served = _served_base(base_names[0], base)
    pool = PagePool(plan.num_pages)
    reclaimer = Reclaimer()
    residency = DeviceTier(arena, pool, served.layout, config.num_slots, reclaimer)
    inbox = Inbox(plan.images_bytes)
    registry = Registry(taken=base_names)
    downloads = _downloads(download_config, registry)
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
    kv.token_seconds = base.budget.token_seconds
    model = _fastest(base, arena, config.max_num_seqs)
    halt = ctypes.c_int32()
    worker = LocalWorker(model, residency, BLOCK_SIZE, base.ops.device, halt)
    scheduler = Scheduler(kv, cache, _limits(config, base, model), budget=base.budget)
    engine = Engine(scheduler, worker, cache, config.max_waiting, config.max_waiting_tokens, halt)
    cache.host.on_ready = inbox.on_arrival = worker.masks.wake = engine.wake
    registry.on_drained = engine.forget_adapter
    prefault = Prefault(arena, pool) if plan.shared else None
    manager = AdapterManager(registry, loader, reader.examine, downloads, engine.pin_adapter)
    return engine, manager, cache, prefault, Measurer(reader, served)


def _served_base(name: str, base: LoadedBase) -> ServedBase:
    """Say what adapters are held against: the base's layout, its weights, and what is outside its linears."""
    config = base.config
    weights = BaseWeights(config, base.weights, base.checkpoint, base.ops.beside())
    layout = BaseLayout(
        name, config.num_layers, config.projections(), base.plan.page_bytes, base.weights.dtype, config.blocks()
    )
    outside = BaseOutside(
        norms=norms_in_order(config),
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        head_dim=config.head_dim,
        tied=weights.is_tied,
        embed_scale=config.embed_scale,
        quantised=bool(weights.formats),
        read=weights.tensor,
    )
    return ServedBase(
        layout,
        weights.bias,
        weights.squared_norms,
        weights.products,
        weights.weight,
        weights.formats,
        KeptStarts(default_cache_dir() / "starts"),
        outside,
    )


def _limits(config: EngineConfig, base: LoadedBase, model: Model) -> SchedulerLimits:
    """Bound the scheduler of what `model` runs."""
    follows_up = isinstance(model, RecordedDecoder) and model.follows_up  # several decode steps may be one call
    found = base.config
    return SchedulerLimits(
        max_model_len=base.plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        token_budget=base.most,
        num_slots=config.num_slots,
        vocab_size=found.vocab_size,
        decode_steps=config.decode_steps if follows_up else 1,
        scoring=scoring_cost(
            found.vocab_size,
            found.hidden_size,
            found.num_layers * sum(p.in_features * p.out_features for p in found.projections()),
        ),
        rope_switch=found.rope_switch,
        prefix_cache=all(rope.kind != "dynamic" for rope in found.ropes),  # its keys depend on the length
    )


def _downloads(config: DownloadConfig, registry: Registry) -> Downloads:
    """Make the downloads, which keep the files of every adapter that is registered or still in use."""

    def in_use() -> set[str]:
        return {version.source for version in (*registry.list(), *registry.draining())}

    folder = config.folder or default_cache_dir() / "downloads"
    return Downloads(folder, config.limits, Reach(config.allowed_hosts), in_use)


def _fastest(base: LoadedBase, arena: Tensor, max_num_seqs: int) -> Model:
    """Return the decoder as the backend runs it best: recorded on the CPU, decode steps as CUDA graphs on a GPU."""
    views = kv_layers(arena, base.config, base.weights.dtype, base.plan.groups)
    decoder = Decoder(base.config, base.weights, base.ops, views, arena)
    if base.ops.name == "triton" and base.ops.device.type == "cuda":
        return GraphedDecoder(decoder)
    return record(decoder, base.most, max_num_seqs + base.most)  # rows: all of a prompt's may be wanted
