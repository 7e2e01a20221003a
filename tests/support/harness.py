"""A decoder with an arena of its own, driven step by step without scheduler or engine.

    harness = Harness(path)
    a, b = harness.sequence(ids_a), harness.sequence(ids_b)
    logits_a, logits_b = harness.step([(a, 5), (b, 1)])      # the next 5 tokens of a, the next one of b: [n, vocab]
    a.ids.append(token)                                      # a token drawn; the next step computes it
    harness.step([(a, 1)], adapters=segments, tiles=table)   # adapter pages come from harness.take_pages(n)

It is stricter than an engine: free pages are handed out in random order and every byte of a page that nobody has
written in this life reads as NaN, so a stray read anywhere shows in the logits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.kernels.ops import Backend
from loraplex.kernels.quantized import Activations
from loraplex.kernels.records import AdapterSegments, AttentionMeta, KVGroup, KVLayer, TileTable, element_bytes
from loraplex.kernels.select import load_backend
from loraplex.server.models.checkpoint import Checkpoint
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.inputs import ForwardBatch, HeadRows, no_tiles
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.recorded import RecordedDecoder
from loraplex.server.models.weights import ModelWeights, load_checkpoint

POISON = 0xFF
"""As bytes of a float16, bfloat16 or float32 this is NaN."""


@dataclass
class Sequence:
    ids: list[int]
    prompt_len: int
    tables: list[list[int]]  # per KV group: page of each block, -1 where freed past the window
    computed: int = 0


@dataclass
class _Pages:
    """Free pages in random order."""

    free: list[int]
    rng: random.Random = field(repr=False)

    def take(self, count: int) -> list[int]:
        assert count <= len(self.free), (
            f"{count} pages asked for, {len(self.free)} free: give the harness more num_pages"
        )
        return [self.free.pop(self.rng.randrange(len(self.free))) for _ in range(count)]


def layer_groups(config: ModelConfig, group_size: int | None) -> list[list[int]]:
    """KV groups as lists of layers. None: all in one; else layers of one window together, at most group_size each."""
    if group_size is None:
        return [list(range(config.num_layers))]
    groups = []
    for window in dict.fromkeys(config.windows):
        layers = [layer for layer in range(config.num_layers) if config.windows[layer] == window]
        groups += [layers[start : start + group_size] for start in range(0, len(layers), group_size)]
    return groups


class Harness:
    """See the module docstring.

    group_size: None for one KV group of all layers, else the most layers of one window in a group.
    free_past_window: pages no later query can see are taken back (needs groups whose layers share a window).
    page_bytes: of the arena; grows the KV page's own size, never shrinks it.
    checkpoint: instead of the folder's own weights; activations: of its quantised linears.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: torch.dtype = torch.float32,
        ops: Backend | None = None,
        group_size: int | None = None,
        free_past_window: bool = False,
        num_pages: int = 64,
        page_bytes: int = 0,
        seed: int = 0,
        checkpoint: Checkpoint | None = None,
        activations: Activations | None = None,
    ) -> None:
        self.config = ModelConfig.from_hf(path)
        self.ops = ops or load_backend("reference", "cpu")
        self.checkpoint = checkpoint or open_checkpoint(path)
        self.weights: ModelWeights = load_checkpoint(
            self.checkpoint, self.config, self.ops, dtype, activations=activations
        )
        self.groups = layer_groups(self.config, group_size)
        config = self.config
        slab = config.num_kv_heads * BLOCK_SIZE * config.head_dim  # elements of one layer's keys in a page
        kv_bytes = max(len(layers) for layers in self.groups) * 2 * slab * element_bytes(dtype)
        self.page_bytes = -(-max(kv_bytes, page_bytes) // 64) * 64
        self.arena = torch.full((num_pages, self.page_bytes), POISON, dtype=torch.uint8, device=self.ops.device)
        self.kv_layers = self._views(dtype, slab)
        self.decoder: Decoder | RecordedDecoder = Decoder(config, self.weights, self.ops, self.kv_layers, self.arena)
        self._pages = _Pages(list(range(num_pages)), random.Random(seed))
        self._free_past_window = free_past_window
        self._tiles = no_tiles(config)

    def _views(self, dtype: torch.dtype, slab: int) -> list[KVLayer]:
        config = self.config
        flat = self.arena.view(-1).view(dtype)
        page = self.page_bytes // element_bytes(dtype)
        shape = (self.arena.shape[0], config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        strides = (page, BLOCK_SIZE * config.head_dim, config.head_dim, 1)
        views: dict[int, KVLayer] = {}
        for group, layers in enumerate(self.groups):
            for place, layer in enumerate(layers):
                k, v = (flat.as_strided(shape, strides, (2 * place + part) * slab) for part in (0, 1))
                views[layer] = KVLayer(k, v, group)
        return [views[layer] for layer in range(config.num_layers)]

    def take_pages(self, count: int) -> list[int]:
        """Pages for something other than keys and values."""
        return self._pages.take(count)

    def sequence(self, ids: Many[int]) -> Sequence:
        return Sequence(list(ids), len(ids), [[] for _ in self.groups])

    def reset(self, sequence: Sequence) -> None:
        """Give its pages back; it will be computed from its first token again."""
        for table in sequence.tables:
            self._release([page for page in table if page >= 0])
            table.clear()
        sequence.computed = 0

    def build(
        self,
        work: Many[tuple[Sequence, int]],
        adapters: AdapterSegments | None = None,
        tiles: TileTable | None = None,
        logit_rows: Many[int] | None = None,
    ) -> ForwardBatch:
        """The batch for the next `n` tokens of each sequence, in the order given; takes the pages it needs."""
        ids: list[int] = []
        positions: list[int] = []
        bounds = [0]
        store: list[list[int]] = [[] for _ in self.groups]
        for sequence, n in work:
            start, stop = sequence.computed, sequence.computed + n
            assert n > 0, "a sequence without tokens has no place in a batch"
            assert stop <= len(sequence.ids), f"tokens up to {stop} asked for, {len(sequence.ids)} known"
            ids += sequence.ids[start:stop]
            positions += range(start, stop)
            bounds.append(len(ids))
            for table, places in zip(sequence.tables, store, strict=True):
                table += self._pages.take(-(-stop // BLOCK_SIZE) - len(table))
                places += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(start, stop)]
        kv_lens = tuple(sequence.computed + n for sequence, n in work)
        device = self.ops.device
        attention = AttentionMeta(
            query_ptr=torch.tensor(bounds, dtype=torch.int32, device=device),
            kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
            query_bounds=tuple(bounds),
            kv_lens_host=kv_lens,
            is_decode=tuple(sequence.computed >= sequence.prompt_len for sequence, _ in work),
            groups=tuple(
                KVGroup(
                    self._block_table([sequence.tables[g] for sequence, _ in work]),
                    torch.tensor(places, dtype=torch.int64, device=device),
                )
                for g, places in enumerate(store)
            ),
        )
        return ForwardBatch(
            input_ids=torch.tensor(ids, dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            rope_lens=tuple(len(sequence.ids) for sequence, _ in work),
            attention=attention,
            adapters=adapters,
            tiles=tiles or self._tiles,
            logit_rows=torch.tensor(range(len(ids)) if logit_rows is None else logit_rows, device=device).long(),
        )

    def _block_table(self, tables: list[list[int]]) -> Tensor:
        width = max(len(table) for table in tables)
        padded = [table + [-1] * (width - len(table)) for table in tables]
        return torch.tensor(padded, dtype=torch.int32, device=self.ops.device)

    def step(
        self,
        work: Many[tuple[Sequence, int]],
        adapters: AdapterSegments | None = None,
        tiles: TileTable | None = None,
    ) -> list[Tensor]:
        """Run the next tokens of each sequence; their logits, [n, vocab] fp32 per sequence."""
        batch = self.build(work, adapters, tiles)
        own = None
        if adapters is not None:
            lengths = [end - start for start, end in pairwise(adapters.bounds)]
            mixes = [mix for mix, length in zip(adapters.mixes, lengths, strict=True) for _ in range(length)]
            mixes += [()] * (len(batch.input_ids) - len(mixes))
            own = HeadRows.of(mixes, batch.tiles, self.config.vocab_size, self.ops.device)
        logits = self.decoder.logits(self.decoder.forward(batch), None, own)
        for sequence, n in work:
            sequence.computed += n
            if self._free_past_window:
                self._trim(sequence)
        return list(logits.split([n for _, n in work]))

    def _trim(self, sequence: Sequence) -> None:
        for layers, table in zip(self.groups, sequence.tables, strict=True):
            window = self.config.windows[layers[0]]
            if window is None:
                continue
            unseen = max(0, sequence.computed - window + 1) // BLOCK_SIZE  # whole blocks before the next query's window
            self._release([page for page in table[:unseen] if page >= 0])
            table[:unseen] = [-1] * unseen

    def _release(self, pages: list[int]) -> None:
        self.arena[pages] = POISON
        self._pages.free += pages

    @property
    def pages_in_use(self) -> int:
        return self.arena.shape[0] - len(self._pages.free)
