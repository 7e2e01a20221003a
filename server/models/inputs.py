"""What one step gives the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loraplex.kernels.records import AdapterSegments, AttentionMeta, TileTable


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
