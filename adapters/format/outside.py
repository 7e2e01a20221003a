"""Find what an adapter's file has outside the base's linears: norms, rows of embed_tokens and of lm_head.

adapter_model.safetensors                                         what it becomes
....layers.N.<norm>.weight, ...norm.weight [H]                    OwnRows, from modules_to_save
....layers.N.<norm>.ln_tuning_layers.weight [H]                   the same, from LN_TUNING
....embed_tokens.weight, lm_head.weight [rows, H]                 OwnRows of what differs from the base's rows
....embed_tokens.base_layer.weight, lm_head.base_layer.weight     the same: PEFT saves it beside a LoRA on the table
....embed_tokens.token_adapter.trainable_tokens_delta [k, H]      OwnRows (trainable_token_indices)
....embed_tokens.trainable_tokens_delta [k, H]                    the same, from TRAINABLE_TOKENS

Any kind may have them beside its own tensors, which are what is left. On a base whose head is its embedding, trained
tokens act on both, as in PEFT; whole tables do where the config ties them or where they are the base's own, resized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.config import bad_config, read_flag, read_names, shown, unsupported
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.targets import PATTERN_SECONDS, Targets, find_targets
from loraplex.adapters.image.tiles import BaseLayout, OwnRows, PartShape, own_projection, own_shape
from loraplex.kernels.records import OwnPlaces

MAX_ADDED = 4096
"""Rows of a table beyond the base's. Added tokens are a handful, and tables are padded to a multiple of 64 or 128; each
row is a column of the logits of a step."""

ROWS = 4096
"""Of a table, compared with the base's at a time: 32 MB of bfloat16 at 4,096 columns."""

EMBED, HEAD = "embed_tokens", "lm_head"
TUNED = "ln_tuning_layers.weight"
_WHOLE = frozenset({"weight", "base_layer.weight"})
_TOKENS = frozenset({"token_adapter.trainable_tokens_delta", "trainable_tokens_delta"})
_NAME = re.compile(
    r"base_model\.model\.(?:(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.|)"
    r"(?:layers\.(?P<layer>[0-9]{1,4})\.(?P<norm>(?:self_attn\.)?[a-z_]*norm)|(?P<table>embed_tokens)|norm)"
    r"|(?P<head>lm_head))\.(?P<leaf>.+)"
)


@dataclass(frozen=True)
class BaseOutside:
    """What the base has outside its linears."""

    norms: tuple[str, ...]  # a layer's, by the index of OwnPlaces.norm; "" where it has none
    vocab: int  # rows of its tables
    hidden: int
    tied: bool  # the head is the embedding
    embed_scale: float | None  # of rows of the embedding, in the compute dtype
    read: Callable[[str], Tensor]
    """Name in the checkpoint -> the tensor; a quantised one in the compute dtype."""


@dataclass(frozen=True)
class OwnConfig:
    """What a config says of modules outside the linears."""

    saved: tuple[str, ...] = ()  # modules_to_save: ends of paths
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()  # trainable_token_indices: (table, ids)
    tuned: Targets | None = None  # LN_TUNING's norms
    ties: bool = False  # ensure_weight_tying


@dataclass(frozen=True)
class OwnTensor:
    """A tensor of the file that stands in place of rows of the base."""

    name: str  # in the file
    base_name: str  # in the checkpoint
    place: int  # of OwnPlaces
    shape: tuple[int, ...]
    ids: tuple[int, ...] | None  # of its rows; None: all there are

    @property
    def short(self) -> str:
        """Return the last name of the module."""
        return self.base_name.removesuffix(".weight").rpartition(".")[2]


def read_own(raw: Mapping[str, Any]) -> OwnConfig:
    """Read the keys about modules outside the linears. Raises AdapterRefused: "bad_config"."""
    saved = read_names(raw, "modules_to_save") if raw.get("modules_to_save") else ()
    tokens = raw.get("trainable_token_indices") or {}
    given = tokens if isinstance(tokens, dict) else {EMBED: tokens}
    return OwnConfig(
        saved=(saved,) if isinstance(saved, str) else saved,
        tokens=tuple((name, read_ids(ids, f"trainable_token_indices[{name!r}]")) for name, ids in given.items()),
        ties=read_flag(raw, "ensure_weight_tying"),
    )


