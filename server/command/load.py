"""What is read before a server can be put together: the base's configuration, tokenizers, grammars and weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.server.config import ServeConfig
from loraplex.server.startup import StartError

if TYPE_CHECKING:
    from loraplex.server.command.build import EngineParts
    from loraplex.server.models.config import ModelConfig
    from loraplex.server.text.generation_defaults import GenerationDefaults
    from loraplex.server.text.grammar import Grammars
    from loraplex.server.text.tokenizers import Tokenizers

logger = logging.getLogger(__name__)


def read_config(folder: Path) -> ModelConfig:
    """Read the configuration of the base in `folder`. Raises StartError."""
    from loraplex.server.models.config import ModelConfig, UnsupportedModel

    try:
        return ModelConfig.from_hf(folder)
    except UnsupportedModel as error:
        raise StartError(error) from error


def read_defaults(folder: Path) -> GenerationDefaults:
    """Read what the authors of the base in `folder` say about generating. Raises StartError."""
    from loraplex.server.text.generation_defaults import GenerationConfigError, GenerationDefaults

    try:
        return GenerationDefaults.from_hf(folder)
    except GenerationConfigError as error:
        raise StartError(error) from error


def read_tokenizers(folder: Path, rows: int, eos_ids: tuple[int, ...], chat_template: Path | None = None) -> Tokenizers:
    """Read the tokenizer of the base in `folder`, whose embedding has `rows` rows and whose answers end with `eos_ids`.

    chat_template: a file instead of the base's own. Raises StartError.
    """
    from loraplex.server.text.tokenizer import Tokenizer
    from loraplex.server.text.tokenizer_reading import TokenizerError
    from loraplex.server.text.tokenizers import Tokenizers

    try:
        return Tokenizers(Tokenizer.read(folder, chat_template), rows, eos_ids)
    except TokenizerError as error:
        raise StartError(error) from error


def read_grammars(tokenizers: Tokenizers) -> Grammars:
    """Read the vocabulary for grammars: that takes 0.8 s with the interpreter's lock held."""
    from loraplex.server.text.grammar import Grammars
    from loraplex.server.text.grammar_spec import GrammarRefused

    grammars = Grammars(tokenizers.base, tokenizers.rows, tokenizers.eos_ids)
    try:
        grammars.load()
    except GrammarRefused as error:
        logger.warning("answers cannot be held to grammars: %s", error)
    return grammars


def load_engine(config: ServeConfig, folder: Path, model_config: ModelConfig, tokenizers: Tokenizers) -> EngineParts:
    """Load the base in `folder` and build its engine, which is not started. Raises StartError."""
    from loraplex.kernels.ops import BackendUnavailable
    from loraplex.server.address_space import address_limit, is_refused_mapping
    from loraplex.server.command.build import build_engine
    from loraplex.server.engine.step.memory import NotEnoughMemory, size
    from loraplex.server.models.checkpoint import WeightsError
    from loraplex.server.models.config import UnsupportedModel

    try:
        parts = build_engine(
            config.engine,
            folder,
            *config.base_names,
            model_config=model_config,
            check_tokenizer=tokenizers.check,
            downloads=config.adapters.downloads,
            allow_noop=config.adapters.allow_noop,
            count_process=True,
        )
    except Exception as error:
        if is_refused_mapping(error):
            limit = address_limit()
            limited = f"; the address space is limited to {size(limit)} (ulimit -v)" if limit > 0 else ""
            raise StartError(f"{error or 'memory cannot be had'}{limited}") from error
        if isinstance(error, UnsupportedModel | WeightsError | BackendUnavailable | NotEnoughMemory | OSError):
            raise StartError(error) from error
        raise
    _leave_cores_to_kernels()
    limit, found = model_config.max_position, parts.memory.max_model_len
    if found > limit:
        raise StartError(f"--max-model-len {found}: the base was made for at most {limit} tokens")
    return parts


def _leave_cores_to_kernels() -> None:
    """Have torch work in the thread that calls it from now on; the kernels have their team, and a GPU needs none.

    Torch's threads wait for each other after every operation, 25 times in a logsumexp, and each time for the one whose
    core somebody else has: the scores of 64 rows took 12 ms on two idle cores, 100 with three other processes on them,
    and 10 and 38 in one thread.
    """
    import torch

    torch.set_num_threads(1)
