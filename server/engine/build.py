"""Composition: from a model folder and an EngineConfig to an engine ready to start. The module that knows all parts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.adapters.host_store import HostStore
from loraplex.adapters.loader import Loader, ParsedImage
from loraplex.adapters.pages import PagePool
from loraplex.adapters.peft_format import BaseBias, load_image
from loraplex.adapters.registry import Registry
from loraplex.adapters.residency import Residency
from loraplex.adapters.sources import resolve
from loraplex.adapters.tiles import BaseLayout
from loraplex.kernels.backend import Backend, BackendUnavailable, load_backend
from loraplex.kernels.metadata import BLOCK_SIZE
from loraplex.server.engine.adapter_manager import AdapterManager
from loraplex.server.engine.arena import (
    Demand,
    MemoryPlan,
    allocate_arena,
    available_memory,
    kv_layers,
    plan_memory,
)
from loraplex.server.engine.engine import Engine
from loraplex.server.engine.kv_cache import KVCache
from loraplex.server.engine.placement import AdapterPlacement
from loraplex.server.engine.runner import ModelRunner
from loraplex.server.engine.scheduler import Scheduler, SchedulerLimits
from loraplex.server.models.config import GenerationDefaults, ModelConfig
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.graphs import GraphedDecoder
from loraplex.server.models.recorded import RecordedDecoder, record
from loraplex.server.models.weights import BaseBiases, load_weights, weights_bytes

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EngineConfig:
    """Everything that is chosen about the engine; checked on construction (ValueError names the field)."""

    device: str = "auto"  # "auto" | "cpu" | "cuda"
    dtype: str = "auto"  # "auto": the checkpoint's, but bfloat16 for float16 on the CPU; or a key of DTYPES
    backend: str = "auto"  # see load_backend
    max_model_len: int | None = None  # tokens of a sequence; None: the model's own limit, less where memory is short
    memory_bytes: int | None = None  # weights + arena + scratch; None: what could be used, up to half of what is free
    max_num_seqs: int = 32  # running at once
    token_budget: int = 512  # tokens of a step
    num_slots: int = 256  # adapters on the device at once
    host_store_bytes: int = 2 << 30
    max_waiting: int = 1024  # requests queued beyond those running
    loader_threads: int = 1

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; expected auto, cpu or cuda")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected auto, {', '.join(DTYPES)}")
        names = ("max_num_seqs", "token_budget", "num_slots", "host_store_bytes", "max_waiting", "loader_threads")
        for name in (*names, "max_model_len", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")


@dataclass(frozen=True)
class EngineParts:
    """What build_engine returns; `engine` is not started yet. Stop: engine.stop(), then adapters.close()."""

    engine: Engine
    adapters: AdapterManager
    model_config: ModelConfig
    defaults: GenerationDefaults
    dtype: torch.dtype  # of weights, adapters and KV cache
    memory: MemoryPlan
    max_model_len: int


def build_engine(config: EngineConfig, model_path: Path, base_name: str) -> EngineParts:
    """Load the base in the folder `model_path` and lay out its memory. `base_name` is what messages call it.

    Raises UnsupportedModel, WeightsError, BackendUnavailable, NotEnoughMemory, OSError, ValueError (no such backend).
    """
    model_config = ModelConfig.from_hf(model_path)
    defaults = GenerationDefaults.from_hf(model_path)
    ops = load_backend(config.backend, config.device)
    device = ops.device
    dtype = _dtype(config.dtype, model_path, ops)
    memory = plan_memory(
        model_config,
        dtype,
        config.memory_bytes,
        weights_bytes(model_config, dtype),
        Demand(config.max_model_len, config.max_num_seqs, config.token_budget),
        available_memory(device),
    )
    logger.info("%s on %s in %s, %s", base_name, device, dtype, memory)
    arena = allocate_arena(memory, device)
    weights = load_weights(model_path, model_config, ops, dtype)

    layout = BaseLayout(base_name, model_config.num_layers, model_config.projections(), memory.page_bytes, dtype)
    pool = PagePool(memory.num_pages)
    residency = Residency(arena, pool, layout, config.num_slots)
    store = HostStore(config.host_store_bytes)
    loader = Loader(_parser(layout, BaseBiases(model_config, weights).get), store, config.loader_threads)
    registry = Registry()
    placement = AdapterPlacement(residency, store, loader, registry)

    kv = KVCache(pool, memory.groups, BLOCK_SIZE)
    limits = SchedulerLimits(
        max_model_len=memory.max_model_len,
        max_num_seqs=config.max_num_seqs,
        token_budget=config.token_budget,
        num_slots=config.num_slots,
        vocab_size=model_config.vocab_size,
        rope_switch=model_config.rope_switch,
    )
    decoder = Decoder(model_config, weights, ops, kv_layers(arena, model_config, dtype, memory.groups), arena)
    model = _fastest(decoder, config)
    engine = Engine(
        Scheduler(kv, placement, limits), ModelRunner(model, kv, residency, device), placement, config.max_waiting
    )
    placement.on_ready = engine.wake
    registry.on_drained = engine.forget_adapter
    return EngineParts(
        engine=engine,
        adapters=AdapterManager(registry, loader, max_pages=memory.num_pages - len(memory.groups)),
        model_config=model_config,
        defaults=defaults,
        dtype=dtype,
        memory=memory,
        max_model_len=memory.max_model_len,
    )


def _fastest(decoder: Decoder, config: EngineConfig) -> Decoder | RecordedDecoder | GraphedDecoder:
    """The decoder as the backend runs it best: recorded on the CPU, decode steps as CUDA graphs on a GPU."""
    if decoder.ops.name == "triton" and decoder.ops.device.type == "cuda":
        return GraphedDecoder(decoder)
    return record(decoder, config.token_budget, config.max_num_seqs)


def _parser(layout: BaseLayout, base_bias: BaseBias) -> Callable[[str], ParsedImage]:
    """What the loader's threads do with a source: resolve, read, check, pack."""

    def parse(source: str) -> ParsedImage:
        parsed, image = load_image(resolve(source), layout, base_bias)
        return ParsedImage(parsed.digest, parsed.rank, parsed.targets, image.pages.shape[0], image.nbytes, image)

    return parse


def _dtype(name: str, model_path: Path, ops: Backend) -> torch.dtype:
    """The compute dtype."""
    on_cpu = ops.device.type == "cpu"
    if name == "float16" and on_cpu:
        raise BackendUnavailable("dtype float16 was asked for on the CPU, which computes in bfloat16 and float32")
    if name != "auto":
        return DTYPES[name]
    raw = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    found = DTYPES.get(raw.get("dtype") or raw.get("torch_dtype") or "float32", torch.float32)
    return torch.bfloat16 if found == torch.float16 and on_cpu else found
