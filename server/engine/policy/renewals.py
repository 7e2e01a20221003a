"""Sequences that go on under other versions of their adapters than they began with.

    recompute   as if it had been preempted: its tokens come back as a prompt of the new version's
    keep        it keeps its place and its pages, and is computed again once the new version is on the device

What the old version has computed is found by the old version's digest, what the new one computes on top of it by
nothing (Sequence.renew), so nobody else ever reads keys and values of two versions. Where such a sequence is preempted
later, the new version computes all of it, and the answer says so. One whose tokens were not all computed when it was
renewed starts over, whatever was asked for.
"""

from __future__ import annotations

from loraplex.adapters.version import AdapterVersion
from loraplex.server.engine.policy.kv_cache import KVCache
from loraplex.server.engine.policy.plan import Placement
from loraplex.server.engine.policy.prefetch import Prefetch
from loraplex.server.engine.policy.running import RunningSet
from loraplex.server.engine.policy.sequence import Sequence
from loraplex.server.engine.request import GenerationRequest


class Renewals:
    """One thread only."""

    def __init__(self, kv: KVCache, adapters: Placement, running: RunningSet, prefetch: Prefetch) -> None:
        self._kv = kv
        self._adapters = adapters
        self._running = running
        self._prefetch = prefetch
        self._bare: list[Sequence] = []  # running with their pages, and without their adapters so far

    def begin(self, seq: Sequence, request: GenerationRequest, kept: bool, now: float) -> None:
        """Have `seq` go on as `request`, whose mix has other versions.

        kept: with its pages, where all but its last token are computed.
        """
        if kept and seq in self._running and seq.is_decode:
            self._prefetch.closed(seq)
            self._running.take_off(seq, request)
            self._prefetch.ask(seq, now)
            self._prefetch.admitted(seq)
            seq.wait_for_adapters(now)
            self._bare.append(seq)
            return
        if seq in self._running:
            self._running.put_back(seq)
        self._prefetch.closed(seq)
        seq.renew(request, kept=False)
        self._prefetch.waits(seq, now)

    def look(self) -> list[tuple[Sequence, Exception]]:
        """Give bare sequences their adapters, where these have come. Returns those whose adapters cannot be had."""
        failed: list[tuple[Sequence, Exception]] = []
        bare, self._bare = self._bare, []
        for seq in bare:
            if seq not in self._running or seq.is_bound:  # it has ended, or was preempted
                continue
            try:
                pages = self._adapters.missing_pages(seq.wanted)
            except Exception as error:  # whatever it is, it is this request's own
                failed.append((seq, error))
                continue
            if pages is None:
                self._bare.append(seq)
            elif self._pin(seq, pages):
                self._running.put_on(seq)
            else:  # its own pages may be in the way
                self._running.preempt(seq)
        return failed

    def _pin(self, seq: Sequence, pages: list[int]) -> bool:
        """Put the adapters of `seq` on the device, pinned; missing_pages() has said how many pages each takes.

        False, and nothing is pinned, where there is no room for them beside those that are worn.
        """
        wanted = {version.digest: (version, count) for version, count in zip(seq.wanted, pages, strict=True)}
        pinned: list[str] = []
        for digest, (version, count) in sorted(wanted.items(), key=lambda item: item[1][1]):  # those there first
            assert digest is not None, "an adapter in host memory has no digest"
            if count and not self._load(version, count):
                for other in pinned:
                    self._adapters.unpin(other)
                return False
            self._adapters.pin(digest)
            pinned.append(digest)
        return True

    def _load(self, version: AdapterVersion, pages: int) -> bool:
        """Begin to copy an adapter, evicting what is idle."""
        if not self._kv.make_room(pages):
            return False
        while not self._adapters.load(version):
            if not self._adapters.evict_for_slot():
                return False
        return True
