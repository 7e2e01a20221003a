"""Batch-invariant backends: a token's logits have the same bits however its sequence is computed, and beside whom.

Over the CPU's kernels; tests/kernels/gpu runs this file over the Triton kernels in the interpreter.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraplex.kernels.cpu import abi
from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.ops import Backend
from loraplex.kernels.select import load_backend
from loraplex.server.models.recorded import record
from tests.support.harness import Harness, Sequence
from tests.support.harness_adapters import Mix, wearing, write_adapters
from tests.support.tiny import make_tiny_model

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
CPU = [f"cpu-{isa}" for isa in abi.ISAS if abi.library().loraplex_isa(isa.encode()) >= 0]
BACKENDS = ["triton"] if INTERPRET else CPU
FAMILIES = ["llama"] if INTERPRET else ["llama", "qwen3", "gemma2", "mistral"]
DTYPES = [torch.float32] if INTERPRET else [torch.float32, torch.bfloat16]
PROMPT, ANSWER = 21, 5

if INTERPRET:
    from tests.support import triton_bf16

    triton_bf16.apply()

    @pytest.fixture(autouse=True)
    def _dots_in_order() -> Iterator[None]:
        with triton_bf16.dots_in_order():
            yield


def _backend(name: str) -> Backend:
    kind, _, isa = name.partition("-")
    return CpuBackend(isa, batch_invariant=True) if isa else load_backend(kind, "cpu", batch_invariant=True)


@dataclass
class _Member:
    """A sequence of a step's company."""

    sequence: Sequence
    mix: Mix


class _World:
    """One model; the sequence that is looked at, and others."""

    def __init__(self, path: Path, ops: Backend, dtype: torch.dtype, recorded: bool = False) -> None:
        self.harness = Harness(path, ops=ops, dtype=dtype, num_pages=96, page_bytes=1 << 14)
        if recorded:
            self.harness.decoder = record(self.harness.decoder, 80, 80)
        self.tiles = write_adapters(self.harness, 2)
        rng = random.Random(1)

        def member(prompt: int, answer: int, mix: Mix) -> _Member:
            sequence = self.harness.sequence([rng.randrange(2, 60) for _ in range(prompt + answer)])
            sequence.prompt_len = prompt
            return _Member(sequence, mix)

        self.watched = member(PROMPT, ANSWER, ((0, 1.0), (1, -0.5)))
        self.others = [member(30, 0, ((1, 1.0),)), member(2, 9, ((0, 1.0),)), member(9, 30, ())]

    def step(self, work: Many[tuple[_Member, int]]) -> Tensor | None:
        """The next tokens of each member, in the engine's order; the watched one's logits, where it took part."""

        def is_decode(member: _Member) -> bool:
            return member.sequence.computed >= member.sequence.prompt_len

        order = sorted(work, key=lambda entry: (not entry[0].mix, not is_decode(entry[0])))
        worn = [(member, n) for member, n in order if member.mix]
        adapters = wearing([(n, member.mix) for member, n in worn], sum(is_decode(member) for member, _ in worn))
        logits = self.harness.step([(m.sequence, n) for m, n in order], adapters, self.tiles)
        return next((found.clone() for (m, _), found in zip(order, logits, strict=True) if m is self.watched), None)

    def run(self, chunks: Many[int], beside: Many[Many[int]] = ()) -> Tensor:
        """The watched sequence in chunks, the others with as many tokens in each step as `beside` says: [T, vocab]."""
        found = []
        for i, chunk in enumerate(chunks):
            counts = beside[i % len(beside)] if beside else ()
            company = [(m, n) for m, n in zip(self.others, counts, strict=False) if n]
            logits = self.step([*company, (self.watched, chunk)])
            assert logits is not None
            found.append(logits)
        return torch.cat(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BACKENDS)
def test_bits_of_a_token(name: str, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_tiny_model(family, tmp_path / "model", num_hidden_layers=1 if INTERPRET else 2)
    ops = _backend(name)

    def world(recorded: bool = False) -> _World:
        return _World(path, ops, dtype, recorded)

    alone = world().run([PROMPT, *[1] * ANSWER])
    assert bool(alone.isfinite().all())
    assert len({tuple(row) for row in alone.tolist()}) == PROMPT + ANSWER
    ways = {
        "in chunks beside others": ([4, 1, 11, 5, *[1] * ANSWER], [(3, 0, 9), (1, 2, 1), (3, 1, 1)]),
        "computed again after a preemption": ([PROMPT + ANSWER], [(13, 2, 1)]),
    }
    if not INTERPRET:  # it takes ten seconds for these
        ways |= {
            "token by token": ([1] * (PROMPT + ANSWER), []),
            "in odd chunks": ([2, 17, 2, *[1] * ANSWER], []),
            "beside others": ([PROMPT, *[1] * ANSWER], [(7, 1, 2), (5, 1, 0), (1, 1, 1)]),
        }
    for way, (chunks, beside) in ways.items():
        for recorded in (False, True) if name.startswith("cpu") else (False,):
            assert torch.equal(world(recorded).run(chunks, beside), alone), f"{way}, recorded: {recorded}"
