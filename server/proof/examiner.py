"""Read a version's files once more and say what they come to: norms, rounding, and the plain side of the probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.positions import Span
from loraplex.adapters.tiers.measuring import Measurer, by_layer
from loraplex.adapters.version import AdapterVersion
from loraplex.server.proof.changes import PlainChange
from loraplex.server.proof.prober import FusedAnswers
from loraplex.server.proof.receipt import BaseIdentity, Probe, Receipt


class Plain(Protocol):
    """PlainModel.logprobs."""

    def __call__(
        self,
        base: tuple[int, ...],
        adapted: tuple[int, ...],
        change: PlainChange,
        throttle: Callable[[], None],
        acts: tuple[Span, ...],
    ) -> tuple[Tensor, Tensor]: ...


class Examiner:
    """For one thread."""

    def __init__(
        self, measurer: Measurer, plain: Plain, identify_base: Callable[[Callable[[], None]], BaseIdentity]
    ) -> None:
        """identify_base: called once, with a throttle."""
        self._measurer = measurer
        self._plain = plain
        self._identify_base = identify_base
        self._base: BaseIdentity | None = None

    def identify(self, throttle: Callable[[], None]) -> BaseIdentity:
        """Say which base this is; that takes a while, once."""
        if self._base is None:
            self._base = self._identify_base(throttle)
        return self._base

    def __call__(
        self, version: AdapterVersion, fused: FusedAnswers | None, error: str | None, throttle: Callable[[], None]
    ) -> Receipt:
        """Make the receipt of `version` out of its files, calling `throttle` between pieces of a millisecond.

        fused: what the engine has answered; None: it has not, because of `error`. Raises AdapterError ("changed" where
        the files are others by now), WeightsError, and what `throttle` raises.
        """
        identity = self.identify(throttle)
        with self._measurer.opened(version.source, throttle) as adapter:
            if adapter.digest != version.digest:
                raise AdapterRefused(
                    "changed", f"its source holds {adapter.digest[:12]} by now, and it is {str(version.digest)[:12]}"
                )
            measured = self._measurer.measure(adapter, throttle)
            if fused is None:
                return Receipt(measured, identity, None, error)
            outside = adapter.outside()
            change = PlainChange(by_layer(adapter), outside)
            base, adapted = self._plain(fused.base.ids, fused.adapted.ids, change, throttle, fused.acts)
            worn = outside.worn(fused.adapted.ids)
        probe = Probe(len(fused.base.logprobs), fused.base.furthest(base), fused.adapted.furthest(adapted), worn)
        return Receipt(measured, identity, probe)
