"""What a step holds beside weights and arena, by what the memory is wanted for. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.kernels.constants import BLOCK_SIZE, PANEL
from loraplex.kernels.hugepages import HUGE_PAGE
from loraplex.kernels.records import element_bytes
from loraplex.server.engine.policy.kv_groups import kv_groups
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.rotary import table_positions

LOGIT_BYTES, LOGIT_ROWS = 32 << 20, 64
"""Most bytes (fp32) and rows of one slice of logits: 64 rows up to 128k tokens of vocabulary, 32 at 256k. More rows
would make the product no faster."""


@dataclass(frozen=True)
class Demand:
    """What the memory is wanted for."""

    max_model_len: int | None  # tokens; None: the model's own limit, or less where memory is short
    max_num_seqs: int
    token_budget: int
    host_store_bytes: int | None = None  # None: what suits the device


@dataclass(frozen=True)
class Surroundings:
    """What lies in the same memory, and how the ops work there."""

    shared: bool = True  # one memory for device and host: the CPU
    process_bytes: int = 0  # the process without weights, arena, host store and scratch; 0: not counted
    loading_bytes: int = 0  # that reading the weights takes for a while, before the arena is written
    threads: int = 1  # that compute, each with scratch of its own
    lean: bool = False  # the CPU kernels: they work in place, where plain PyTorch makes fp32 copies and whole scores
    quantised: bool = False  # some linears of the base are


def scratch_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    length: int,
    demand: Demand,
    around: Surroundings = Surroundings(),
) -> int:
    """Bound what a step holds beside weights and arena: activations, angles, tables, logits and their sampling."""
    tokens, element = demand.token_budget, element_bytes(dtype)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    if around.lean:
        # Workspace of the recorded step: results live until their last reader, six of the stream at once at most.
        # Each width once more for an input that adapters turn, and projections whose outputs cut a panel.
        cut = [p for p in config.projections() if p.out_start % PANEL or p.out_features % PANEL]
        turned = hidden + q + inner + sum(p.out_features + 2 * PANEL for p in cut)
        activations = tokens * (6 * hidden + 3 * q + 2 * kv + 3 * inner + turned) * element
        # A thread's own: attention's sums; rows widened to fp32 for the linears and for the adapters (kWidened, or a
        # block of rows where that is more, and half as much again: Scratch); sampling's candidates.
        activations += around.threads * ((5 << 19) + 1024 * max(hidden, inner, q) + 32 * vocab)
        if around.quantised:  # a step's inputs of one linear as its kernel wants them (prepared_bytes in records.h)
            activations += 5 * tokens * max(hidden, inner, q)
    else:
        activations = tokens * (4 * hidden + 2 * (q + 2 * kv) + 4 * inner) * max(4, element)  # ops work on fp32 copies
        activations += 2 * config.num_heads * min(tokens, 128) * length * 4 + 4 * kv * length * 4  # scores; KV gathered
    angles = tokens * config.head_dim * 4 * (2 * len(config.ropes) + 2)
    angles += sum(8 * rope.rotary_dim * table_positions(rope) for rope in config.ropes)
    blocks = -(-length // BLOCK_SIZE) * demand.max_num_seqs * 4 * len(kv_groups(config.windows))
    tables = 2 * blocks + tokens * 64 + demand.max_num_seqs * 4096
    rows = demand.max_num_seqs + tokens  # that logits are wanted of: all of a prompt's may be
    activations += 4 * rows * hidden * element
    logits = min(rows, logit_rows(vocab)) * vocab * 4
    # Rows that are not sampled plainly are gathered into a second tensor, soft-capping makes a third; a single row is
    # adjusted, sorted and summed up in fp64 at some 64 bytes a token.
    sampling = logits * (3 if config.final_softcap is not None else 2) + 64 * vocab
    huge = 2 * HUGE_PAGE if around.shared else 0  # the arena's and the weights' last huge pages are written in part
    return activations + angles + tables + sampling + huge


def logit_rows(vocab_size: int) -> int:
    """Count the rows of logits computed at once."""
    return max(1, min(LOGIT_ROWS, LOGIT_BYTES // (vocab_size * 4)))
