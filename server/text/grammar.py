"""Structured output: which tokens a grammar allows next. llguidance does the work.

    Grammars   one per server; compiles a GrammarSpec (any thread), keeps the latest ones
    Grammar    a compiled one, shared by requests
    TokenMask  one request's place in it: takes the tokens drawn so far, gives the tokens that may follow (masks.py)

Masks cost 10 to 500 microseconds a row at 49,152 tokens, and more where a grammar is made to; without the interpreter
lock.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from loraplex.server.engine.request import Overloaded
from loraplex.server.text.grammar_spec import GrammarRefused, GrammarSpec, in_words, sources_of
from loraplex.server.text.tokenizer import Tokenizer

KEPT = 64
"""Compiled grammars kept for the next request that brings the same one; mostly compiled in about 1 ms."""

MOST_CHARS = 2 << 20
"""Of the texts of all compiled grammars, a tenant's up to half of that: in memory they are 60 to 160 times as long.
Those kept for nobody make room."""

MAX_STATES = 50_000
"""Of a grammar's lexer, about 2 kB each; llguidance's own limit of 250,000 would be half a gigabyte for one request."""

MAX_START_FUEL = 200_000
"""Of the lexer before its first token; llguidance's own limit of a million is 2 s of a core and 170 MB for the 15
characters of `(a{1000}){1000}`, with this it is 0.24 s and 12 MB."""

MAX_ITEMS = 5_000
"""Of the parser in one mask, which takes 40 ms then; up to llguidance's own limit of 50,000 it takes half a second."""

SLOW_MASK, MAX_SLOW = 0.003, 1.0
"""Seconds of a core: what a mask takes that makes states anew, and such masks of a grammar (its compiling among them)
after which the next request gets it anew."""

QUICK_START = 0.05
"""Seconds of a core that are not counted of compiling: mostly it takes 1 ms, and the first is slower."""

SLOW_CHARS = 1 << 19
"""Of a text, for the memory of a second of those: `(a{1000}){1000}` took 80 MB in one, `(a{300}){300}` 15."""

MAX_OWNERS_SLOW = 10.0
"""Seconds of the same in all grammars of a tenant that are in memory; beyond it the answer with the next one fails."""

MAX_FUEL = 100_000
"""Of the lexer in one mask, about 7 ms; llguidance's own limit is 200,000."""


class Grammar:
    """A compiled one. Thread-safe.

    Places in it share what its lexer has come to know, up to MAX_STATES: where one place fails, all may from then on.
    """

    def __init__(
        self,
        spec: GrammarSpec,
        matcher: Any,
        vocab_size: int,
        eos_ids: Sequence[int],
        owners_slow: Callable[[str], float] = lambda owner: 0.0,
    ) -> None:
        """`matcher`: an LLMatcher at its start, never moved on. Raises GrammarRefused if it allows no beginning.

        owners_slow: the seconds of slow masks in all grammars of an owner.
        """
        self.owner = spec.owner
        self.slow_seconds = 0.0
        self.is_spent = False
        self.owners_slow = owners_slow
        self.vocab_size = vocab_size
        self.eos_ids = tuple(eos_ids)
        self._chars = len(spec.text)
        self._matcher = matcher
        self.first = mask_of(matcher.deep_copy(), vocab_size)
        """The mask at its start."""

    @property
    def chars(self) -> int:
        """Weigh it, in characters of a text."""
        return self._chars + int(SLOW_CHARS * self.slow_seconds)

    def start(self, more_eos_ids: Sequence[int] = ()) -> TokenMask:
        """A place at the grammar's start, for one request, which may end with `more_eos_ids` as well."""
        return TokenMask(self, self._matcher.deep_copy(), more_eos_ids)


