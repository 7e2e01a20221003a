"""What stands in front of the prompt, as PEFT saves it: virtual tokens, or keys and values in every layer.

adapter_model.safetensors                             what it becomes
prompt_embeddings [V, hidden]                         V embeddings in the stream's scale (PROMPT_TUNING, P_TUNING, CPT,
                                                      MULTITASK_PROMPT_TUNING); an encoder is already applied
prefix_task_cols [tasks, V, k], _rows [tasks, k, H]   a task's cols * rows, which the embeddings are multiplied with
prompt_embeddings [V, layers * 2 * kv_heads * D]      V keys and values of every layer, as they lie in the cache: keys
                                                      are not rotated again (PREFIX_TUNING, CARTRIDGE)

Real tokens' positions begin at V, for all of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.config import (
    COMMON_NO_BEARING,
    TASK,
    Keys,
    bad_config,
    read_base_model,
    read_count,
    read_task,
    shown,
    unsupported,
)
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import AdapterConfig, AdapterKind, ModuleMap, ServedBase, Throttle
from loraplex.adapters.format.modules import wrong_shape
from loraplex.adapters.format.targets import Targets
from loraplex.adapters.format.values import check_finite, check_rounded
from loraplex.adapters.front import Front
from loraplex.adapters.image.tiles import BaseLayout, Part

ROWS = "prompt_embeddings"
COLUMNS_OF_TASK, ROWS_OF_TASK = "prefix_task_cols", "prefix_task_rows"

MAX_TOKENS = 1 << 17
"""Longer than any context that is served beside a prompt."""

_TRAINING = frozenset({"num_attention_heads", "num_layers", "token_dim"})
"""Of the base that it was made for; the tensor's shape says whether that is this one."""


def front_keys(*no_bearing: str, used: Iterable[str] = ()) -> Keys:
    """Say what the keys of such a kind's config mean; no_bearing: its own that are about its training."""
    own = {"peft_type", "base_model_name_or_path", "num_virtual_tokens", "num_transformer_submodules", *_TRAINING}
    return Keys(frozenset({*own, *used}), COMMON_NO_BEARING | set(no_bearing))


@dataclass(frozen=True)
class FrontConfig(AdapterConfig):
    """What inference needs of the config of an adapter that stands in front of the prompt."""

    tokens: int
    shape_of_base: tuple[int | None, ...]  # layers, heads of keys, width of keys; None: not in the config
    tasks: int = 0  # that have cols and rows of their own; 0: there are none
    ranks: int = 0  # of cols and rows
    task: int = 0  # the one that is asked for

    @property
    def remark(self) -> str:
        """Say what it takes of the context."""
        return f"{self.tokens} virtual tokens stand in front of each prompt: the context counts them, usage does not"


class FrontKind(AdapterKind[FrontConfig]):
    """Something in front of the prompt, and nothing in the linears."""

    stored: bool = False
    """Keys and values, not embeddings."""

    def read(self, raw: Mapping[str, Any]) -> FrontConfig:
        self.keys.check(raw)
        if raw.get("num_transformer_submodules") not in (None, 1):
            found = shown(raw["num_transformer_submodules"])
            raise unsupported(f"num_transformer_submodules is {found}; expected 1, of a decoder alone")
        return FrontConfig(
            self.name,
            Targets((), ()),
            read_base_model(raw),
            self._tokens(raw),
            tuple(_optional(raw, key) for key in ("num_layers", "num_attention_heads", "token_dim")),
            *self._task(raw),
        )

    def plan(
        self, config: FrontConfig, header: Mapping[str, TensorInfo], base: ServedBase, throttle: Throttle
    ) -> ModuleMap:
        width = self._width(config, base.layout)
        wanted: dict[str, tuple[int, ...]] = {ROWS: (config.tokens, width)}
        if config.tasks:
            tasks, ranks = config.tasks, config.ranks
            wanted |= {COLUMNS_OF_TASK: (tasks, config.tokens, ranks), ROWS_OF_TASK: (tasks, ranks, width)}
        for name in header:
            if name not in wanted:
                raise AdapterRefused("unmatched_tensor", f"{name} is in the file; expected {', '.join(wanted)} alone")
        for name, shape in wanted.items():
            if name not in header:
                raise AdapterRefused("missing_tensor", f"{name} {list(shape)} is not in the file")
            if header[name].shape != shape:
                hint = f"; the config says {config.tokens} virtual tokens, the base takes {width} values of each"
                raise wrong_shape(name, header[name].shape, shape, base.layout, hint)
        front = Front(config.tokens, self.stored, width)
        return ModuleMap(config, header, modules=(), shapes=(), rank=0, targets=(), front=front)

    def parts(
        self, module_map: ModuleMap, tensors: Mapping[str, Tensor], base: ServedBase, throttle: Throttle
    ) -> Iterable[Part]:
        return ()

    def front(
        self, module_map: ModuleMap, tensors: Mapping[str, Tensor], layout: BaseLayout, throttle: Throttle
    ) -> Tensor:
        check_finite(tensors, throttle)
        config, rows = module_map.config, tensors[ROWS].float()
        assert isinstance(config, FrontConfig), "plan() was given it"
        if config.tasks:
            columns, own = (tensors[name][config.task].float() for name in (COLUMNS_OF_TASK, ROWS_OF_TASK))
            rows = rows * (columns @ own)
        check_rounded(rows, ROWS, "it", layout)
        return rows

    @abstractmethod
    def _width(self, config: FrontConfig, layout: BaseLayout) -> int:
        """Count the values of a virtual token. Raises AdapterRefused("shape_mismatch")."""

    def _tokens(self, raw: Mapping[str, Any]) -> int:
        tokens = read_count(raw.get("num_virtual_tokens"), "num_virtual_tokens")
        if tokens > MAX_TOKENS:
            raise AdapterRefused(
                "too_large", f"adapter_config.json: num_virtual_tokens is {tokens}; up to {MAX_TOKENS} are served"
            )
        return tokens

    def _task(self, raw: Mapping[str, Any]) -> tuple[int, int, int]:
        """Read tasks, ranks, and the task that is asked for. Raises AdapterRefused."""
        return 0, 0, 0