def read_ids(value: Any, key: str) -> tuple[int, ...]:
    """Read ids of tokens, each once. Raises AdapterRefused("bad_config")."""
    if not isinstance(value, list) or not value or not all(type(i) is int and 0 <= i < 1 << 31 for i in value):
        raise bad_config(f"{key} is {shown(value)}; expected a list of ids of tokens")
    if len(set(value)) != len(value):
        raise bad_config(f"{key} names an id twice")
    return tuple(value)


def match_own(
    config: OwnConfig, header: Mapping[str, TensorInfo], layout: BaseLayout, base: BaseOutside | None
) -> tuple[tuple[OwnTensor, ...], dict[str, TensorInfo]]:
    """Find the tensors in place of the base's rows, in order of places; and those that are left for the kind.

    Raises AdapterRefused: "unsupported_option" for other modules that the config wants saved, "missing_tensor",
    "unmatched_tensor", "shape_mismatch", "too_large".
    """
    if base is None:
        if config != OwnConfig(ties=config.ties):
            raise unsupported(f"{_wanted_key(config)} is set, which is not served beside this base")
        return (), dict(header)
    modules = _Modules(layout, base)
    wanted = modules.wanted(config)
    found: dict[str, OwnTensor] = {}
    rest = dict(header)
    for name in sorted(header):
        match = _NAME.fullmatch(name.replace("_orig_mod.", ""))
        path = None if match is None else modules.path_of(match)
        if match is None or path is None:
            continue
        tensor = modules.tensor(name, match["leaf"], path, header[name], config, wanted)
        if tensor is None:
            continue
        if path in found:
            raise AdapterRefused("unmatched_tensor", f"{name} and {found[path].name} are the same thing twice")
        found[path] = tensor
        del rest[name]
    for path, key in wanted.items():
        if path not in found:
            raise AdapterRefused("missing_tensor", f"the file has no tensor of {path}, which {key} asks for")
    modules.tie(found, config)
    modules.check_added(found)
    return tuple(sorted(found.values(), key=lambda tensor: tensor.place)), rest


def own_shapes(own: Sequence[OwnTensor], layout: BaseLayout) -> list[PartShape]:
    """List the shapes that the tensors come to at most."""
    shapes = []
    for tensor in own:
        width, rows = tensor.shape[-1], tensor.shape[0] if len(tensor.shape) > 1 else 1
        counts = [(0, rows)] if tensor.ids is None else [(token, 1) for token in tensor.ids]
        shapes += [_shape(tensor, first, count, width, layout) for first, count in counts]
    return shapes


def added_tokens(own: Sequence[OwnTensor], base: BaseOutside | None) -> int:
    """Return where the ids of tokens end that are beyond the base's, 0 where there are none."""
    ends = [tensor.shape[0] if tensor.ids is None else max(tensor.ids) + 1 for tensor in own if len(tensor.shape) > 1]
    last = max(ends, default=0)
    return last if base is not None and last > base.vocab else 0


def own_parts(
    own: Sequence[OwnTensor],
    tensors: Mapping[str, Tensor],
    layout: BaseLayout,
    base: BaseOutside | None,
    throttle: Callable[[], None],
) -> Iterator[OwnRows]:
    """Make what the tensors come to: rows that are the base's own are left out. Raises AdapterRefused("not_finite")."""
    places = OwnPlaces(layout.num_layers)
    for tensor in own:
        assert base is not None, "match_own() finds nothing without it"
        throttle()
        values = tensors[tensor.name]
        if not values.isfinite().all():
            raise AdapterRefused("not_finite", f"{tensor.name} has values that are NaN or infinite; expected none")
        if tensor.place <= places.last_norm:
            if not torch.equal(values.to(layout.dtype), base.read(tensor.base_name).to(layout.dtype)):
                yield _rows(tensor, 0, values.float()[None], layout)
            continue
        for ids, rows in _changed(tensor, values, layout, base, throttle):
            if tensor.place == places.embed and base.embed_scale is not None:
                rows = rows * torch.tensor(base.embed_scale, dtype=layout.dtype)
            yield from (_rows(tensor, ids[a], rows[a:b], layout) for a, b in _runs(ids))


