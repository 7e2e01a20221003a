"""What one step gives the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.kernels.constants import BLOCK_SIZE, TILE_COLUMNS, Own
from loraplex.kernels.records import AdapterSegments, AttentionMeta, KVGroup, OwnPlaces, TileTable
from loraplex.server.models.config import ModelConfig

Rotations = Sequence[tuple[Tensor, Tensor]]
"""cos and sin [T, rotary_dim] fp32 of a step's tokens, per rotary kind of the config."""


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens of B sequences, ragged and concatenated.

    Order (engine/step/batch.py): sequences wearing adapters first, decode rows before prefill chunks, equal mixes
    adjacent; then base-only decode rows, then base-only prefill chunks.

    Where several steps of decode rows follow one another, T and B count the rows of all of them, step behind step: of
    input_ids only the first step's are known, and block tables, adapters and logit_rows are one step's.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    rope_lens: tuple[int, ...]  # per sequence: known tokens (prompt and generated), for rotary kinds that depend on it
    attention: AttentionMeta
    adapters: AdapterSegments | None  # None: nobody wears one
    tiles: TileTable
    logit_rows: Tensor  # [L] int64: tokens whose logits are wanted, in the order of the plan
    steps: int = 1
    own: Tensor | None = None  # [E, H]: rows that input_ids below 0 stand for (Backend.embed); None: there are none

    @classmethod
    def blank(
        cls,
        tiles: TileTable,
        num_groups: int,
        *,
        sequences: int = 1,
        tokens: int = 1,
        length: int | None = None,
        is_decode: bool = False,
        logit_rows: int = 1,
        adapters: AdapterSegments | None = None,
        device: torch.device | None = None,
    ) -> ForwardBatch:
        """Build a batch of token 0 in the wanted shapes, to record, capture or time a step with.

        Each of the `sequences` has `length` tokens in the cache (None: `tokens`), of which the last `tokens` are the
        step's. Each of the `num_groups` KV groups has pages of its own for each sequence, the arena's first ones.
        """
        length = tokens if length is None else length
        blocks = -(-length // BLOCK_SIZE)
        pages = torch.arange(num_groups * sequences * blocks, dtype=torch.int32, device=device)
        positions = torch.arange(length - tokens, length, device=device).repeat(sequences)
        owners = torch.arange(sequences, device=device).repeat_interleave(tokens)  # of the step's tokens
        bounds = tuple(range(0, sequences * tokens + 1, tokens))
        return cls(
            input_ids=torch.zeros_like(positions),
            positions=positions,
            rope_lens=(length,) * sequences,
            attention=AttentionMeta(
                query_ptr=torch.tensor(bounds, dtype=torch.int32, device=device),
                kv_lens=torch.full((sequences,), length, dtype=torch.int32, device=device),
                query_bounds=bounds,
                kv_lens_host=(length,) * sequences,
                is_decode=(is_decode,) * sequences,
                groups=tuple(
                    KVGroup(table, table[owners, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE)
                    for table in pages.view(num_groups, sequences, blocks)
                ),
            ),
            adapters=adapters,
            tiles=tiles,
            logit_rows=torch.full((logit_rows,), bounds[-1] - 1, dtype=torch.int64, device=device),
        )


@dataclass(frozen=True)
class HeadRows:
    """Rows of logits of which some have a head of their own."""

    slots: Tensor  # [L] int32 on the host: whose head; -1: the base's
    added: int  # columns beyond the base's vocabulary, the most that any of them has
    tiles: TileTable

    @classmethod
    def of(cls, slots: Sequence[int], tiles: TileTable, vocab: int) -> HeadRows | None:
        """Make those of rows that wear the adapters in `slots` (-1: none, or several); None: no row has a head."""
        own = tiles.own
        if own is None or not any(own.wearers.get(slot, 0) & Own.HEAD for slot in slots):
            return None
        place = OwnPlaces(tiles.ranges_host.shape[1]).head
        worn = [slot if own.wearers.get(slot, 0) & Own.HEAD else -1 for slot in slots]
        ends = (own.ranges_host[slot, place, 1] for slot in set(worn) - {-1})
        last = tiles.tiles_host[[int(end) - 1 for end in ends]]
        added = max(0, int((last[:, 2] + last[:, 3]).max()) - vocab)
        return cls(torch.tensor(worn, dtype=torch.int32), added, tiles)


def no_tiles(config: ModelConfig, device: torch.device | None = None) -> TileTable:
    """Build the tile table of a server without adapters."""
    ranges = torch.zeros(1, config.num_layers, config.num_sites, 2, dtype=torch.int32)
    tiles = torch.zeros(0, TILE_COLUMNS, dtype=torch.int32)
    return TileTable(ranges.to(device), tiles.to(device), ranges, tiles)
