"""What config and header alone say of an adapter: which module each tensor is of, and what its image takes at most."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.adapter_files import AdapterHead
from loraplex.adapters.format.header import TensorInfo, parse_header
from loraplex.adapters.format.kind import AdapterConfig, ModuleMap, ServedBase
from loraplex.adapters.format.kinds import KINDS, plan_adapter
from loraplex.adapters.format.outside import added_tokens, own_ids, own_shapes
from loraplex.adapters.image.front_pages import front_bytes
from loraplex.adapters.image.tiles import most_tiles, plan_image
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.tiers.latest import Latest

TENSORS_A_MODULE = 8
"""At most, of any kind; LoRA has A, B, the module's bias, and B's bias or a magnitude, PEANuT two and two a layer."""

MAX_MODULE_MAPS = 32
"""Some 250 KB each. A folder of thousands has a handful."""


@dataclass(frozen=True)
class Outline:
    """A ModuleMap and what an image of it takes at most."""

    key: Hashable
    module_map: ModuleMap
    info: AdapterInfo


class Outlines:
    """Make outlines, and remember the latest: adapters of the same config and header share one."""

    def __init__(self, base: ServedBase, max_pages: int) -> None:
        """max_pages: what an adapter may take."""
        self._base = base
        self._max_pages = max_pages
        self._known: Latest[Outline] = Latest(MAX_MODULE_MAPS)
        self._headers: Latest[dict[str, TensorInfo]] = Latest(MAX_MODULE_MAPS)

    def find(self, head: AdapterHead, config: AdapterConfig, throttle: Callable[[], None]) -> Outline:
        """Return the outline of these files, made where it is not known. Raises AdapterRefused."""
        key = (config, header_key(head))
        outline = self._known.get(key)
        if outline is None:
            throttle()
            header = self._headers.get(key[1]) or self.parse_header(head, KINDS[config.kind].integers)
            throttle()
            module_map = plan_adapter(config, header, self._base, throttle)
            throttle()
            layout = self._base.layout
            shapes = (*module_map.shapes, *own_shapes(module_map.own, layout))
            plan, front = plan_image(shapes, layout), module_map.front
            nbytes = plan.nbytes if front is None else front_bytes(front.tokens, front.width, layout.dtype)
            most = self._pages(module_map, plan.num_pages)
            info = AdapterInfo(
                module_map.rank,
                module_map.targets,
                most if front is None else -(-nbytes // layout.page_bytes),
                nbytes,
                num_tiles=most_tiles(shapes, layout, plan.num_pages),
                kind=module_map.kind,
                tokens=added_tokens(module_map.own, self._base.outside),
                own_ids=own_ids(module_map.own, self._base.outside),
                alone=" and ".join(dict.fromkeys(tensor.short for tensor in module_map.own if not tensor.frozen)),
                invocation=config.invocation,
                front=front,
                positions=config.positions,
            )
            outline = Outline(key, module_map, info)
            self._known.put(key, outline)
            self._headers.put(key[1], header)  # it fits the base: no larger than what is planned for
        self.check_pages(outline.info.num_pages)
        return outline

    def _pages(self, module_map: ModuleMap, most: int) -> int:
        """Bound an adapter's pages.

        A whole table may turn out to be the base's own but for a few rows: no more pages are planned for it than there
        can be, and if it needs them the image is refused.
        """
        if most <= self._max_pages or all(tensor.ids is not None or tensor.frozen for tensor in module_map.own):
            return most
        return max(self._max_pages, plan_image(module_map.shapes, self._base.layout).num_pages)

    def check_pages(self, num_pages: int) -> None:
        """Raise AdapterRefused("too_large") for more pages than an adapter may take."""
        if num_pages > self._max_pages:
            raise AdapterRefused(
                "too_large",
                f"the adapter takes {num_pages} pages, but only {self._max_pages} can be had beside one sequence; give "
                "the server more memory (--memory)",
            )

    def parse_header(self, head: AdapterHead, integers: bool) -> dict[str, TensorInfo]:
        """Parse the header within bounds. Raises AdapterRefused."""
        most = TENSORS_A_MODULE * self._base.layout.num_layers * len(self._base.layout.projections)
        return parse_header(head, most, integers=integers)


def header_key(head: AdapterHead) -> Hashable:
    """Return what stands for the names, types and places of all tensors."""
    return hashlib.sha256(head.header).digest(), head.data_bytes
