"""Measure an adapter's files: read again, module after module, by a thread that nobody waits for with a stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.effect import ModuleEffect, base_square, measure_module, ratio
from loraplex.adapters.format.kind import ServedBase
from loraplex.adapters.image.tiles import Part
from loraplex.adapters.receipt import Measured, SiteEffect
from loraplex.adapters.tiers.reader import AdapterReader, OpenContent


def by_layer(content: OpenContent) -> Iterator[tuple[int, list[Part]]]:
    """Give each layer's parts, those of one layer being in memory at a time."""
    for layer, parts in groupby(content.parts(), key=lambda part: part.layer):
        yield layer, list(parts)


class Measurer:
    """Opens contents of adapters. Any thread may; each opening takes the room of a load."""

    def __init__(self, reader: AdapterReader, base: ServedBase) -> None:
        """base: what `reader` checks adapters against."""
        self._reader = reader
        self._base = base

    @contextmanager
    def opened(self, source: str, throttle: Callable[[], None]) -> Iterator[OpenContent]:
        """Read all of `source`; a no-op has no parts. Raises as AdapterReader.opened() does."""
        with self._reader.opened(source, throttle) as content:

            def effective() -> Iterator[Part]:
                try:
                    yield from content.parts()
                except AdapterRefused as error:
                    if error.code != "no_effect":
                        raise

            yield replace(content, parts=effective)

    def measure(self, adapter: OpenContent, throttle: Callable[[], None]) -> Measured:
        """Measure `adapter`, calling `throttle` between modules. WeightsError where the base's files are gone."""
        effects: dict[int, dict[int, ModuleEffect]] = defaultdict(dict)  # site -> layer -> sum of its modules
        modules: dict[int, int] = defaultdict(int)  # by site
        for (layer, site, _), parts in groupby(adapter.parts(), key=_module_of):
            throttle()
            effect = measure_module(list(parts), self._base)
            modules[site] += 1
            known = effects[site].get(layer)
            effects[site][layer] = effect if known is None else _sum((known, effect))
        header = adapter.module_map.header.values()
        linears = sum(not module.is_table for module in adapter.module_map.modules)
        total = _sum(effect for layers in effects.values() for effect in layers.values())
        squares = self._base_squares(throttle)
        return Measured(
            digest=adapter.digest,
            kind=adapter.module_map.kind,
            rank=adapter.module_map.rank,
            tensors=len(header),
            ignored=tuple(sorted(adapter.names - adapter.module_map.header.keys())),
            dtypes=tuple(sorted({str(info.dtype).removeprefix("torch.") for info in header})),
            dtype=str(self._base.layout.dtype).removeprefix("torch."),
            modules=linears,
            idle=max(0, linears - sum(modules.values())),
            sites=tuple(
                self._site(site, modules[site], effects[site], squares)
                for site in sorted(effects)
                if _sum(effects[site].values()).weight > 0
            ),
            relative=ratio(total.weight, sum(squares.values())),
            rounding=ratio(total.rounded, total.added),
            bias=total.bias**0.5,
            own=adapter.module_map.outside,
            base_named=adapter.module_map.config.base_model,
            card=adapter.card,
        )

    def _base_squares(self, throttle: Callable[[], None]) -> dict[tuple[int, int], float]:
        """Sum |W|^2 by layer and site. The base keeps its rows' norms: the first call reads all of its weights."""
        squares: dict[tuple[int, int], float] = defaultdict(float)
        for layer in range(self._base.layout.num_layers):
            for projection in self._base.layout.projections:
                throttle()
                squares[layer, projection.site] += base_square(layer, projection, self._base)
        return squares

    def _site(
        self, site: int, modules: int, layers: dict[int, ModuleEffect], squares: dict[tuple[int, int], float]
    ) -> SiteEffect:
        whole = _sum(layers.values())
        shares = {layer: ratio(effect.weight, squares[layer, site]) for layer, effect in layers.items()}
        layer = max(shares, key=lambda each: shares[each])
        projections = (p.name.rpartition(".")[2] for p in self._base.layout.projections if p.site == site)
        return SiteEffect(
            projections=tuple(projections),
            modules=modules,
            relative=ratio(whole.weight, sum(s for (_, where), s in squares.items() if where == site)),
            largest=shares[layer],
            layer=layer,
            rounding=ratio(whole.rounded, whole.added),
        )


def _module_of(part: Part) -> tuple[int, int, str]:
    return part.layer, part.projection.site, part.projection.name


def _sum(effects: Iterable[ModuleEffect]) -> ModuleEffect:
    found = list(effects)
    return ModuleEffect(
        weight=sum(effect.weight for effect in found),
        added=sum(effect.added for effect in found),
        rounded=sum(effect.rounded for effect in found),
        bias=sum(effect.bias for effect in found),
    )
