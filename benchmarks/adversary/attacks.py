"""The attacks by name, and how each is run: in a process of its own, so that the client beside it is not held up."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from loraplex.benchmarks.adversary import engine_attacks as engine
from loraplex.benchmarks.adversary import file_attacks as files
from loraplex.benchmarks.adversary import http_attacks as http
from loraplex.benchmarks.adversary.target import Attack, Target

PREPARING, ENDING = 120.0, 5.0
"""Seconds that an attack may take before it begins, and when it is over."""


@dataclass(frozen=True)
class Kind:
    """One attack."""

    run: Attack
    beside: Attack | None = None  # what it is compared with; None: nothing
    needs_files: bool = False  # it writes adapters where the server reads them
    open_files: int | None = None  # what the server's `ulimit -n` is; None: as it is here


KINDS: dict[str, Kind] = {
    "huge-shapes": Kind(files.huge_shapes, needs_files=True),
    "many-tensors": Kind(files.many_tensors, needs_files=True),
    "many-lists": Kind(files.many_lists, needs_files=True),
    "appearing": Kind(files.appearing, needs_files=True),
    "many-headers": Kind(http.many_headers),
    "one-header": Kind(http.one_header),
    "slow-heads": Kind(http.slow_heads),
    "small-values": Kind(http.small_values),
    "many-ids": Kind(http.many_ids),
    "tokenize": Kind(http.tokenize),
    "texts": Kind(http.texts),
    "long-texts": Kind(http.long_texts),
    "prompts": Kind(http.prompts),
    "token-strs": Kind(http.token_strs),
    "lorax-texts": Kind(http.lorax_texts),
    "short-texts": Kind(http.short_texts),
    "questions": Kind(http.questions),
    "refusals": Kind(http.refusals),
    "idle": Kind(http.idle, open_files=512),
    "echo": Kind(engine.echo, engine.prompts),
    "grammar": Kind(engine.grammar, engine.plain(4)),
    "logit-bias": Kind(engine.logit_bias, engine.plain(8)),
    "many-choices": Kind(engine.many_choices, engine.plain(128)),
    "top-logprobs": Kind(engine.top_logprobs, engine.plain(64)),
    "tools": Kind(engine.tools, engine.long_chats),
    "never-reading": Kind(engine.never_reading, engine.plain(16)),
    "disconnects": Kind(engine.disconnects, engine.plain(16)),
}


@dataclass
class Running:
    """An attack that has begun."""

    pid: int
    answers: Counter[int]  # to the attacker, by status; once it has ended


@contextmanager
def running(name: str, target: Target, seconds: float, *, beside: bool) -> Iterator[Running | None]:
    """The attack `name`, or what it is compared with, while the block runs; None where nothing is run."""
    if beside and KINDS[name].beside is None:
        yield None
        return
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(theirs, name, target, seconds, beside))
    process.start()
    theirs.close()
    found = Running(process.pid or 0, Counter())
    try:
        if ours.poll(PREPARING) and ours.recv() is None:
            yield found
        else:
            raise RuntimeError(f"{name} has not begun after {PREPARING:.0f} s")
        with suppress(EOFError):
            found.answers.update(ours.recv() if ours.poll(ENDING) else {})
    finally:
        process.kill()
        process.join()


def _run(pipe: Connection, name: str, target: Target, seconds: float, beside: bool) -> None:
    """In the process. At nice 19: attackers have machines of their own, and are not to take the server's cores."""
    os.nice(19)
    kind = KINDS[name]
    attack = kind.beside if beside else kind.run
    assert attack is not None
    told = replace(target, begin=lambda: pipe.send(None))
    asyncio.run(attack(told, seconds))
    pipe.send(told.answers)
