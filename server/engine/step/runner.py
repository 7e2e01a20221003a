"""One step on the device: batch, forward, logits in bounded slices, sampling."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex.adapters.tiers.residency import Residency
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.plan import PlanEntry, StepPlan
from loraplex.server.engine.request import GenerationRequest
from loraplex.server.engine.step.batch import Kept, build_batch
from loraplex.server.engine.step.masks import WAIT_SECONDS, Mask, MaskPool
from loraplex.server.engine.step.memory import logit_rows
from loraplex.server.engine.step.sampler import Sampled, SampleRow, draws_ahead, sample, sampled_ahead, score
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.graphs import GraphedDecoder
from loraplex.server.models.inputs import ForwardBatch
from loraplex.server.models.recorded import RecordedDecoder


class ModelRunner:
    """Executes plans; the masks of grammars are computed beside the forward pass."""

    def __init__(
        self,
        decoder: Decoder | RecordedDecoder | GraphedDecoder,
        kv: KVCache,
        residency: Residency,
        device: torch.device,
        halt: ctypes.c_int32 | None = None,
    ) -> None:
        """halt: other than 0 while somebody waits for the end of the step; those after it are not begun then."""
        self._halt = halt if halt is not None else ctypes.c_int32()  # one of 0 is false
        self._decoder = decoder
        self._kv = kv
        self._residency = residency
        self._device = device
        self._slice = logit_rows(decoder.config.vocab_size)
        self.masks = MaskPool()
        self._kept = Kept()
        # For a slice's logits on the CPU: memory that is taken anew costs as much as the product, 15 ms for 64 rows
        self._room = torch.empty(self._slice, decoder.config.vocab_size) if device.type == "cpu" else None

    @torch.inference_mode()
    def execute(self, plan: StepPlan, on_launch: Callable[[], None] = lambda: None) -> list[Sampled]:
        """Compute the plan's tokens; the draws of its sampling entries, in their order. The plan is not empty.

        Where the plan allows several steps and the decoder can, the draws of as many as came about, step after step.

        `on_launch` is called when all is prepared, right before the forward pass.
        """
        table, slot_of = self._residency.table, self._residency.slot_of
        steps = plan.steps if len(plan.entries) <= self._slice else 1
        batch = build_batch(plan, self._kv, table, slot_of, self._device, self._kept, steps)
        sampling = [entry.seq for entry in plan.entries if entry.samples]
        masks = self.masks.begin([(seq.request.constraint, seq.output) for seq in sampling])
        rows = [SampleRow(seq.request.params, seq.num_tokens, _given(seq.request), seq.output) for seq in sampling]
        if steps > 1:
            return self._follow_up(batch, rows, on_launch)
        on_launch()
        hidden = self._decoder.forward(batch)  # [L, H]
        rows, late = _masked(rows, masks)
        sampled: list[Sampled] = []
        for start in range(0, len(rows), self._slice):  # a vocabulary of 256k costs 1 MB a row
            logits = self._decoder.logits(hidden[start : min(start + self._slice, len(rows))], self._room)
            sampled += sample(logits, rows[start : start + self._slice], self._decoder.ops)
        if hidden.shape[0] > len(rows):
            self._read_prompts(plan, hidden[len(rows) :])
        for place in late:
            sampled[place] = Sampled(None, is_held=True)
        return sampled

    def _follow_up(self, batch: ForwardBatch, rows: list[SampleRow], on_launch: Callable[[], None]) -> list[Sampled]:
        """Several steps of nothing but decode rows."""
        assert isinstance(self._decoder, RecordedDecoder), "steps follow one another where the pass is recorded"
        draws = draws_ahead(rows, batch.steps)
        stops = torch.from_numpy(np.unique(np.concatenate([row.params.stops for row in rows])))
        on_launch()
        return sampled_ahead(*self._decoder.decode(batch, draws, stops, self._halt))

    def _read_prompts(self, plan: StepPlan, hidden: Tensor) -> None:
        """hidden [sum of prompt_rows, H]: what is wanted of the prompts themselves, into their sequences."""
        start = 0
        for entry in plan.entries:
            if count := len(entry.prompt_rows):
                rows = hidden[start : start + count]
                start += count
                if entry.seq.request.pooling is not None:
                    _pool(entry, rows)
                else:
                    self._score(entry, rows)

    def _score(self, entry: PlanEntry, hidden: Tensor) -> None:
        """hidden [n, H] of prompt tokens: the log-probability of the one after each."""
        seq, k = entry.seq, entry.seq.request.params.prompt_logprobs or 0
        first = seq.num_computed + 1
        for start in range(0, hidden.shape[0], self._slice):
            logits = self._decoder.logits(hidden[start : start + self._slice], self._room)
            following = seq.tokens[first + start : first + start + logits.shape[0]]
            seq.prompt_scores.append(score(logits, following, k, self._decoder.ops))


def _masked(rows: list[SampleRow], masks: Sequence[Mask | None]) -> tuple[list[SampleRow], list[int]]:
    """The rows with their masks, and the places of those whose mask is not there in time."""
    late: list[int] = []
    if any(masks):
        until = time.monotonic() + WAIT_SECONDS
        for place, mask in enumerate(masks):
            if mask is not None:
                bits = mask.take(until)
                rows[place] = replace(rows[place], mask=bits)
                late += [place] if bits is None else []
    return rows, late


def _given(request: GenerationRequest) -> Sequence[int] | NDArray[np.int64]:
    return request.prompt_ids if request.params.repetition_penalty == 1.0 else request.prompt_array


def _pool(entry: PlanEntry, hidden: Tensor) -> None:
    """hidden [n, H] of prompt tokens, into one vector for all of them."""
    seq = entry.seq
    total = hidden.float().sum(0).cpu().numpy()
    if seq.pooled is not None:
        total += seq.pooled
    if entry.samples and seq.request.pooling == "mean":
        total /= seq.num_prompt
    seq.pooled = total
