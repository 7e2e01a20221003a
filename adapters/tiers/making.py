"""Make an adapter's image of its bytes: pairs of A and B by a PackPlan without the GIL, all else part by part."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.adapter_files import AdapterBytes
from loraplex.adapters.format.header import view_tensors
from loraplex.adapters.format.kind import FactorPair, ServedBase
from loraplex.adapters.format.kinds import KINDS, make_parts, make_rows
from loraplex.adapters.format.pack_plan import PackPlan
from loraplex.adapters.image.front_pages import pack_front
from loraplex.adapters.image.tiles import AdapterImage, BiasDelta, shape_of
from loraplex.adapters.image.writing import pack, pack_each
from loraplex.adapters.tiers.latest import Latest
from loraplex.adapters.tiers.outline import Outline
from loraplex.adapters.tiers.workspace import Workspace
from loraplex.kernels.hugepages import Region, huge_zeros

MAX_PACK_PLANS = 128
"""Some 50 KB each, 150 KB on all linears."""


class ImageMaker:
    """Make images; adapters of the same outline share a PackPlan."""

    def __init__(self, base: ServedBase, workspace: Workspace[Region] | None, allow_noop: bool) -> None:
        """workspace, allow_noop: as for AdapterReader."""
        self._base = base
        self._workspace = workspace
        self._allow_noop = allow_noop
        self._plans: Latest[PackPlan] = Latest(MAX_PACK_PLANS)

    def make(
        self, outline: Outline, files: AdapterBytes, throttle: Callable[[], None]
    ) -> tuple[AdapterImage, Hashable | None]:
        """Make the image, and the key of its PackPlan, if it has one.

        What changes nothing, where that is allowed, is made to add a bias of 0: without any tile it would have no page,
        and what has no page on the device is not there.
        """
        try:
            return self._make(outline, files, throttle)
        except AdapterRefused as error:
            if error.code != "no_effect" or not self._allow_noop:
                raise
            layout = self._base.layout
            first = layout.projections[0]
            return pack([BiasDelta(0, first, torch.zeros(first.out_features))], layout), None

    def _make(
        self, outline: Outline, files: AdapterBytes, throttle: Callable[[], None]
    ) -> tuple[AdapterImage, Hashable | None]:
        module_map = outline.module_map
        if module_map.pairs:
            key: Hashable = (outline.key, None)
            plan = self._plan(key, module_map.pairs)
            image, sound = plan.make(files.data, self.memory(plan.nbytes), throttle)
            if sound:
                return image, key
        tensors = view_tensors(files.data, module_map.header)
        if module_map.front is not None:
            front = KINDS[module_map.kind].front(module_map, tensors, self._base.layout, throttle)
            return pack_front(front, self._base.layout), None
        rows = make_rows(module_map, tensors, self._base, throttle)
        made = make_parts(module_map, rows, tensors, self._base, throttle)
        if module_map.making_bytes:
            return pack_each(made, (*module_map.shapes, *map(shape_of, rows)), self._base.layout), None
        parts = list(made)
        if module_map.pairs:
            left = frozenset((part.layer, part.projection.name) for part in parts)
            key = (outline.key, left)
            some = [pair for pair in module_map.pairs if (pair.shape.layer, pair.shape.projection.name) in left]
            plan = self._plan(key, some)
            image, _ = plan.make(files.data, self.memory(plan.nbytes), throttle)
            return image, key
        return pack(parts, self._base.layout), None

    def known_plan(self, key: Hashable) -> PackPlan | None:
        """Return the PackPlan that make() gave this key, while it is remembered."""
        return self._plans.get(key)

    def _plan(self, key: Hashable, pairs: Sequence[FactorPair]) -> PackPlan:
        return self._plans.get(key) or self._plans.put(key, PackPlan(pairs, self._base.layout))

    def memory(self, nbytes: int) -> Tensor:
        """Return [nbytes] uint8 holding anything: what an earlier load has left, if there is such."""
        if self._workspace is None or not nbytes:
            return huge_zeros(nbytes)
        region = self._workspace.find(nbytes) or Region(nbytes)
        return region.tensor(nbytes, self._workspace.leave)
