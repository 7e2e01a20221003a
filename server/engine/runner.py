"""One step on the device: batch, forward, logits in bounded slices, sampling."""

from __future__ import annotations

import torch

from loraplex.adapters.residency import Residency
from loraplex.server.engine.arena import logit_rows
from loraplex.server.engine.batch import build_batch
from loraplex.server.engine.kv_cache import KVCache
from loraplex.server.engine.sampler import Sampled, SampleRow, sample
from loraplex.server.engine.scheduler import StepPlan
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.graphs import GraphedDecoder
from loraplex.server.models.recorded import RecordedDecoder


class ModelRunner:
    """Executes plans. Holds no state of its own."""

    def __init__(
        self,
        decoder: Decoder | RecordedDecoder | GraphedDecoder,
        kv: KVCache,
        residency: Residency,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._kv = kv
        self._residency = residency
        self._device = device
        self._slice = logit_rows(decoder.config.vocab_size)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> list[Sampled]:
        """Compute the plan's tokens; the draws of its sampling entries, in their order. The plan is not empty."""
        batch = build_batch(plan, self._kv, self._residency.table, self._residency.slot_of, self._device)
        hidden = self._decoder.forward(batch)  # [L, H]
        rows = [
            SampleRow(seq.request.params, seq.num_tokens, seq.request.prompt_ids, seq.output)
            for seq in (entry.seq for entry in plan.entries if entry.samples)
        ]
        sampled: list[Sampled] = []
        for start in range(0, len(rows), self._slice):  # a vocabulary of 256k costs 1 MB a row
            logits = self._decoder.logits(hidden[start : start + self._slice])
            sampled += sample(logits, rows[start : start + self._slice])
        return sampled
