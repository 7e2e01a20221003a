"""A decoder whose forward pass is recorded once and run by one call per step, where the backend can do that."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from loraplex.kernels.ops import DecodeSteps, Program, StepInputs
from loraplex.kernels.records import NUM_SITES, TILE_COLUMNS, AdapterSegments, AttentionMeta, KVGroup, TileTable
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.inputs import ForwardBatch


def record(decoder: Decoder, max_tokens: int, max_rows: int) -> Decoder | RecordedDecoder:
    """`decoder` recorded for steps of up to max_tokens tokens and max_rows logit rows; itself where the backend runs
    its ops one by one."""
    stand_in = _stand_in(decoder, max_tokens, max_rows)
    rotations = decoder.rotations(stand_in)
    recorder = decoder.ops.recorder(decoder.weights.dtype, [cos for cos, _ in rotations])
    if recorder is None:
        return decoder
    twin = Decoder(decoder.config, decoder.weights, recorder.ops, decoder.kv_layers, decoder.arena)
    return RecordedDecoder(decoder, twin.hidden(stand_in, rotations), recorder.program())


class RecordedDecoder:
    """The same calls and results as the Decoder it was made from.

    forward() returns workspace: it holds until the next step.
    """

    def __init__(self, decoder: Decoder, hidden: Tensor, program: Program) -> None:
        """hidden [max_rows, H]: where `program` leaves its result."""
        self.config = decoder.config
        self.ops = decoder.ops
        self._decoder = decoder
        self._hidden = hidden
        self._program = program

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The final hidden states [L, H], normed, of the tokens in batch.logit_rows."""
        self._program.run(self._inputs(batch))
        return self._hidden[: batch.logit_rows.shape[0]]

    @property
    def follows_up(self) -> bool:
        """Whether there is decode(): it draws from logits as the head leaves them."""
        return self.config.final_softcap is None

    def decode(
        self, batch: ForwardBatch, draws: Tensor | None, stops: Tensor, halt: ctypes.c_int32
    ) -> tuple[Tensor, Tensor]:
        """Up to batch.steps steps of decode rows, each of the tokens that the one before drew (see DecodeSteps).

        Returns those [steps done, L] int64 in the order of logit_rows, and the last step's logits [L, vocab] fp32.
        """
        steps = DecodeSteps(batch.steps, self._hidden, self._decoder.weights.head, draws, stops, halt)
        return self._program.decode(self._inputs(batch), steps)

    def logits(self, hidden: Tensor, room: Tensor | None = None) -> Tensor:
        """As Decoder.logits."""
        return self._decoder.logits(hidden, room)

    def _inputs(self, batch: ForwardBatch) -> StepInputs:
        return StepInputs(
            batch.input_ids,
            batch.logit_rows,
            self._decoder.rotations(batch),
            batch.attention,
            self._decoder.arena,
            batch.tiles,
            batch.adapters,
        )


def _stand_in(decoder: Decoder, max_tokens: int, max_rows: int) -> ForwardBatch:
    """A batch of the largest step's shapes; only shapes are looked at while recording."""
    tokens = torch.zeros(max_tokens, dtype=torch.int64)
    none = torch.zeros(1, dtype=torch.int32)
    ranges = torch.zeros(1, decoder.config.num_layers, NUM_SITES, 2, dtype=torch.int32)
    tiles = torch.zeros(0, TILE_COLUMNS, dtype=torch.int32)
    group = KVGroup(block_table=torch.zeros(1, 1, dtype=torch.int32), store_index=tokens)
    return ForwardBatch(
        input_ids=tokens,
        positions=tokens,
        rope_lens=(max_tokens,),
        attention=AttentionMeta(
            query_ptr=none,
            kv_lens=none,
            query_bounds=(0, max_tokens),
            kv_lens_host=(max_tokens,),
            is_decode=(False,),
            groups=(group,) * (1 + max(layer.group for layer in decoder.kv_layers)),
        ),
        adapters=AdapterSegments(none, none, none, torch.zeros(1), (0,), (), 0),
        tiles=TileTable(ranges, tiles, ranges, tiles),
        logit_rows=torch.zeros(max_rows, dtype=torch.int64),
    )
