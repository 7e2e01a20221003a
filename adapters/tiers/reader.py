"""From an adapter's source to its image: what the loader's threads do, and what they remember from time to time.

    examine   config and header only                                         registration: 0.1 ms, 3 ms for a new shape
    read      all of the files: hashed, checked, packed                      first load of 4 MB: 7 ms
              the same files again, by their stamps: read and packed         2 ms

Adapters of the same config and header share a ModuleMap and a PackPlan; what is remembered of each single one is
its stamp and digest, or why it was refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused, about_folder
from loraplex.adapters.files.beneath import opened, roots_of
from loraplex.adapters.files.model_card import Card, read_card
from loraplex.adapters.files.tokenizer_files import NOTHING, TokenizerFiles
from loraplex.adapters.format.adapter_files import (
    AdapterBytes,
    AdapterHead,
    ChangedMeanwhile,
    NoFolder,
    Stamp,
    known_weights,
    read_head,
    read_tokenizer,
)
from loraplex.adapters.format.header import TensorInfo, parse_header, view_tensors
from loraplex.adapters.format.kind import AdapterConfig, FactorPair, ModuleMap, ServedBase
from loraplex.adapters.format.kinds import KINDS, make_parts, make_rows, parse_config, plan_adapter
from loraplex.adapters.format.other_base import remark_on_base
from loraplex.adapters.format.outside import added_tokens, own_shapes
from loraplex.adapters.format.pack_plan import PackPlan
from loraplex.adapters.format.quiet_files import read_quietly
from loraplex.adapters.image.front_pages import front_bytes, pack_front
from loraplex.adapters.image.packing import OpenFile
from loraplex.adapters.image.tiles import (
    AdapterImage,
    BiasDelta,
    Part,
    most_tiles,
    pack,
    pack_each,
    plan_image,
    shape_of,
)
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.sources.sources import resolve
from loraplex.adapters.throttle import Throttle
from loraplex.adapters.tiers.latest import Latest
from loraplex.adapters.tiers.loader import LoadedContent, Reading
from loraplex.adapters.tiers.workspace import Workspace
from loraplex.kernels.hugepages import Region, huge_zeros

logger = logging.getLogger(__name__)

TENSORS_A_MODULE = 8
"""At most, of any kind; LoRA has A, B, the module's bias, and B's bias or a magnitude, PEANuT two and two a layer."""

MAX_MODULE_MAPS = 32
"""Some 250 KB each. A folder of thousands has a handful."""

MAX_PACK_PLANS = 128
"""Some 50 KB each, 150 KB on all linears."""

MAX_TOKENIZERS = 256
"""Some 10 KB each, a template mostly."""

MAX_REMEMBERED = 16_384
"""Sources, some 1 KB each."""


@dataclass(frozen=True)
class _Drawn:
    """A ModuleMap and what an image of it takes at most."""

    key: Hashable
    module_map: ModuleMap
    info: AdapterInfo


@dataclass(frozen=True)
class _Place:
    """Where a source's files are, and what they must not be led out of (beneath.py)."""

    folder: Path
    roots: tuple[Path, ...]


@dataclass(frozen=True)
class _Remembered:
    """Of a source, from its last reading. Holds as long as the stamp does."""

    place: _Place
    stamp: Stamp
    start: int  # of the data
    info: AdapterInfo | None = None
    plan: Hashable = None  # its key; None: it has to be packed part by part
    refusal: AdapterRefused | None = None


@dataclass(frozen=True)
class OpenContent:
    """An adapter whose bytes are in memory."""

    digest: str
    card: Card
    module_map: ModuleMap
    names: frozenset[str]  # of all tensors in the file
    parts: Callable[[], Iterable[Part]]  # of the layers' linears, made anew at each call


