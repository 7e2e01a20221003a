"""Decode steps as CUDA graphs: one launch a step instead of hundreds. Made of the same ops; GPU only.

A graph is captured the first time a step needs it and kept. What a step is, rounded up to powers of two, picks it: its
rows, its longest sequence, and the tiles of its adapters, none for a step whose rows are all base-only. A step with a
prefill chunk runs the ops one by one. Rows that fill a graph up have no query, no adapter and no place in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.kernels.constants import Own
from loraplex.kernels.records import AdapterSegments, AdapterStep, OwnTable, TileTable
from loraplex.server.models.config import Site
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.inputs import ForwardBatch, HeadRows

MIN_KEYS = 256
"""Keys of the smallest graph; below it there is nothing to save."""

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""From work to (what repeats it, where its result then lies)."""


@dataclass(frozen=True)
class Size:
    """Bound what one graph is captured for, each field a power of two; without adapters tiles and mix are 0."""

    rows: int
    keys: int  # of the longest sequence
    tiles: int  # of any row's mix at any layer and site
    mix: int  # adapters in any row's mix
    blocks: bool = False  # whether any of them has tiles at a block: else no op is launched there
    own: int = 0  # what rows have of their own: bits of Own, as they are

    @classmethod
    def of(cls, batch: ForwardBatch) -> Size:
        keys = max(MIN_KEYS, _power_of_two(max(batch.attention.kv_lens_host)))
        rows = _power_of_two(batch.input_ids.shape[0])
        if batch.adapters is None:
            return cls(rows, keys, 0, 0)
        ranges = batch.tiles.ranges_host[:, : batch.tiles.num_layers]
        most = (ranges[..., 1] - ranges[..., 0]).amax((1, 2)).tolist()  # per slot
        mixes = batch.adapters.mixes
        tiles = max(sum(most[slot] for slot, _ in mix) for mix in mixes)
        worn = list({slot for mix in mixes for slot, _ in mix})
        at_blocks = ranges[worn][:, :, len(Site) :, 1].any().item()
        own = AdapterStep(batch.input_ids, batch.tiles, batch.adapters).own & ~Own.HEAD  # the head is no graph's
        return cls(
            rows,
            keys,
            _power_of_two(max(1, tiles)),
            _power_of_two(max(1, *map(len, mixes))),
            bool(at_blocks),
            own,
        )


