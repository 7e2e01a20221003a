"""A decoder with adapters in its arena, read from files and packed as a server does, run on requests step by step.

server = Server(path)
digest = server.load(folder)                                   # an adapter's
requests = [Request(ids, ((digest, 1.0),), chunk=5), Request(ids)]
server.run(requests)                                           # together; request.logits: of every token
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.format.kind import ServedBase
from loraplex.adapters.format.outside import BaseOutside
from loraplex.adapters.image.tiles import BaseLayout
from loraplex.adapters.tiers.device import DeviceTier
from loraplex.adapters.tiers.loader import Reading
from loraplex.adapters.tiers.reader import AdapterReader
from loraplex.kernels.records import AdapterSegments
from loraplex.server.models.base_weights import BaseWeights
from loraplex.server.models.weight_sizes import norms_in_order
from tests.support.harness import Harness, Sequence
from tests.support.tiny import VOCAB_SIZE

LENGTH = 23
"""Tokens of a request, where nothing else is said."""

Mix = tuple[tuple[str, float], ...]
"""(digest, weight), ...; empty: the base."""


class Pool:
    """The pages of a harness that were set aside for adapters, as DeviceTier wants them."""

    def __init__(self, num_pages: int, free: list[int]) -> None:
        self.num_pages = num_pages
        self._all = len(free)
        self._free = free

    def alloc(self, n: int, owner: str) -> list[int] | None:
        if n > len(self._free):
            return None
        return [self._free.pop() for _ in range(n)]

    def free(self, pages: list[int]) -> None:
        self._free += pages

    def used_by(self, owner: str) -> int:
        return self._all - len(self._free)


@dataclass
class Request:
    """Known tokens that are computed `chunk` at a time up to `prompt` and one by one after it."""

    ids: list[int]
    mix: Mix = ()
    prompt: int = LENGTH - 5
    chunk: int = LENGTH
    start: int = 0  # the step it joins at
    sequence: Sequence | None = None
    logits: list[Tensor] = field(default_factory=list)

    def next_tokens(self) -> int:
        assert self.sequence is not None
        done = self.sequence.computed
        return 1 if done >= self.prompt else min(self.chunk, self.prompt - done)

    def decodes(self) -> bool:
        assert self.sequence is not None
        return self.sequence.computed >= self.prompt


class Server:
    """A base and the adapters loaded beside it."""

    def __init__(self, path: Path, page_bytes: int = 2048, **options: Any) -> None:
        """options: of the Harness."""
        pages = 1200
        self.harness = Harness(path, num_pages=pages, page_bytes=page_bytes, **options)
        harness = self.harness
        pool = Pool(pages, harness.take_pages(700))
        config = harness.config
        projections = config.projections()
        layers, dtype = harness.config.num_layers, harness.weights.dtype
        self.layout = BaseLayout(path.name, layers, projections, harness.page_bytes, dtype, harness.config.blocks())
        self.residency = DeviceTier(harness.arena, pool, self.layout)  # type: ignore[arg-type]
        weights = BaseWeights(harness.config, harness.weights, harness.checkpoint, harness.ops.beside())
        self._base = ServedBase(
            self.layout,
            weights.bias,
            weights.squared_norms,
            weights.products,
            weights.weight,
            outside=BaseOutside(
                norms_in_order(config),
                config.vocab_size,
                config.hidden_size,
                config.head_dim,
                weights.is_tied,
                config.embed_scale,
                bool(weights.formats),
                weights.tensor,
            ),
        )

    def load(self, folder: Path) -> str:
        """Read and load an adapter; its digest."""
        reader = AdapterReader(self._base, max_pages=1 << 30)
        parsed = reader.read(Reading(str(folder), True, lambda: None))
        assert self.residency.load(parsed.digest, parsed.image)
        self.residency.check_integrity()
        return parsed.digest

    def run(self, requests: list[Request], *, adapters: bool = True) -> None:
        """Compute all requests to their end, together; without `adapters` as if nobody wore any."""
        for request in requests:
            request.sequence = self.harness.sequence(request.ids)
            request.sequence.prompt_len = request.prompt
            request.logits = []
        step = 0
        while True:
            left = [r for r in requests if r.sequence is not None and r.sequence.computed < len(r.ids)]
            if not left:
                break
            work = [request for request in left if request.start <= step]
            step += 1
            # who wears adapters first, decode rows before chunks, equal mixes side by side
            work.sort(key=lambda request: (not request.mix, not request.decodes(), request.mix))
            counts = [(request.sequence, request.next_tokens()) for request in work if request.sequence is not None]
            segments = self._segments(work) if adapters else None
            found = self.harness.step(counts, segments, self.residency.table) if counts else []
            for request, logits in zip(work, found, strict=True):
                request.logits.append(logits)
        for request in requests:
            assert request.sequence is not None
            self.harness.reset(request.sequence)

    def _segments(self, work: list[Request]) -> AdapterSegments | None:
        bounds, mixes, num_decode = [0], [], 0
        last: tuple[Mix, bool] | None = None
        for request in work:
            if not request.mix:
                break
            end = bounds[-1] + request.next_tokens()
            if last == (request.mix, request.decodes()):
                bounds[-1] = end
            else:
                bounds.append(end)
                mixes.append(tuple((self._slot(digest), weight) for digest, weight in request.mix))
                num_decode += request.decodes()
            last = (request.mix, request.decodes())
        if not mixes:
            return None
        members = [member for mix in mixes for member in mix]
        mix_ptr = torch.tensor([0] + [len(mix) for mix in mixes]).cumsum(0)
        return AdapterSegments(
            indptr=torch.tensor(bounds, dtype=torch.int32),
            mix_ptr=mix_ptr.int(),
            mix_slot=torch.tensor([slot for slot, _ in members], dtype=torch.int32),
            mix_weight=torch.tensor([weight for _, weight in members], dtype=torch.float32),
            bounds=tuple(bounds),
            mixes=tuple(mixes),
            num_decode_segments=num_decode,
        )

    def _slot(self, digest: str) -> int:
        slot = self.residency.slot_of(digest)
        assert slot is not None
        return slot


def tokens(seed: int, count: int = LENGTH) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
