"""Build an engine, ready to start, of a model folder and an EngineConfig: load the base and divide the memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from loraplex.adapters.files.tokenizer_files import TokenizerFiles
from loraplex.adapters.tiers.cache import AdapterCache
from loraplex.adapters.tiers.measuring import Measurer
from loraplex.kernels.quantized import Activations
from loraplex.kernels.select import load_backend
from loraplex.server.catalog.manager import AdapterManager
from loraplex.server.command.assemble import assemble
from loraplex.server.command.sizing import MachineMemory, calibrated, compute_dtype
from loraplex.server.config_adapters import DownloadConfig
from loraplex.server.config_engine import EngineConfig, Quantize
from loraplex.server.engine.engine import Engine
from loraplex.server.engine.policy.budget import LEAST_BUDGET, StepCost
from loraplex.server.engine.step.memory import MemoryPlan
from loraplex.server.engine.step.prefault import Prefault
from loraplex.server.engine.step.system_memory import give_back_freed
from loraplex.server.facts import BaseFormats
from loraplex.server.models.base_digest import base_digest
from loraplex.server.models.base_weights import BaseWeights
from loraplex.server.models.checkpoint import Checkpoint, WeightsError
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.plain import PlainModel
from loraplex.server.models.quantizing import QuantizingCheckpoint
from loraplex.server.models.weight_sizes import format_names
from loraplex.server.models.weights import activations_name, load_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProofParts:
    """What receipts are made with, beside the engine."""

    measurer: Measurer
    plain: PlainModel
    digest: Callable[[Callable[[], None], dict[str, str]], str]  # base_digest() but for its first arguments


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
        activations_name(checkpoint, model_config, ops, activations),
    )
    logger.info("%s on %s in %s, steps of %d tokens", base_names[0], ops.device, formats, budget.tokens)
    if plan.max_model_len < (config.max_model_len or model_config.max_position):
        logger.warning(
            "context cut from %d to %d tokens by the memory there is", model_config.max_position, plan.max_model_len
        )
    engine, adapters, cache, prefault, measurer = assemble(
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


class _Stopwatch:
    """Measure where the time of the start goes."""

    def __init__(self) -> None:
        self.laps: tuple[tuple[str, float], ...] = ()
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note what was done since the last lap."""
        now = time.perf_counter()
        self.laps += ((name, now - self._last),)
        self._last = now
