"""Find what an adapter's file has outside the base's linears: norms, rows of embed_tokens and of lm_head.

adapter_model.safetensors                                         what it becomes
....layers.N.<norm>.weight, ...norm.weight [H]                    OwnRows, from modules_to_save
....layers.N.<norm>.ln_tuning_layers.weight [H]                   the same, from LN_TUNING
....embed_tokens.weight, lm_head.weight [rows, H]                 OwnRows of what differs from the base's rows
....embed_tokens.base_layer.weight, lm_head.base_layer.weight     the same: PEFT saves it beside a LoRA on the table;
                                                                  of the base's own vocabulary it is the base's table
....embed_tokens.token_adapter.trainable_tokens_delta [k, H]      OwnRows (trainable_token_indices)
....embed_tokens.trainable_tokens_delta [k, H]                    the same, from TRAINABLE_TOKENS

Any kind may have them beside its own tensors, which are what is left. On a base whose head is its embedding, trained
tokens act on both, as in PEFT; whole tables do where the config ties them or where they are the base's own, resized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.config import bad_config, read_flag, read_names, shown
from loraplex.adapters.format.targets import TABLES, Targets
from loraplex.adapters.image.tiles import BaseLayout, OwnRows, PartShape, own_projection, own_shape
from loraplex.kernels.records import OwnPlaces

ROWS = 4096
"""Of a table, compared with the base's at a time: 32 MB of bfloat16 at 4,096 columns."""

OWN_IDS = 4
"""Of own_ids()."""

EMBED, HEAD = TABLES


@dataclass(frozen=True)
class BaseOutside:
    """What the base has outside its linears."""

    norms: tuple[str, ...]  # a layer's, by the index of OwnPlaces.norm; "" where it has none
    vocab: int  # rows of its tables
    hidden: int
    head_dim: int  # of the norms of query and key heads
    tied: bool  # the head is the embedding
    embed_scale: float | None  # of rows of the embedding, in the compute dtype
    quantised: bool  # whether any weights of the checkpoint are
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
    frozen: bool = False  # the base's own, which PEFT saves beside a LoRA on it

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


def own_shapes(own: Sequence[OwnTensor], layout: BaseLayout) -> list[PartShape]:
    """List the shapes that the tensors come to at most."""
    shapes = []
    for tensor in own:
        if tensor.frozen:
            continue
        width, rows = tensor.shape[-1], tensor.shape[0] if len(tensor.shape) > 1 else 1
        counts = [(0, rows)] if tensor.ids is None else [(token, 1) for token in tensor.ids]
        shapes += [_shape(tensor, first, count, width, layout) for first, count in counts]
    return shapes


def added_tokens(own: Sequence[OwnTensor], base: BaseOutside | None) -> int:
    """Return where the ids of tokens end that are beyond the base's, 0 where there are none."""
    ends = [tensor.shape[0] if tensor.ids is None else max(tensor.ids) + 1 for tensor in own if len(tensor.shape) > 1]
    last = max(ends, default=0)
    return last if base is not None and last > base.vocab else 0


def own_ids(own: Sequence[OwnTensor], base: BaseOutside | None) -> tuple[int, ...]:
    """List a few tokens, spread over all, that have rows in place of the base's: trained ones, and added ones."""
    found = set[int]()
    for tensor in own:
        if tensor.ids is not None:
            found.update(tensor.ids)
        elif len(tensor.shape) > 1 and base is not None:
            found.update(range(base.vocab, tensor.shape[0]))
    ids, last = sorted(found), min(len(found), OWN_IDS) - 1
    return tuple(ids[i * (len(ids) - 1) // max(last, 1)] for i in range(last + 1))


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
        if tensor.frozen:
            _check_frozen(tensor, values, base, throttle)
            continue
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


def _check_frozen(tensor: OwnTensor, values: Tensor, base: BaseOutside, throttle: Callable[[], None]) -> None:
    """Raise AdapterRefused where the table that a LoRA was trained on is not the base's, as either's dtype has it."""
    if base.quantised:
        return  # it is the unquantised base's, as all weights that such an adapter was trained beside
    table = base.read(tensor.base_name)
    for start in range(0, len(values), ROWS):
        throttle()
        ours, theirs = table[start : start + ROWS], values[start : start + ROWS]
        least = min((ours.dtype, theirs.dtype), key=lambda dtype: dtype.itemsize)
        same = (ours.to(theirs.dtype).to(least) == theirs.to(ours.dtype).to(least)).all(1)
        if not same.all():
            raise AdapterRefused(
                "shape_mismatch",
                f"{tensor.name}, which a LoRA of the file was trained on, is not the base's: {int((~same).sum())} of "
                f"{len(same)} rows from {start} on differ; the adapter looks made for another base",
            )


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