class GraphedDecoder:
    """Run a Decoder's decode steps as CUDA graphs, with the calls and results of that Decoder.

    forward() of a decode step returns workspace, whose values hold until the next step.
    """

    def __init__(self, decoder: Decoder, capture: Capture | None = None) -> None:
        """capture: by default into a CUDA graph, all graphs in one memory pool."""
        self.config = decoder.config
        self.ops = decoder.ops
        self._decoder = decoder
        self._capture = capture or _CudaCapture()
        self._steps: dict[Size, _Step] = {}
        self._table: TileTable | None = None  # whose memory the graphs read

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Compute the final hidden states [L, H], normed, of the tokens in batch.logit_rows."""
        if not all(batch.attention.is_decode):
            return self._decoder.forward(batch)
        table = self._table
        if table is None or table.ranges is not batch.tiles.ranges or table.tiles is not batch.tiles.tiles:
            self._steps.clear()  # the table has grown into new memory
            self._table = batch.tiles
        size = Size.of(batch)
        step = self._steps.get(size)
        if step is None:
            step = self._steps[size] = _Step(self._decoder, batch, size)
            step.load(batch)
            step.record(self._capture)
        else:
            step.load(batch)
        return step.run()[: batch.logit_rows.shape[0]]

    def store(self, rows: Tensor, places: Sequence[Tensor]) -> None:
        """Write keys and values as Decoder.store does."""
        self._decoder.store(rows, places)

    def logits(self, hidden: Tensor, room: Tensor | None = None, own: HeadRows | None = None) -> Tensor:
        """Compute logits as Decoder.logits does."""
        return self._decoder.logits(hidden, room, own)


class _Step:
    """Hold the buffers of one size and the graph over them."""

    def __init__(self, decoder: Decoder, like: ForwardBatch, size: Size) -> None:
        self._decoder = decoder
        self._batch = ForwardBatch.blank(
            _table(like.tiles, size),
            len(like.attention.groups),
            sequences=size.rows,
            length=size.keys,
            is_decode=True,
            logit_rows=size.rows,
            adapters=_segments(size, like.input_ids.device) if size.tiles else None,
            device=like.input_ids.device,
        )
        # Angles depend on lengths the host knows: they are computed outside the graph.
        self._rotations = [
            (torch.zeros_like(cos), torch.zeros_like(sin)) for cos, sin in decoder.rotations(self._batch)
        ]
        self._repeat: Callable[[], object] | None = None
        self._hidden: Tensor | None = None

    def load(self, batch: ForwardBatch) -> None:
        """Copy `batch` into the buffers, on the device; fill up the rows that are left."""
        mine, meta = self._batch, batch.attention
        _fill(mine.input_ids, batch.input_ids, 0)
        _fill(mine.logit_rows, batch.logit_rows, 0)
        for (cos, sin), (new_cos, new_sin) in zip(self._rotations, self._decoder.rotations(batch), strict=True):
            _fill(cos, new_cos, 0)
            _fill(sin, new_sin, 0)
        _fill(mine.attention.query_ptr, meta.query_ptr, meta.query_bounds[-1])  # no query
        _fill(mine.attention.kv_lens, meta.kv_lens, 0)
        for group, new in zip(mine.attention.groups, meta.groups, strict=True):
            blocks = min(group.block_table.shape[1], new.block_table.shape[1])  # beyond the longest none is read
            group.block_table[: new.block_table.shape[0], :blocks] = new.block_table[:, :blocks]
            _fill(group.store_index, new.store_index, -1)  # not stored
        if mine.adapters is not None and batch.adapters is not None:
            ours, theirs = mine.adapters, batch.adapters
            _fill(ours.indptr, theirs.indptr, theirs.bounds[-1])  # segments without tokens
            _fill(ours.mix_ptr, theirs.mix_ptr, theirs.mix_slot.shape[0])
            _fill(ours.mix_slot, theirs.mix_slot, 0)
            _fill(ours.mix_weight, theirs.mix_weight, 0)

    def record(self, capture: Capture) -> None:
        """Capture the graph. A first run outside of it compiles what ops need and computes the loaded step."""
        self._repeat, self._hidden = capture(lambda: self._decoder.hidden(self._batch, self._rotations))

    def run(self) -> Tensor:
        """Launch the graph; return its hidden states [rows, H]."""
        assert self._repeat is not None
        assert self._hidden is not None
        self._repeat()
        return self._hidden


class _CudaCapture:
    """Capture work as a CUDA graph; all graphs share memory, since only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = work()
        return graph.replay, hidden


def _fill(buffer: Tensor, values: Tensor, rest: float) -> None:
    n = values.shape[0]
    buffer[:n] = values
    buffer[n:] = rest


def _segments(size: Size, device: torch.device) -> AdapterSegments:
    """Build as many segments as rows. Ops read only bounds from the host's copies: these hold the most there can be."""
    rows, entries = size.rows, size.rows * size.mix
    return AdapterSegments(
        indptr=torch.zeros(rows + 1, dtype=torch.int32, device=device),
        mix_ptr=torch.zeros(rows + 1, dtype=torch.int32, device=device),
        mix_slot=torch.zeros(entries, dtype=torch.int32, device=device),
        mix_weight=torch.zeros(entries, device=device),
        bounds=tuple(range(rows + 1)),
        mixes=(((0, 1.0),),) * rows,
        num_decode_segments=rows,
    )


def _table(table: TileTable, size: Size) -> TileTable:
    """Pair the table on the device with one on the host: size.tiles tiles everywhere, and size.own in slot 0."""
    ranges = torch.zeros(1, *table.ranges.shape[1:], dtype=torch.int32)
    ranges[:, :, : None if size.blocks else len(Site), 1] = size.tiles
    own = None
    if table.own is not None and size.own:
        own = OwnTable(table.own.ranges, table.own.ranges_host, {0: size.own})
    return TileTable(table.ranges, table.tiles, ranges, table.tiles_host, own)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
