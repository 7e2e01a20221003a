"""Build an engine, ready to start, of a model folder and an EngineConfig: load the base and divide the memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loraplex.adapters.files.tokenizer_files import TokenizerFiles
from loraplex.adapters.tiers.cache import AdapterCache
from loraplex.adapters.tiers.measuring import Measurer
from loraplex.server.catalog.manager import AdapterManager
from loraplex.server.command.assemble import assemble
from loraplex.server.command.loaded_base import Stopwatch, load_base
from loraplex.server.config_adapters import DownloadConfig
from loraplex.server.config_engine import EngineConfig
from loraplex.server.engine.engine import Engine
from loraplex.server.engine.step.memory import MemoryPlan
from loraplex.server.engine.step.prefault import Prefault
from loraplex.server.facts import BaseFormats
from loraplex.server.models.base_digest import base_digest
from loraplex.server.models.checkpoint import Checkpoint
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.plain import PlainModel

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
    formats: BaseFormats
    proof: ProofParts
    memory: MemoryPlan
    token_budget: int  # tokens of a step, at first
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
    watch = Stopwatch()
    base = load_base(config, model_path, model_config, checkpoint, count_process, watch)
    logger.info("%s on %s in %s, steps of %d tokens", base_names[0], base.ops.device, base.formats, base.budget.tokens)
    engine, adapters, cache, prefault, measurer = assemble(
        config, base, base_names, check_tokenizer, downloads, allow_noop
    )
    watch.lap("arena")
    return EngineParts(
        engine=engine,
        prefault=prefault,
        adapters=adapters,
        cache=cache,
        model_config=base.config,
        formats=base.formats,
        proof=ProofParts(
            measurer, PlainModel(base.config, base.checkpoint), partial(base_digest, Path(model_path), base.checkpoint)
        ),
        memory=replace(base.plan, weights_remark=str(base.formats)),
        token_budget=base.budget.tokens,
        startup=watch.laps,
    )
