"""Structured output: which tokens a grammar allows next. llguidance does the work; free of torch.

    Grammars   one per server; compiles a GrammarSpec (any thread), keeps the latest ones
    Grammar    a compiled one, shared by requests
    TokenMask  one request's place in it: takes the tokens drawn so far, gives the tokens that may follow
    MaskPool   threads that compute the masks of a step while its forward pass runs

Masks cost 10 to 500 microseconds a row at 49,152 tokens, without the interpreter lock.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loraplex.server.engine.request import Constraint
from loraplex.server.engine.schema_ends import close_objects, end_numbers, is_endless, real_dates
from loraplex.server.engine.tokenizer import Tokenizer

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line, as json.dumps writes it: small models like to fill the rest of their answer with white space."""

KEPT = 64
"""Compiled grammars kept for the next request that brings the same one; kilobytes each, compiled in about 1 ms."""

MAX_STATES = 50_000
"""Of a grammar's lexer, about 2 kB each; llguidance's own limit of 250,000 would be half a gigabyte for one request."""


Thought = Literal["none", "open", "possible"]
"""Whether an answer begins with thinking aloud, which no grammar binds: never; it is in the middle of it, since the
prompt ended with <think>; it may, with a <think> of its own."""

_THOUGHT = "thought: aloud /\\s{0,4}/\naloud[lazy]: /(?s:.*)<\\/think>/"
_BEFORE = {
    "none": ("", ""),
    "open": ("thought ", _THOUGHT),
    "possible": ("(opening thought)? ", f"opening: /\\s{{0,4}}<think>/\n{_THOUGHT}"),
}
"""What stands before the answer in the start rule, and the rules it needs."""


_INLINED = re.compile(r"^(\s*)\?(?=[a-z_][a-z0-9_]*\s*:)", re.MULTILINE)
"""Lark's mark of rules that leave no node in its tree: here there is none."""


class GrammarRefused(ValueError):
    """The grammar cannot be compiled, or not within its limits; the message says why."""


@dataclass(frozen=True)
class GrammarSpec:
    """What the output must be."""

    kind: Literal["json_schema", "regex", "lark", "choice"]
    text: str  # a JSON schema, a regular expression, Lark (or GBNF) rules, or a JSON list of strings
    whitespace: str | None = None  # json_schema: an expression of what may stand between parts; None: COMPACT
    lenient: bool = False  # json_schema: leave out what cannot be enforced, where it would be refused
    thought: Thought = "none"  # what may come before
    alternative: str = ""  # Lark rules of another answer that is as good