class TokenMask:
    """One request's place in a grammar. One thread at a time.

    Where the grammar allows nothing more, or gives up (`failure`), the end-of-sequence tokens are all that is allowed:
    the request ends by itself.
    """

    def __init__(self, grammar: Grammar, matcher: Any, more_eos_ids: Sequence[int] = ()) -> None:
        """more_eos_ids: allowed wherever the grammar's own are, which alone the matcher knows."""
        self.failure: str | None = None
        self.busy = False
        self._grammar = grammar
        self._matcher = matcher
        width = max(grammar.vocab_size, 1 + max(more_eos_ids, default=0))  # an adapter may have added its own
        self._ends = _bits((*grammar.eos_ids, *more_eos_ids), width)
        self._known_ends = _bits(grammar.eos_ids, grammar.vocab_size) if more_eos_ids else None
        self._taken = 0

    def allowed(self, output: Sequence[int]) -> NDArray[np.uint8]:
        """See Constraint; of `output` only what is new is read."""
        if self.failure is None:
            began = time.thread_time()
            try:
                return self._next(output)
            except BaseException as error:  # a panic of the Rust side is no Exception; it must cost this request only
                self._grammar.is_spent = True
                self.give_up(in_words(str(error)) or type(error).__name__)
            finally:
                if (took := time.thread_time() - began) > SLOW_MASK:
                    self._weigh(took)
        return self._ends

    def _weigh(self, seconds: float) -> None:
        """Count a slow mask: what made it slow stays in memory for as long as the grammar is there."""
        grammar = self._grammar
        grammar.slow_seconds += seconds
        grammar.is_spent = grammar.is_spent or grammar.slow_seconds > MAX_SLOW
        if grammar.owners_slow(grammar.owner) > MAX_OWNERS_SLOW:
            self.give_up(f"the slow masks of the grammars in use took more than {MAX_OWNERS_SLOW:g} s; make it simpler")

    def give_up(self, reason: str) -> None:
        """Fail for this reason, unless it has already."""
        self.failure = self.failure or reason

    def _next(self, output: Sequence[int]) -> NDArray[np.uint8]:
        if not output:
            return self._with_ends(self._grammar.first)
        fresh = list(output[self._taken :])
        self._taken += len(fresh)
        if not self._matcher.consume_tokens(fresh):
            raise GrammarRefused(in_words(self._matcher.get_error() or "") or f"it does not allow the tokens {fresh}")
        return self._with_ends(mask_of(self._matcher, self._grammar.vocab_size))

    def _with_ends(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        may_end = self._known_ends is not None and bool((mask & self._known_ends).any())
        return np.concatenate((mask | self._ends[: len(mask)], self._ends[len(mask) :])) if may_end else mask


def mask_of(matcher: Any, vocab_size: int) -> NDArray[np.uint8]:
    """What may follow, see Constraint. Raises GrammarRefused where the matcher gives up."""
    if not matcher.is_error():
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    if matcher.is_error():
        raise GrammarRefused(in_words(matcher.get_error()))
    return bits[: -(-vocab_size // 8)]


def _bits(ids: Sequence[int], vocab_size: int) -> NDArray[np.uint8]:
    chosen = np.zeros(vocab_size, np.bool_)
    chosen[list(ids)] = True
    return np.packbits(chosen, bitorder="little")


class Grammars:
    """Compiles the grammars of one base. Thread-safe; compiling lets other threads run."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """`vocab_size`: of the model's logits. `eos_ids` end a sentence of any grammar."""
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="compile")  # however many ask at once
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of each owner
        self._tokenizer: Any = None
        self._kept: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._alive: WeakSet[Grammar] = WeakSet()  # these, and those of answers under way

    async def get(self, spec: GrammarSpec) -> Grammar:
        """compile(), in a thread unless it returns at once; an owner's one after the other. Raises GrammarRefused."""
        if (found := self._find(spec)) is not None:
            return found
        async with self._turns.setdefault(spec.owner, asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(self._threads, self.compile, spec)

    def load(self) -> None:
        """Read the vocabulary, once, as llguidance wants it: 0.8 s for 49,152 tokens with the interpreter lock held.

        To be called before anybody is served. Raises GrammarRefused.
        """
        with self._lock:
            self._load()

    def _find(self, spec: GrammarSpec) -> Grammar | None:
        with self._lock:
            found = self._kept.get(spec)
            if found is None or found.is_spent:
                return None
            self._kept.move_to_end(spec)
            return found

    def compile(self, spec: GrammarSpec) -> Grammar:
        """`spec` compiled: mostly in about 1 ms, in half a second where it is as large as the limits allow.

        Raises GrammarRefused, and Overloaded where those in use leave no room.
        """
        if (found := self._find(spec)) is not None:
            return found
        with self._lock:
            tokenizer = self._load()
            for kept in [kept for kept, grammar in self._kept.items() if grammar.is_spent]:
                del self._kept[kept]  # nobody is given it again, and it may be 100 MB
            self._make_room(spec)
        import llguidance

        began = time.thread_time()
        limits = llguidance.LLParserLimits(
            max_lexer_states=MAX_STATES,
            initial_lexer_fuel=MAX_START_FUEL,
            step_max_items=MAX_ITEMS,
            step_lexer_fuel=MAX_FUEL,
            verbose_errors=False,
        )
        refusal: GrammarRefused | None = None
        for source in sources_of(spec):
            try:
                matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
                grammar = Grammar(spec, matcher, self._vocab_size, self._eos_ids, self._slow_seconds)
                break
            except GrammarRefused as error:
                refusal = error
        else:
            raise refusal or GrammarRefused("it has no rules")
        grammar.slow_seconds = max(0.0, time.thread_time() - began - QUICK_START)
        with self._lock:
            self._alive.add(grammar)
            self._kept[spec] = grammar
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _slow_seconds(self, owner: str) -> float:
        with self._lock:
            return sum(grammar.slow_seconds for grammar in self._alive if grammar.owner == owner)

    def _make_room(self, spec: GrammarSpec) -> None:
        """For one more, first of what is kept for the same owner (lock held). Raises Overloaded."""
        while True:
            alive = [(grammar.chars, grammar.owner == spec.owner) for grammar in self._alive]
            own_left = MOST_CHARS // 2 - len(spec.text) - sum(chars for chars, is_own in alive if is_own)
            left = MOST_CHARS - len(spec.text) - sum(chars for chars, _ in alive)
            if min(own_left, left) >= 0:
                return
            oldest = sorted(self._kept, key=lambda kept: kept.owner != spec.owner)[:1]
            if not oldest or (own_left < 0 and oldest[0].owner != spec.owner):
                raise Overloaded("the grammars of answers under way leave no room for one more; ask again", 1.0)
            del self._kept[oldest[0]]

    def _load(self) -> Any:
        """The vocabulary as llguidance wants it (lock held)."""
        if self._tokenizer is None:
            if not self._eos_ids:
                raise GrammarRefused("this base has no end-of-sequence token, without which no grammar can end")
            import llguidance

            try:
                self._tokenizer = llguidance.LLTokenizer(
                    self._source.to_json(), n_vocab=self._vocab_size, eos_token=list(self._eos_ids)
                )
            except Exception as error:  # it raises whatever its Rust side does
                raise GrammarRefused(f"this base's tokenizer does not allow it: {in_words(str(error))}") from error
        return self._tokenizer
