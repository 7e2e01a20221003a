"""What an adapter has outside the base's linears, as its file has it: for who computes it without tiles or packing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.kind import ModuleMap, ServedBase, Throttle
from loraplex.adapters.format.kinds import make_parts
from loraplex.adapters.image.tiles import LowRank
from loraplex.kernels.records import OwnPlaces


@dataclass(frozen=True)
class PlainOutside:
    """Rows in place of the base's, and what is added to its tables; nothing of it is rounded or left out."""

    rows: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By the place (OwnPlaces): numbers [k] int64 of rows, and these [k, n] as in the file; a norm is one row."""

    factors: Sequence[LowRank] = ()  # of the tables; the site is TableSite's
    tables: tuple[int, ...] = ()  # their places

    @property
    def tokens(self) -> int:
        """Return where the ids end that it has rows for; 0: it has none."""
        return max((1 + int(ids.max()) for ids, _ in self.rows.values()), default=0)

    def worn(self, ids: Iterable[int]) -> int:
        """Count those of `ids` that have a row of its own in a table, or one that is changed."""
        own = {i for place in self.tables if place in self.rows for i in self.rows[place][0].tolist()}
        return sum(bool(self.factors) or i in own for i in ids)


def read_outside(
    module_map: ModuleMap, tensors: Mapping[str, Tensor], base: ServedBase, throttle: Throttle
) -> PlainOutside:
    """Find it among the tensors of the file, which are viewed and not copied. Raises AdapterRefused as parts do."""
    rows = {}
    for tensor in module_map.own:
        if not tensor.frozen:
            values = tensors[tensor.name]
            values = values if values.dim() > 1 else values[None]
            ids = torch.arange(len(values)) if tensor.ids is None else torch.tensor(tensor.ids)
            rows[tensor.place] = (ids, values)
    places = OwnPlaces(base.layout.num_layers)
    return PlainOutside(rows, _factors(module_map, tensors, base, throttle), (places.embed, places.head))


def _factors(
    module_map: ModuleMap, tensors: Mapping[str, Tensor], base: ServedBase, throttle: Throttle
) -> list[LowRank]:
    modules = tuple(module for module in module_map.modules if module.is_table)
    if not modules:
        return []
    tables = replace(module_map, modules=modules)
    try:
        parts = list(make_parts(tables, (), tensors, base, throttle))
    except AdapterRefused as error:
        if error.code == "no_effect":  # of the tables alone
            return []
        raise
    return [part for part in parts if isinstance(part, LowRank)]