class AdapterReader:
    """`read` is what loaders' threads call, several at once."""

    def __init__(
        self,
        base: ServedBase,
        max_pages: int,
        workspace: Workspace[Region] | None = None,
        locate: Callable[[str], Path] = resolve,
        check_tokenizer: Callable[[TokenizerFiles, int], str] = lambda files, tokens: "",
        allow_noop: bool = False,
    ) -> None:
        """max_pages: what an adapter may take so that one sequence still fits beside it.

        workspace: bounds what all loads under way take together; None: nothing does. locate: a source's folder.
        check_tokenizer: what tokenizer files change, in words; raises AdapterRefused for those the base cannot go with,
        whose ids end at the number given where the adapter has added tokens (0: none).
        allow_noop: an adapter that changes nothing is served, as a bias of zeros.
        """
        self._allow_noop = allow_noop
        self._check_tokenizer = check_tokenizer
        self._locate = locate
        self._workspace = workspace
        self._base = base
        self._max_pages = max_pages
        self._drawn: Latest[_Drawn] = Latest(MAX_MODULE_MAPS)
        self._infos: Latest[AdapterInfo] = Latest(MAX_PACK_PLANS)  # whatever the scaling
        self._headers: Latest[dict[str, TensorInfo]] = Latest(MAX_MODULE_MAPS)
        self._plans: Latest[PackPlan] = Latest(MAX_PACK_PLANS)
        self._tokenizers: Latest[TokenizerFiles] = Latest(MAX_TOKENIZERS)
        self._remarks: Latest[str] = Latest(MAX_MODULE_MAPS)  # that are in the log
        self._remembered: Latest[_Remembered] = Latest(MAX_REMEMBERED)

    def examine(self, source: str) -> AdapterInfo:
        """Check what can be checked without the weights' values. Reads only config and header.

        Raises AdapterNotFound, and AdapterRefused with the folder's path before the reason.
        """
        roots = roots_of(source)
        place = _Place(Path(source), roots) if roots else self._place(source)
        with about_folder(place.folder):
            try:
                head = read_head(place.folder, place.roots)
            except NoFolder:
                self._locate(source)  # it says more
                raise
            config = parse_config(head.config)
            key = (config.same_shapes(), _key_of(head))
            info = self._infos.get(key) or self._infos.put(key, self._draw(head, config, Throttle(lambda: None)).info)
            return replace(info, tokenizer=self._tokenizer(place, info.tokens), remark=self._remark(place, config))

    def read(self, reading: Reading) -> LoadedContent:
        """Read, check and pack an adapter. Raises as examine() does, and what reading.throttle() raises.

        Files that have the stamp they had are neither parsed, nor checked, nor hashed again, unless reading.fresh.
        """
        known = None if reading.fresh else self._remembered.get(reading.source)
        is_there = known is not None and os.path.isdir(known.place.folder)
        place = known.place if known is not None and is_there else self._place(reading.source)
        with about_folder(place.folder):
            if known is not None:
                parsed = self._repeat(known, reading)
                if parsed is not None:
                    return parsed
            with self._room(self._whole_bytes(place, reading.throttle), reading.throttle):
                return self._read_whole(place, reading)

    @contextmanager
    def opened(self, source: str, throttle: Callable[[], None]) -> Iterator[OpenContent]:
        """Read all of `source`, for as long as the block lasts.

        Raises as read() does, and so do the parts while they are made.
        """
        place = self._place(source)
        with about_folder(place.folder), self._room(self._whole_bytes(place, throttle), throttle):
            files, _ = read_quietly(place.folder, place.roots, throttle, self._memory)
            drawn = self._draw(files.head, parse_config(files.head.config), throttle)
            module_map = drawn.module_map
            tensors = view_tensors(files.data, module_map.header)
            with opened(place.folder, place.roots) as folder:
                card = read_card(folder)
            yield OpenContent(
                digest=self._tokenizer(place, drawn.info.tokens).mark(files.digest),
                card=card,
                module_map=module_map,
                names=frozenset(self._parse_header(files.head, KINDS[module_map.config.kind].integers)),
                parts=lambda: self._of_linears(make_parts(module_map, (), tensors, self._base, throttle)),
            )

    def _of_linears(self, parts: Iterable[Part]) -> Iterator[Part]:
        return (part for part in parts if part.layer < self._base.layout.num_layers)

    def _place(self, source: str) -> _Place:
        return _Place(self._locate(source), roots_of(source))

    def _whole_bytes(self, place: _Place, throttle: Callable[[], None]) -> int:
        """What the file, its image and the making of it take. Raises what refuses the header."""
        if self._workspace is None:
            return 0
        head = read_head(place.folder, place.roots)
        drawn = self._draw(head, parse_config(head.config), throttle)
        image = drawn.info.num_pages * self._base.layout.page_bytes
        return head.start + head.data_bytes + image + drawn.module_map.making_bytes

    def _room(self, nbytes: int, throttle: Callable[[], None]) -> AbstractContextManager[None]:
        return nullcontext() if self._workspace is None else self._workspace.room(nbytes, throttle)

    def _repeat(self, known: _Remembered, reading: Reading) -> LoadedContent | None:
        """Do again what was done at the last reading. None: the files have changed, or it is not known how."""
        plan = self._plans.get(known.plan)
        if known.refusal is not None:
            head = read_head(known.place.folder, known.place.roots)
            if head.stamp != known.stamp:
                return None
            raise AdapterRefused(known.refusal.code, str(known.refusal))
        if plan is None or known.info is None:
            return None
        try:
            with (
                self._room(plan.nbytes, reading.throttle),
                known_weights(known.place.folder, known.stamp, known.place.roots) as descriptor,
            ):
                file = OpenFile(descriptor, known.start)
                image = plan.read(file, self._memory(plan.nbytes), reading.throttle)
        except (ChangedMeanwhile, EOFError, OSError):
            return None
        return _loaded(known.info, image, known.stamp.weights[2] - known.start)

    def _read_whole(self, place: _Place, reading: Reading) -> LoadedContent:
        files, began = read_quietly(place.folder, place.roots, reading.throttle, self._memory)
        head = files.head
        settled = head.stamp.is_settled(began)
        try:
            config = parse_config(head.config)
            drawn = self._draw(head, config, reading.throttle)
            image, plan = self._make_any(drawn, files, reading.throttle)
            self._check_pages(len(image.pages))
            # read after its stamp: a change meanwhile shows at the next look
            tokenizer = self._tokenizer(place, drawn.info.tokens)
        except AdapterRefused as error:
            if settled:
                refusal = AdapterRefused(error.code, str(error))  # without the frames, which hold the file's bytes
                self._remembered.put(reading.source, _Remembered(place, head.stamp, head.start, refusal=refusal))
            raise
        digest, remark = tokenizer.mark(files.digest), self._remark(place, config)
        info = replace(drawn.info, digest=digest, tokenizer=tokenizer, remark=remark)
        if settled:
            known = _Remembered(place, head.stamp, head.start, info, plan)
            self._remembered.put(reading.source, known)
        return _loaded(info, image, head.data_bytes)

    def _tokenizer(self, place: _Place, tokens: int) -> TokenizerFiles:
        """Equal ones are one object: a folder of thousands has the same file in each. Raises AdapterRefused."""
        found = read_tokenizer(place.folder, place.roots)
        if found == NOTHING:
            return NOTHING
        known = self._tokenizers.get((found, tokens))
        if known is None:
            if changes := self._check_tokenizer(found, tokens):
                logger.info("%s has tokenizer files of its own: %s", place.folder, changes)
            known = self._tokenizers.put((found, tokens), found)
        return known

    def _remark(self, place: _Place, config: AdapterConfig) -> str:
        """Say it in the log once for each base that configs name, and each kind that has something to say."""
        remark = "; ".join(filter(None, (remark_on_base(config.base_model, self._base.formats), config.remark)))
        if remark and self._remarks.get(remark) is None:
            logger.warning("%s: %s", place.folder, self._remarks.put(remark, remark))
        return remark

    def _draw(self, head: AdapterHead, config: AdapterConfig, throttle: Callable[[], None]) -> _Drawn:
        key = (config, _key_of(head))
        drawn = self._drawn.get(key)
        if drawn is None:
            throttle()
            header = self._headers.get(key[1]) or self._parse_header(head, KINDS[config.kind].integers)
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
                alone=" and ".join(dict.fromkeys(tensor.short for tensor in module_map.own if not tensor.frozen)),
                invocation=config.invocation,
                front=front,
            )
            drawn = _Drawn(key, module_map, info)
            self._drawn.put(key, drawn)
            self._headers.put(key[1], header)  # it fits the base: no larger than what is planned for
        self._check_pages(drawn.info.num_pages)
        return drawn

    def _pages(self, module_map: ModuleMap, most: int) -> int:
        """Bound an adapter's pages. A whole table may turn out to be the base's own but for a few rows: no more pages
        are planned for it than there can be, and if it needs them the image is refused."""
        if most <= self._max_pages or all(tensor.ids is not None or tensor.frozen for tensor in module_map.own):
            return most
        return max(self._max_pages, plan_image(module_map.shapes, self._base.layout).num_pages)

    def _check_pages(self, num_pages: int) -> None:
        if num_pages > self._max_pages:
            raise AdapterRefused(
                "too_large",
                f"the adapter takes {num_pages} pages, but only {self._max_pages} can be had beside one sequence; give "
                "the server more memory (--memory)",
            )

    def _parse_header(self, head: AdapterHead, integers: bool) -> dict[str, TensorInfo]:
        most = TENSORS_A_MODULE * self._base.layout.num_layers * len(self._base.layout.projections)
        return parse_header(head, most, integers=integers)

    def _make_any(
        self, drawn: _Drawn, files: AdapterBytes, throttle: Callable[[], None]
    ) -> tuple[AdapterImage, Hashable | None]:
        """Make the image as _make() does; of what changes nothing, where that is allowed, one that adds a bias of 0.

        Without any tile it would have no page, and what has no page on the device is not there.
        """
        try:
            return self._make(drawn, files, throttle)
        except AdapterRefused as error:
            if error.code != "no_effect" or not self._allow_noop:
                raise
            layout = self._base.layout
            first = layout.projections[0]
            return pack([BiasDelta(0, first, torch.zeros(first.out_features))], layout), None

    def _make(
        self, drawn: _Drawn, files: AdapterBytes, throttle: Callable[[], None]
    ) -> tuple[AdapterImage, Hashable | None]:
        """Make the image, and the key of its PackPlan, if it has one."""
        module_map = drawn.module_map
        if module_map.pairs:
            key: Hashable = (drawn.key, None)
            plan = self._plan(key, module_map.pairs)
            image, sound = plan.make(files.data, self._memory(plan.nbytes), throttle)
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
            key = (drawn.key, left)
            some = [pair for pair in module_map.pairs if (pair.shape.layer, pair.shape.projection.name) in left]
            plan = self._plan(key, some)
            image, _ = plan.make(files.data, self._memory(plan.nbytes), throttle)
            return image, key
        return pack(parts, self._base.layout), None

    def _plan(self, key: Hashable, pairs: Sequence[FactorPair]) -> PackPlan:
        return self._plans.get(key) or self._plans.put(key, PackPlan(pairs, self._base.layout))

    def _memory(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 holding anything: what an earlier load has left, if there is such."""
        if self._workspace is None or not nbytes:
            return huge_zeros(nbytes)
        region = self._workspace.find(nbytes) or Region(nbytes)
        return region.tensor(nbytes, self._workspace.leave)


def _key_of(head: AdapterHead) -> Hashable:
    return hashlib.sha256(head.header).digest(), head.data_bytes


def _loaded(info: AdapterInfo, image: AdapterImage, bytes_read: int) -> LoadedContent:
    found = replace(info, num_pages=len(image.pages), nbytes=image.nbytes, num_tiles=len(image.tiles))
    return LoadedContent(found, image, bytes_read)
