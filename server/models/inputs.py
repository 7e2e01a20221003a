"""What one step gives the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from loraplex.kernels.constants import BLOCK_SIZE, TILE_COLUMNS, Own
from loraplex.kernels.records import AdapterSegments, AttentionMeta, KVGroup, OwnPlaces, TileTable
from loraplex.server.models.config import ModelConfig

SlotMix = tuple[tuple[int, float], ...]
"""((slot, weight), ...) that a row wears."""

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
    """Rows of logits of which some have adapters that act on the head."""

    segments: AdapterSegments  # of the rows in place of tokens
    added: int  # columns beyond the base's vocabulary, the most that any of them has
    tiles: TileTable

    @classmethod
    def of(
        cls, mixes: Sequence[SlotMix], tiles: TileTable, vocab: int, device: torch.device | None = None
    ) -> HeadRows | None:
        """Make those of rows that wear `mixes`; None: none of them acts on the head."""
        own = tiles.own
        if own is None or not own.wearers:
            return None
        heads = {slot for slot, bits in own.wearers.items() if bits & Own.HEAD}
        worn = [mix if any(slot in heads for slot, _ in mix) else () for mix in mixes]
        if not any(worn):
            return None
        runs = [(mix, len(list(same))) for mix, same in groupby(worn)]
        alone = {mix[0][0] for mix, _ in runs if len(mix) == 1}
        ends = [int(end) for end in own.ranges_host[list(alone), OwnPlaces(tiles.num_layers).head, 1] if end]
        last = tiles.tiles_host[[end - 1 for end in ends]]
        added = max(0, int((last[:, 2] + last[:, 3]).max()) - vocab) if ends else 0
        members = [member for mix, _ in runs for member in mix]
        bounds = tuple(accumulate((count for _, count in runs), initial=0))
        segments = AdapterSegments(
            indptr=torch.tensor(bounds, dtype=torch.int32, device=device),
            mix_ptr=torch.tensor([*accumulate((len(m) for m, _ in runs), initial=0)], dtype=torch.int32, device=device),
            mix_slot=torch.tensor([slot for slot, _ in members], dtype=torch.int32, device=device),
            mix_weight=torch.tensor([weight for _, weight in members], dtype=torch.float32, device=device),
            bounds=bounds,
            mixes=tuple(mix for mix, _ in runs),
            num_decode_segments=len(runs),
        )
        return cls(segments, added, tiles)


def no_tiles(config: ModelConfig, device: torch.device | None = None) -> TileTable:
    """Build the tile table of a server without adapters."""
    ranges = torch.zeros(1, config.num_layers + 1, config.num_sites, 2, dtype=torch.int32)
    tiles = torch.zeros(0, TILE_COLUMNS, dtype=torch.int32)
    return TileTable(ranges.to(device), tiles.to(device), ranges, tiles)