def _changed(
    tensor: OwnTensor, values: Tensor, layout: BaseLayout, base: BaseOutside, throttle: Callable[[], None]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (ids, rows [n, H] in the compute dtype) of a table's rows that differ from the base's, ids ascending."""
    table = base.read(tensor.base_name)
    ids = torch.arange(len(values)) if tensor.ids is None else torch.tensor(tensor.ids)
    ids, order = ids.sort()
    for start in range(0, len(ids), ROWS):
        throttle()
        some = ids[start : start + ROWS]
        rows = values[order[start : start + ROWS]].to(layout.dtype)
        known = some < base.vocab
        differs = torch.ones(len(some), dtype=torch.bool)
        differs[known] = (rows[known] != table[some[known]].to(layout.dtype)).any(1)
        if differs.any():
            yield some[differs].tolist(), rows[differs]


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut ascending ids into runs of neighbours: (first, past the last) of each."""
    first = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield first, i
            first = i


def _rows(tensor: OwnTensor, first: int, rows: Tensor, layout: BaseLayout) -> OwnRows:
    shape = _shape(tensor, first, rows.shape[0], rows.shape[1], layout)
    return OwnRows(shape.layer, shape.projection, rows)


def _shape(tensor: OwnTensor, first: int, count: int, width: int, layout: BaseLayout) -> PartShape:
    name = tensor.base_name.removesuffix(".weight")
    return own_shape(layout.num_layers, own_projection(name, tensor.place, first, count, width))


def _wanted_key(config: OwnConfig) -> str:
    return "modules_to_save" if config.saved else "trainable_token_indices" if config.tokens else "target_modules"


class _Modules:
    """The base's modules outside its linears, by their names in the checkpoint without ".weight"."""

    def __init__(self, layout: BaseLayout, base: BaseOutside) -> None:
        self._base = base
        self._places = places = OwnPlaces(layout.num_layers)
        self._layers = range(layout.num_layers)
        self.norms = {
            f"model.layers.{layer}.{name}": places.norm(layer, index)
            for layer in self._layers
            for index, name in enumerate(base.norms)
            if name
        }
        self.norms["model.norm"] = places.last_norm
        self.embed, self.head = "model.embed_tokens", "lm_head"
        self._known = {**self.norms, self.embed: places.embed, self.head: places.head}

    def path_of(self, match: re.Match[str]) -> str | None:
        """Return the path of the module that a tensor's name is of; None where the base has none such."""
        if match["layer"] is not None:
            path = f"model.layers.{int(match['layer'])}.{match['norm']}"
        else:
            path = self.head if match["head"] else self.embed if match["table"] else "model.norm"
        return path if path in self._known else None

    def wanted(self, config: OwnConfig) -> dict[str, str]:
        """Map the paths whose tensors have to be there to the key of the config that says so."""
        found: dict[str, str] = {}
        for name in config.saved:
            paths = [path for path in self._known if path.endswith(name)]
            if not paths:
                raise unsupported(
                    f"modules_to_save names {name!r}; norms, embed_tokens and lm_head of the base are served whole, "
                    "others are not: train them with an adapter"
                )
            found |= dict.fromkeys(paths, "modules_to_save")
        for name, ids in config.tokens:
            paths = [path for path in (self.embed, self.head) if path.endswith(name)]
            if not paths:
                raise unsupported(f"trainable_token_indices names {name!r}; expected embed_tokens or lm_head")
            if max(ids) >= self._base.vocab + MAX_ADDED:
                raise _too_many(f"trainable_token_indices names the token {max(ids)}", self._base.vocab)
            found |= dict.fromkeys(paths, "trainable_token_indices")
        if config.tuned is not None:
            match = Matcher(PATTERN_SECONDS, lambda: None)
            found |= dict.fromkeys(find_targets(config.tuned, self.norms, (), match), "target_modules")
        tied = self._base.tied and self.embed in found
        if tied and (config.ties or found[self.embed] == "trainable_token_indices"):
            found.pop(self.head, None)  # it is the embedding's
        return found

    def tensor(
        self,
        name: str,
        leaf: str,
        path: str,
        info: TensorInfo,
        config: OwnConfig,
        wanted: Mapping[str, str],
    ) -> OwnTensor | None:
        """Return the tensor as what stands in place of `path`; None: it is not such, but the kind's own affair."""
        base, place, ids = self._base, self._known[path], None
        if path in self.norms:
            if not (leaf == TUNED or (leaf == "weight" and wanted.get(path) == "modules_to_save")):
                return None
            if path not in wanted:
                raise AdapterRefused("unmatched_tensor", f"{name} is in the file, but the config does not target it")
            expected: tuple[int, ...] = (base.hidden,)
        elif leaf in _WHOLE:
            expected = (max(base.vocab, info.shape[0] if info.shape else 0), base.hidden)
            if expected[0] > base.vocab + MAX_ADDED:
                raise _too_many(f"{name} has {expected[0]} rows", base.vocab)
        elif leaf in _TOKENS:
            tables = (path, self.embed) if base.tied else (path,)  # TRAINABLE_TOKENS saves a tied head's twice
            ids = next((ids for table in tables for end, ids in config.tokens if table.endswith(end)), None)
            if ids is None:
                raise AdapterRefused("unmatched_tensor", f"{name} is in the file, but the config names no such tokens")
            expected = (len(ids), base.hidden)
        else:
            return None
        if info.shape != expected:
            raise AdapterRefused(
                "shape_mismatch",
                f"{name} has shape {list(info.shape)}, expected {list(expected)}; the adapter looks made for another "
                "base",
            )
        return OwnTensor(name, f"{path}.weight", place, info.shape, ids)

    def tie(self, found: dict[str, OwnTensor], config: OwnConfig) -> None:
        """Have what was found for one table act on the other, where PEFT has it so."""
        if not self._base.tied:
            return
        for path, other in ((self.embed, self.head), (self.head, self.embed)):
            tensor = found.get(path)
            if tensor is None or other in found:
                continue
            saved = any(path.endswith(name) for name in config.saved)
            if config.ties or not saved:
                found[other] = OwnTensor(tensor.name, self._table(), self._known[other], tensor.shape, tensor.ids)
        for path in {self.head} & found.keys():
            tensor = found[path]
            found[path] = OwnTensor(tensor.name, self._table(), tensor.place, tensor.shape, tensor.ids)

    def check_added(self, found: Mapping[str, OwnTensor]) -> None:
        """Raise AdapterRefused where tokens beyond the base's have a row in one table and none in the other."""
        added = {path: added_ids(found.get(path), self._base.vocab) for path in (self.embed, self.head)}
        if added[self.embed] != added[self.head]:
            token = min(added[self.embed] ^ added[self.head])
            absent = self.head if token in added[self.embed] else self.embed
            raise AdapterRefused(
                "missing_tensor",
                f"the token {token} is beyond the base's {self._base.vocab} and has no row of {absent} in the file; "
                "save both tables with the adapter (PEFT's save_embedding_layers=True)",
            )

    def _table(self) -> str:
        """Return the checkpoint's name of the one table of a tied base."""
        return f"{self.embed}.weight"


def added_ids(tensor: OwnTensor | None, vocab: int) -> set[int]:
    """List the ids beyond the base's that a tensor has rows for."""
    if tensor is None:
        return set()
    return {i for i in tensor.ids if i >= vocab} if tensor.ids is not None else set(range(vocab, tensor.shape[0]))


def _too_many(what: str, vocab: int) -> AdapterRefused:
    return AdapterRefused(
        "too_large", f"{what}; the base has {vocab}, and up to {MAX_ADDED} tokens beside them are served"
    )
