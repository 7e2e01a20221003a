"""Make receipts in the background, one at a time, each once for its content.

A load is not held up: the files are read again afterwards, by a thread that rests nine tenths of its time, and the
probe waits in the engine's queue behind everybody. Whoever wants the receipt asks again, or waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.throttle import Throttle
from loraplex.adapters.tiers.loader import Loader, Priority
from loraplex.adapters.version import AdapterVersion
from loraplex.server.engine.request import EngineError
from loraplex.server.proof.prober import FusedAnswers, ProbeFailed, Prober
from loraplex.server.proof.receipt import BaseIdentity, Receipt

logger = logging.getLogger(__name__)

MAX_RECEIPTS = 4096
"""Some 2 KB each."""

MAX_OFFERED = 4
"""Receipts under way beyond which those of further loads are not begun by themselves."""

REST = 9.0
"""Seconds of sleep for each second of work: a tenth of a core, in pieces of a millisecond. At a fifth, the median time
between tokens of 8 streams was 1.7 times as long while a receipt was made, on two cores that others wanted as well."""


class Examine(Protocol):
    """Examiner, or whatever reads and measures."""

    def __call__(
        self, version: AdapterVersion, fused: FusedAnswers | None, error: str | None, throttle: Callable[[], None]
    ) -> Receipt: ...

    def identify(self, throttle: Callable[[], None]) -> BaseIdentity: ...


class NoReceipt(Exception):
    """There is no receipt of a version; the message says why."""


class Prover:
    """Receipts by digest. On the event loop's thread only; its own thread does the work."""

    def __init__(
        self,
        prober: Prober,
        loader: Loader,
        examine: Examine,
        rest: float = REST,
        on_made: Callable[[AdapterVersion, Receipt], None] = lambda version, receipt: None,
    ) -> None:
        """examine: called in the thread. rest: see Throttle. on_made: called with each new receipt."""
        self._prober = prober
        self._loader = loader
        self._examine = examine
        self._rest = rest
        self.on_made = on_made
        self._made: OrderedDict[str, Receipt] = OrderedDict()
        self._failed: OrderedDict[int, str] = OrderedDict()  # by the version's uid
        self._under_way: dict[int, asyncio.Task[Receipt]] = {}  # by the version's uid
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="receipts")
        self._is_closed = False
        self._base: BaseIdentity | None = None  # once the thread knows
        self._recall: Callable[[AdapterVersion], str] = lambda version: ""
        self._unfit: set[str] = set()  # digests whose kept receipts are of another base, or another server's

    def remember(self, recall: Callable[[AdapterVersion], str]) -> None:
        """Take receipts of this base that were made earlier. recall: finds Receipt.text of a version, or "".

        Which base this is is found out in the background, from now on.
        """
        self._recall = recall
        self._thread.submit(self._identify)

    def known(self, version: AdapterVersion) -> Receipt | None:
        """Return the receipt of what `version` stands for, if it is made."""
        if version.digest is None:
            return None
        found = self._made.get(version.digest)
        if found is None and self._base is not None and version.digest not in self._unfit:
            text = self._recall(version)
            found = Receipt.read(text, self._base) if text else None
            if found is not None and found.measured.digest == version.digest:
                self._keep(found)
            elif text:
                self._unfit.add(version.digest)
        return found

    def failure(self, version: AdapterVersion) -> str | None:
        """Return why the last try came to nothing."""
        return self._failed.get(version.uid)

    def is_under_way(self, version: AdapterVersion) -> bool:
        """Return whether the receipt is being made, or waits for its turn."""
        return version.uid in self._under_way

    def begin(self, version: AdapterVersion) -> asyncio.Task[Receipt]:
        """Make the receipt of `version` unless it is made or under way, and again where its probe had failed."""
        task = self._under_way.get(version.uid)
        if task is None:
            task = self._under_way[version.uid] = asyncio.create_task(self._receipt(version))
            task.add_done_callback(lambda done: self._end(version, done))
        return task

    def offer(self, version: AdapterVersion) -> None:
        """Begin the receipt of a version that was loaded, unless there are many under way: it is asked for then."""
        if len(self._under_way) < MAX_OFFERED and self.known(version) is None:
            self.begin(version)

    async def wait(self, version: AdapterVersion, seconds: float) -> Receipt | None:
        """Wait for the receipt, so long at most; None: it is not there yet, or cannot be (see failure())."""
        done, _ = await asyncio.wait([self.begin(version)], timeout=seconds)
        return self.known(version) if done else None

    def close(self) -> None:
        """Give up what is under way; from any thread."""
        self._is_closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _receipt(self, version: AdapterVersion) -> Receipt:
        async with self._turn:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._identify)
            known = self.known(version)
            if known is not None and known.probe is not None:
                return known
            began = time.monotonic()
            if version.digest is None:
                await asyncio.wrap_future(self._loader.ensure(version, Priority.BULK))
            fused, error = await self._ask(version)
            made = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._examine, version, fused, error, Throttle(self._check_open, self._rest)
            )
            made = replace(made, seconds=time.monotonic() - began)
            self._keep(made)
            self.on_made(version, made)
            return made

    def _keep(self, receipt: Receipt) -> None:
        self._made[receipt.measured.digest] = receipt
        if len(self._made) > MAX_RECEIPTS:
            self._made.popitem(last=False)

    def _identify(self) -> None:
        """Find out which base this is, once; in the thread."""
        if self._base is None:
            self._base = self._examine.identify(Throttle(self._check_open, self._rest))

    async def _ask(self, version: AdapterVersion) -> tuple[FusedAnswers | None, str | None]:
        """Have the engine answer; where it does not, the receipt has no probe and says why."""
        try:
            return await self._prober.ask(version), None
        except (ProbeFailed, EngineError, AdapterError) as error:
            return None, str(error)

    def _check_open(self) -> None:
        if self._is_closed:
            raise NoReceipt("the server is shutting down")

    def _end(self, version: AdapterVersion, done: asyncio.Task[Receipt]) -> None:
        self._under_way.pop(version.uid, None)
        self._failed.pop(version.uid, None)
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            return
        if not isinstance(error, AdapterError | NoReceipt):
            logger.error("the receipt of adapter %r cannot be made", version.name, exc_info=error)
        self._failed[version.uid] = str(error) or type(error).__name__
        if len(self._failed) > MAX_RECEIPTS:
            self._failed.popitem(last=False)