class Grammar:
    """A compiled grammar. Thread-safe."""

    def __init__(self, matcher: Any, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """`matcher`: an LLMatcher at its start, never moved on."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)

    def start(self, more_eos_ids: Sequence[int] = ()) -> TokenMask:
        """A place at the grammar's start, for one request, which may end with `more_eos_ids` as well."""
        return TokenMask(self._matcher.deep_copy(), self._vocab_size, self._eos_ids, more_eos_ids)


class TokenMask:
    """One request's place in a grammar. One thread at a time.

    Where the grammar allows nothing more, or gives up (`failure`), the end-of-sequence tokens are all that is allowed:
    the request ends by itself.
    """

    def __init__(self, matcher: Any, vocab_size: int, eos_ids: Sequence[int], more_eos_ids: Sequence[int] = ()) -> None:
        """more_eos_ids: allowed wherever `eos_ids` are, which alone the matcher knows."""
        self.failure: str | None = None
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends = self._bits((*eos_ids, *more_eos_ids))
        self._known_ends = self._bits(eos_ids) if more_eos_ids else None
        self._taken = 0

    def allowed(self, output: Sequence[int]) -> NDArray[np.uint8]:
        """See Constraint; of `output` only what is new is read."""
        if self.failure is None:
            try:
                return self._next(output)
            except BaseException as error:  # a panic of the Rust side is no Exception; it must cost this request only
                self.failure = _one_line(str(error)) or type(error).__name__
        return self._ends

    def _next(self, output: Sequence[int]) -> NDArray[np.uint8]:
        fresh = list(output[self._taken :])
        self._taken += len(fresh)
        if not self._matcher.consume_tokens(fresh):
            raise RuntimeError(self._matcher.get_error() or f"it does not allow the tokens {fresh}")
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise RuntimeError(self._matcher.get_error())
        bits = bits[: -(-self._vocab_size // 8)]
        may_end = self._known_ends is not None and bool((bits & self._known_ends).any())
        return bits | self._ends if may_end else bits

    def _bits(self, ids: Sequence[int]) -> NDArray[np.uint8]:
        chosen = np.zeros(self._vocab_size, np.bool_)
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
        self._tokenizer: Any = None
        self._kept: OrderedDict[GrammarSpec, Grammar] = OrderedDict()

    async def get(self, spec: GrammarSpec) -> Grammar:
        """compile(), in a thread unless it returns at once. Raises GrammarRefused."""
        if spec in self._kept:
            return self.compile(spec)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.compile, spec)

    def compile(self, spec: GrammarSpec) -> Grammar:
        """`spec` compiled: mostly in about 1 ms, in a second where it is as large as the limits allow.

        Raises GrammarRefused.
        """
        with self._lock:
            if (found := self._kept.get(spec)) is not None:
                self._kept.move_to_end(spec)
                return found
            tokenizer = self._load()
        import llguidance

        limits = llguidance.LLParserLimits(max_lexer_states=MAX_STATES, verbose_errors=False)
        for source in _sources(spec):
            matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
            if not matcher.is_error():
                break
        else:
            raise GrammarRefused(_one_line(matcher.get_error()))
        grammar = Grammar(matcher, self._vocab_size, self._eos_ids)
        with self._lock:
            self._kept[spec] = grammar
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _load(self) -> Any:
        """The vocabulary as llguidance wants it: half a second for 49,152 tokens, once (lock held)."""
        if self._tokenizer is None:
            if not self._eos_ids:
                raise GrammarRefused("this base has no end-of-sequence token, without which no grammar can end")
            import llguidance

            try:
                self._tokenizer = llguidance.LLTokenizer(
                    self._source.to_json(), n_vocab=self._vocab_size, eos_token=list(self._eos_ids)
                )
            except Exception as error:  # it raises whatever its Rust side does
                raise GrammarRefused(f"this base's tokenizer does not allow it: {_one_line(str(error))}") from error
        return self._tokenizer


class MaskPool:
    """Threads that compute masks beside the engine's. One for four cores: they share the cores with the model."""

    def __init__(self) -> None:
        self._workers = min(8, max(1, (os.cpu_count() or 1) // 4))
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="grammar")  # starts a thread for work only

    def begin(
        self, rows: Sequence[tuple[Constraint | None, Sequence[int]]]
    ) -> list[Callable[[], NDArray[np.uint8]] | None]:
        """Start on the mask of each (constraint, its request's output); what is returned waits for it.

        None where there is no constraint. The outputs stay as they are until then. A thread takes all of its rows at
        once: woken for each of 16, it would take the interpreter from the engine's thread just when a step begins.
        """
        held = [(i, constraint, output) for i, (constraint, output) in enumerate(rows) if constraint is not None]
        found: list[Callable[[], NDArray[np.uint8]] | None] = [None] * len(rows)
        for share in (held[worker :: self._workers] for worker in range(min(self._workers, len(held)))):
            masks = self._pool.submit(_masks, [(constraint, output) for _, constraint, output in share])
            for place, (i, _, _) in enumerate(share):
                found[i] = partial(_wait_for, masks, place)
        return found


def _masks(rows: Sequence[tuple[Constraint, Sequence[int]]]) -> list[NDArray[np.uint8]]:
    return [constraint.allowed(output) for constraint, output in rows]


def _wait_for(masks: Future[list[NDArray[np.uint8]]], place: int) -> NDArray[np.uint8]:
    return masks.result()[place]


def _sources(spec: GrammarSpec) -> list[str]:
    """`spec` in llguidance's own form: the first that compiles is taken. Raises GrammarRefused."""
    try:
        answers = _answers(spec)
    except Exception as error:  # the converter of GBNF raises its own kinds
        raise GrammarRefused(_one_line(str(error))) from error
    return [_around(answer, spec) for answer in answers]


def _around(answer: dict[str, Any], spec: GrammarSpec) -> str:
    """An answer's grammar with what may stand before or instead of it."""
    before, rules = _BEFORE[spec.thought]
    start = f"start: {before}(@answer | @alternative)" if spec.alternative else f"start: {before}@answer"
    grammars = [{"name": "start", "lark_grammar": f"{start}\n{rules}"}, {"name": "answer", **answer}]
    if spec.alternative:
        grammars.append({"name": "alternative", "lark_grammar": spec.alternative})
    return json.dumps({"grammars": grammars})


def _answers(spec: GrammarSpec) -> list[dict[str, Any]]:
    """Of llguidance's grammars one, and another that is to be taken where it cannot be compiled."""
    from llguidance import regex_to_lark
    from llguidance.gbnf_to_lark import any_to_lark

    match spec.kind:
        case "json_schema":
            schema = json.loads(spec.text)
            if isinstance(schema, bool):
                schema = {} if schema else {"not": {}}
            between = COMPACT if spec.whitespace is None else {"whitespace_pattern": spec.whitespace}
            options = {**between, "lenient": spec.lenient}
            if is_endless(schema):
                raise GrammarRefused(
                    "no text can hold to it: the schema refers to itself, and what it needs has no end"
                )
            closed = real_dates(close_objects(schema))
            ended = end_numbers(closed)
            schemas = [closed] if ended == closed else [ended, closed]
            return [{"json_schema": {**each, "x-guidance": options}} for each in schemas]
        case "regex":
            return [{"lark_grammar": f"start: /{regex_to_lark(spec.text, '')}/"}]
        case "choice":
            choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(spec.text))
            return [{"lark_grammar": "start: " + " | ".join(choices)}]
        case "lark":
            text = spec.text if "::=" not in spec.text else any_to_lark(spec.text)  # GBNF defines by it, Lark by ":"
            return [{"lark_grammar": _INLINED.sub(r"\1", text)}]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
