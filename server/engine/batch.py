"""StepPlan -> ForwardBatch: rows put in the order the ops want, tables laid out, each array converted once.

rows    | adapter decode, equal mixes adjacent | adapter prefill, alike | base decode | base prefill |
segments|   s0   |   s1   |        s2          |   s3   |      s4       |  none: base tokens cost nothing
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListLike
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex.kernels.metadata import AdapterSegments, AttentionMeta, KVGroup, TileTable
from loraplex.server.engine.kv_cache import KVCache
from loraplex.server.engine.scheduler import PlanEntry, StepPlan
from loraplex.server.models.inputs import ForwardBatch

Mix = tuple[tuple[int, float], ...]  # ((slot, weight), ...), in the order of the adapters' digests


def build_batch(
    plan: StepPlan, kv: KVCache, tiles: TileTable, slot_of: Callable[[str], int | None], device: torch.device
) -> ForwardBatch:
    """The tensors of one step. The plan's sequences have their pages and their adapters are on the device.

    logit_rows is in the order of the plan's sampling entries, whatever the order of the rows.
    """
    mixes = [_mix(entry, slot_of) for entry in plan.entries]
    # Stable, so equal mixes keep the plan's order. Digests would sort as well as slots; slots are shorter.
    order = sorted(range(len(mixes)), key=lambda i: (not mixes[i], not plan.entries[i].is_decode, mixes[i]))
    entries = [plan.entries[i] for i in order]
    counts = np.array([entry.num_tokens for entry in entries], dtype=np.int64)
    starts = np.array([entry.seq.num_computed for entry in entries], dtype=np.int64)
    bounds = np.zeros(len(entries) + 1, dtype=np.int64)
    np.cumsum(counts, out=bounds[1:])
    seq_of_token = np.repeat(np.arange(len(entries)), counts)
    positions = np.arange(bounds[-1]) + (starts - bounds[:-1])[seq_of_token]
    row_of = {index: row for row, index in enumerate(order)}
    ends = [bounds[row_of[i] + 1] - 1 for i, entry in enumerate(plan.entries) if entry.samples]

    def tensor(values: NDArray[np.int32] | NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(device)

    kv_lens = starts + counts
    attention = AttentionMeta(
        query_ptr=tensor(bounds.astype(np.int32)),
        kv_lens=tensor(kv_lens.astype(np.int32)),
        query_bounds=tuple(bounds.tolist()),
        kv_lens_host=tuple(kv_lens.tolist()),
        is_decode=tuple(entry.is_decode for entry in entries),
        groups=tuple(
            KVGroup(tensor(table), tensor(_store_index(table, seq_of_token, positions, kv.block_size)))
            for table in _block_tables(entries, kv)
        ),
    )
    return ForwardBatch(
        input_ids=tensor(_input_ids(entries, int(bounds[-1]))),
        positions=tensor(positions),
        rope_lens=tuple(entry.seq.num_tokens for entry in entries),
        attention=attention,
        adapters=_segments(entries, [mixes[i] for i in order], device),
        tiles=tiles,
        logit_rows=tensor(np.array(ends, dtype=np.int64)),
    )


def _mix(entry: PlanEntry, slot_of: Callable[[str], int | None]) -> Mix:
    mix = []
    for digest, weight in entry.seq.mix:
        slot = slot_of(digest)
        assert slot is not None, f"{entry.seq!r} is planned, but its adapter {digest[:12]} is not on the device"
        mix.append((slot, weight))
    return tuple(mix)


def _input_ids(entries: ListLike[PlanEntry], total: int) -> NDArray[np.int64]:
    ids: list[int] = []
    for entry in entries:
        start = entry.seq.num_computed
        ids += entry.seq.tokens[start : start + entry.num_tokens]
    assert len(ids) == total
    return np.array(ids, dtype=np.int64)


def _block_tables(entries: ListLike[PlanEntry], kv: KVCache) -> list[NDArray[np.int32]]:
    """Per group: [num_seqs, max_blocks] int32, -1 where there is no page."""
    per_seq = [kv.tables(entry.seq.number) for entry in entries]
    most = max(len(tables[0]) for tables in per_seq)  # a sequence's tables are of one length in all groups
    result = []
    for group in range(len(kv.groups)):
        table = np.full((len(entries), most), -1, dtype=np.int32)
        for row, tables in enumerate(per_seq):
            table[row, : len(tables[group])] = tables[group]
        result.append(table)
    return result


def _store_index(
    table: NDArray[np.int32], seq_of_token: NDArray[np.int64], positions: NDArray[np.int64], block_size: int
) -> NDArray[np.int64]:
    """[num_tokens] int64: page * block_size + offset of each token."""
    pages = table[seq_of_token, positions // block_size].astype(np.int64)
    assert (pages >= 0).all(), "a token has no page to go to"
    return pages * block_size + positions % block_size


def _segments(entries: ListLike[PlanEntry], mixes: ListLike[Mix], device: torch.device) -> AdapterSegments | None:
    """Neighbours of equal mix and role become one segment. None when nobody wears an adapter."""
    bounds, segment_mixes, decode = [0], [], 0
    for (is_decode, mix), members in groupby(
        zip(entries, mixes, strict=True), key=lambda pair: (pair[0].is_decode, pair[1])
    ):
        if not mix:
            break  # adapters come first
        bounds.append(bounds[-1] + sum(entry.num_tokens for entry, _ in members))
        segment_mixes.append(mix)
        decode += is_decode
    if not segment_mixes:
        return None
    sizes = [len(mix) for mix in segment_mixes]
    return AdapterSegments(
        indptr=torch.tensor(bounds, dtype=torch.int32, device=device),
        mix_ptr=torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32, device=device),
        mix_slot=torch.tensor([slot for mix in segment_mixes for slot, _ in mix], dtype=torch.int32, device=device),
        mix_weight=torch.tensor([w for mix in segment_mixes for _, w in mix], dtype=torch.float32, device=device),
        bounds=tuple(bounds),
        mixes=tuple(segment_mixes),
        num_decode_segments=decode,
    )
