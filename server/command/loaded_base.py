"""Load a base as an EngineConfig says and divide the memory: what an engine is assembled around."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from loraplex.kernels.ops import Backend
from loraplex.kernels.quantized import Activations
from loraplex.kernels.select import load_backend
from loraplex.server.command.sizing import MachineMemory, calibrated, compute_dtype
from loraplex.server.config_engine import EngineConfig, Quantize
from loraplex.server.engine.policy.budget import LEAST_BUDGET, TokenBudget
from loraplex.server.engine.step.memory import MemoryPlan
from loraplex.server.engine.step.system_memory import give_back_freed
from loraplex.server.facts import BaseFormats
from loraplex.server.models.checkpoint import Checkpoint, WeightsError
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.quantizing import QuantizingCheckpoint
from loraplex.server.models.weight_sizes import format_names
from loraplex.server.models.weights import ModelWeights, activations_name, load_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedBase:
    """A base in memory, and how the memory beside it is divided."""

    config: ModelConfig
    checkpoint: Checkpoint
    weights: ModelWeights
    formats: BaseFormats
    ops: Backend
    plan: MemoryPlan
    budget: TokenBudget  # of a step, at first
    most: int  # tokens that a step may come to have


def load_base(
    config: EngineConfig,
    folder: Path,
    model_config: ModelConfig | None,
    checkpoint: Checkpoint | None,
    count_process: bool,
    watch: Stopwatch,
) -> LoadedBase:
    """Load the base in `folder`, measure what its steps cost, and divide the memory. See build_engine."""
    model_config = model_config or ModelConfig.from_hf(folder)
    ops = load_backend(config.backend, config.device, config.batch_invariant)
    dtype = compute_dtype(config.dtype, folder, ops)
    watch.lap("backend")
    checkpoint = _as_chosen(config, checkpoint or open_checkpoint(folder))
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
    if plan.max_model_len < (config.max_model_len or model_config.max_position):
        logger.warning(
            "context cut from %d to %d tokens by the memory there is", model_config.max_position, plan.max_model_len
        )
    return LoadedBase(model_config, checkpoint, weights, formats, ops, plan, budget, most)


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


class Stopwatch:
    """Measure where the time of the start goes."""

    def __init__(self) -> None:
        self.laps: tuple[tuple[str, float], ...] = ()
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note what was done since the last lap."""
        now = time.perf_counter()
        self.laps += ((name, now - self._last),)
        self._last = now
