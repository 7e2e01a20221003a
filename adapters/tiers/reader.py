"""From an adapter's source to its image: what the loader's threads do, and what they remember from time to time.

    examine   config and header only                                         registration: 0.1 ms, 3 ms for a new shape
    read      all of the files: hashed, checked, packed                      first load of 4 MB: 7 ms
              the same files again, by their stamps: read and packed         2 ms

Adapters of the same config and header share a ModuleMap and a PackPlan; what is remembered of each single one is
its stamp and digest, or why it was refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from loraplex.adapters.errors import AdapterRefused, about_folder
from loraplex.adapters.files.beneath import opened, roots_of
from loraplex.adapters.files.model_card import Card, read_card
from loraplex.adapters.files.tokenizer_files import NOTHING, TokenizerFiles
from loraplex.adapters.format.adapter_files import (
    ChangedMeanwhile,
    NoFolder,
    Stamp,
    known_weights,
    read_head,
    read_tokenizer,
)
from loraplex.adapters.format.header import view_tensors
from loraplex.adapters.format.kind import AdapterConfig, ModuleMap, ServedBase
from loraplex.adapters.format.kinds import KINDS, make_parts, parse_config
from loraplex.adapters.format.other_base import remark_on_base
from loraplex.adapters.format.plain_outside import PlainOutside, read_outside
from loraplex.adapters.format.quiet_files import read_quietly
from loraplex.adapters.image.packing import OpenFile
from loraplex.adapters.image.tiles import AdapterImage, Part
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.sources.sources import resolve
from loraplex.adapters.throttle import Throttle
from loraplex.adapters.tiers.latest import Latest
from loraplex.adapters.tiers.loader import LoadedContent, Reading
from loraplex.adapters.tiers.making import MAX_PACK_PLANS, ImageMaker
from loraplex.adapters.tiers.outline import MAX_MODULE_MAPS, Outlines, header_key
from loraplex.adapters.tiers.workspace import Workspace
from loraplex.kernels.hugepages import Region

logger = logging.getLogger(__name__)

MAX_TOKENIZERS = 256
"""Some 10 KB each, a template mostly."""

MAX_REMEMBERED = 16_384
"""Sources, some 1 KB each."""


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
    outside: Callable[[], PlainOutside]  # what it has outside them


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
        self._outlines = Outlines(base, max_pages)
        self._maker = ImageMaker(base, workspace, allow_noop)
        self._check_tokenizer = check_tokenizer
        self._locate = locate
        self._workspace = workspace
        self._base = base
        self._infos: Latest[AdapterInfo] = Latest(MAX_PACK_PLANS)  # whatever the scaling
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
            key = (config.same_shapes(), header_key(head))
            info = self._infos.get(key) or self._infos.put(
                key, self._outlines.find(head, config, Throttle(lambda: None)).info
            )
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
            files, _ = read_quietly(place.folder, place.roots, throttle, self._maker.memory)
            outline = self._outlines.find(files.head, parse_config(files.head.config), throttle)
            module_map = outline.module_map
            tensors = view_tensors(files.data, module_map.header)
            with opened(place.folder, place.roots) as folder:
                card = read_card(folder)
            yield OpenContent(
                digest=self._tokenizer(place, outline.info.tokens).mark(files.digest),
                card=card,
                module_map=module_map,
                names=frozenset(self._outlines.parse_header(files.head, KINDS[module_map.config.kind].integers)),
                parts=lambda: self._of_linears(make_parts(module_map, (), tensors, self._base, throttle)),
                outside=lambda: read_outside(module_map, tensors, self._base, throttle),
            )

    def _of_linears(self, parts: Iterable[Part]) -> Iterator[Part]:
        return (part for part in parts if part.layer < self._base.layout.num_layers)

    def _place(self, source: str) -> _Place:
        return _Place(self._locate(source), roots_of(source))

    def _whole_bytes(self, place: _Place, throttle: Callable[[], None]) -> int:
        """Bound what the file, its image and the making of it take. Raises what refuses the header."""
        if self._workspace is None:
            return 0
        head = read_head(place.folder, place.roots)
        outline = self._outlines.find(head, parse_config(head.config), throttle)
        image = outline.info.num_pages * self._base.layout.page_bytes
        return head.start + head.data_bytes + image + outline.module_map.making_bytes

    def _room(self, nbytes: int, throttle: Callable[[], None]) -> AbstractContextManager[None]:
        return nullcontext() if self._workspace is None else self._workspace.room(nbytes, throttle)

    def _repeat(self, known: _Remembered, reading: Reading) -> LoadedContent | None:
        """Do again what was done at the last reading. None: the files have changed, or it is not known how."""
        plan = self._maker.known_plan(known.plan)
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
                image = plan.read(file, self._maker.memory(plan.nbytes), reading.throttle)
        except (ChangedMeanwhile, EOFError, OSError):
            return None
        return _loaded(known.info, image, known.stamp.weights[2] - known.start)

    def _read_whole(self, place: _Place, reading: Reading) -> LoadedContent:
        files, began = read_quietly(place.folder, place.roots, reading.throttle, self._maker.memory)
        head = files.head
        settled = head.stamp.is_settled(began)
        try:
            config = parse_config(head.config)
            outline = self._outlines.find(head, config, reading.throttle)
            image, plan = self._maker.make(outline, files, reading.throttle)
            self._outlines.check_pages(len(image.pages))
            # read after its stamp: a change meanwhile shows at the next look
            tokenizer = self._tokenizer(place, outline.info.tokens)
        except AdapterRefused as error:
            if settled:
                refusal = AdapterRefused(error.code, str(error))  # without the frames, which hold the file's bytes
                self._remembered.put(reading.source, _Remembered(place, head.stamp, head.start, refusal=refusal))
            raise
        digest, remark = tokenizer.mark(files.digest), self._remark(place, config)
        info = replace(outline.info, digest=digest, tokenizer=tokenizer, remark=remark)
        if settled:
            known = _Remembered(place, head.stamp, head.start, info, plan)
            self._remembered.put(reading.source, known)
        return _loaded(info, image, head.data_bytes)

    def _tokenizer(self, place: _Place, tokens: int) -> TokenizerFiles:
        """Read the tokenizer's files; equal ones are one object, as thousands have the same. Raises AdapterRefused."""
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


def _loaded(info: AdapterInfo, image: AdapterImage, bytes_read: int) -> LoadedContent:
    found = replace(info, num_pages=len(image.pages), nbytes=image.nbytes, num_tiles=len(image.tiles))
    return LoadedContent(found, image, bytes_read)