class _Virtual(FrontKind):
    """Embeddings of virtual tokens."""

    def _width(self, config: FrontConfig, layout: BaseLayout) -> int:
        return next(projection.in_features for projection in layout.projections if projection.reads_hidden)


class PromptTuning(_Virtual):
    """Trained embeddings."""

    name = "prompt_tuning"
    keys = front_keys(
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    )


class PTuning(_Virtual):
    """Embeddings that came out of an MLP or an LSTM."""

    name = "p_tuning"
    keys = front_keys(
        *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
    )


class Cpt(_Virtual):
    """Embeddings of the context's own tokens, moved a little each."""

    name = "cpt"
    keys = front_keys(
        *("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor"),
        *("opt_projection_epsilon", "opt_projection_format_epsilon", "tokenizer_name_or_path"),
    )

    def _tokens(self, raw: Mapping[str, Any]) -> int:
        """PEFT counts the ids where the number itself is not set."""
        ids = raw.get("cpt_token_ids")
        counted = len(ids) if raw.get("num_virtual_tokens") is None and isinstance(ids, list) else None
        return super()._tokens({**raw, **({"num_virtual_tokens": counted} if counted is not None else {})})


class MultitaskPromptTuning(_Virtual):
    """Embeddings shared by tasks, times what a task has of its own."""

    name = "multitask_prompt_tuning"
    keys = front_keys(
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
        *("prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"),
        used=("num_tasks", "num_ranks", TASK),
    )

    def _task(self, raw: Mapping[str, Any]) -> tuple[int, int, int]:
        tasks = read_count(raw.get("num_tasks", 1), "num_tasks")
        return tasks, read_count(raw.get("num_ranks", 1), "num_ranks"), read_task(raw, "num_tasks", tasks)


class PrefixTuning(FrontKind):
    """Keys and values in every layer; a projection is already applied."""

    name = "prefix_tuning"
    keys = front_keys("encoder_hidden_size", "prefix_projection", "init_weights")
    stored = True

    def _width(self, config: FrontConfig, layout: BaseLayout) -> int:
        width = key_width(layout)
        layers, heads, dim = config.shape_of_base
        for key, found, expected in (("num_layers", layers, layout.num_layers), ("token_dim", dim, width)):
            if found not in (None, expected):
                raise AdapterRefused(
                    "shape_mismatch",
                    f"adapter_config.json: {key} is {found}, expected {expected} for base {layout.base_name!r}: the "
                    "layers, and the width of a layer's keys",
                )
        if heads is not None and width % heads:
            raise bad_config(f"num_attention_heads is {heads}; expected a divisor of the keys' width {width}")
        return layout.num_layers * 2 * width


class Cartridge(PrefixTuning):
    """The same, with some of its tokens not trained."""

    name = "cartridge"
    keys = front_keys("num_frozen_tokens")


def key_width(layout: BaseLayout) -> int:
    """Count the values of a layer's keys of one token: all heads of keys together."""
    by_name = {projection.name: projection for projection in layout.projections}
    if "self_attn.k_proj" in by_name:
        return by_name["self_attn.k_proj"].out_features
    fused, out = by_name["self_attn.qkv_proj"], by_name["self_attn.o_proj"]
    return (fused.out_features - out.in_features) // 2


def _optional(raw: Mapping[str, Any], key: str) -> int | None:
    return None if raw.get(key) is None else read_count(raw[key], key)
