"""What the scheduler is given and what it hands out: limits, the adapters' place, a step's plan."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Protocol

from loraplex.adapters.version import AdapterVersion
from loraplex.server.engine.policy.rows import RowResult, StepInput
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.request import TokenEvent


class Placement(Protocol):
    """The adapters as the scheduler sees them: where an adapter is, and moving it to the device and off it.

    On the device an adapter's pages are idle unless pinned, and idle ones leave with the Reclaimer's other things.
    """

    def request(self, version: AdapterVersion) -> None:
        """Start bringing it to host memory unless it is there or on the device. Never blocks. Counted."""
        ...

    def cancel(self, version: AdapterVersion) -> None:
        """Undo one request(): with the last of them, an adapter on its way may turn back."""
        ...

    def missing_pages(self, versions: ListLike[AdapterVersion]) -> list[int] | None:
        """Pages each would take: 0 for what is on the device or being copied to it. None: one is still on its way.

        Raises what kept one from being read. Otherwise, unless None, every version has its digest, and those in host
        memory stay there until the next call.
        """
        ...

    def load(self, version: AdapterVersion) -> bool:
        """Take slot and pages and begin to copy one of those missing_pages() was asked about, from host memory.

        False when there is no page or no slot for it; evicts nothing.
        """
        ...

    def is_ready(self, version: AdapterVersion) -> bool:
        """Whether all its bytes are on the device."""
        ...

    def start_step(self, busy: bool) -> bool:
        """Go on with copies under way: for a bounded time when `busy` (streams decode), or else until they are done.

        True if one is still under way.
        """
        ...

    def pin(self, digest: str) -> None:
        """Keep it on the device until as many unpin()s."""
        ...

    def unpin(self, digest: str) -> None: ...

    def slot_of(self, digest: str, unit: int = 0) -> int | None:
        """The slot of a unit of an adapter on the device; None where it is not there. A pinned one keeps its slot."""
        ...

    def evict_for_slot(self) -> bool:
        """Evict the idle adapter that is cheapest to lose, for its slot. False when none is idle."""
        ...


@dataclass(frozen=True)
class SchedulerLimits:
    max_model_len: int  # tokens of a sequence, prompt and generated
    max_num_seqs: int  # running at once
    token_budget: int  # tokens of a step at most; fewer where it is learned (budget.py)
    num_slots: int  # adapters on the device at once
    vocab_size: int
    rope_switch: int | None = None  # longrope: a longer sequence is recomputed with the long factors, once
    prefix_cache: bool = True  # False where keys depend on the sequence's length (dynamic NTK), or nobody wants it
    ageing: float = 30.0  # seconds without service after which a client's next request comes before all others
    decode_steps: int = 1  # that may follow one another without coming back (multi_step.py)
    scoring: float = 0.0  # what the log-probability of a prompt's token costs, in tokens computed

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "token_budget", "num_slots", "vocab_size", "decode_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.ageing > 0:
            raise ValueError(f"ageing is {self.ageing} s; expected more than 0")


@dataclass(frozen=True)
class StepPlan:
    """A step, and whose its rows are."""

    step: StepInput
    seqs: tuple[Sequence, ...] = ()  # of the rows, in their order
    failed: tuple[TokenEvent, ...] = ()  # requests that ended while planning: out of time, or without their adapter

    def steps_of(self, results: ListLike[RowResult]) -> int:
        """How many steps these came of."""
        return len(results[0].tokens) if self.step.steps > 1 else 1

    @property
    def prompt_cost(self) -> int:
        """What those that are no decode rows take of the step's budget."""
        rows = zip(self.seqs, self.step.rows, strict=True)
        return sum(seq.cost(len(row.tokens)) for seq, row in rows if not row.is_decode)
