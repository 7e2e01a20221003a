"""Tool calls out of a text that comes in pieces, one parser a model family; pieces may be cut anywhere.

A parser passes on what it is sure of: text that is no call, the name of a call, and its arguments as they come. What
looked like a call and is none comes out as text after all.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from loraplex.server.api.tools.call_objects import (
    CallArguments,
    CallObjects,
    CallStart,
    Nesting,
    Piece,
    Text,
    held_back,
)


class CallParser(Protocol):
    """`feed` every piece of text, then `end`."""

    def feed(self, text: str) -> list[Piece]: ...

    def end(self) -> list[Piece]: ...


class TaggedCalls:
    """Calls between tags in the middle of text: Hermes' and Qwen's <tool_call>{...}</tool_call>.

    Without a closing tag (Mistral's [TOOL_CALLS]) everything after the first call belongs to calls.
    """

    def __init__(self, opening: str, closing: str = "") -> None:
        self._opening = opening
        self._closing = closing
        self._held = ""
        self._calls: CallObjects | None = None
        self._any = False  # calls so far
        self._quiet = True  # nothing but calls since the last call

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        self._held += text
        while self._held:
            before = len(self._held), self._calls is None
            pieces += self._read_text() if self._calls is None else self._read_calls(self._calls)
            if before == (len(self._held), self._calls is None):
                break
        return pieces

    def end(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._calls is not None:
            pieces += self._calls.end()
            self._any |= bool(self._calls.calls)
        elif not self._any or self._held.strip():
            pieces += self._say(self._held)
        self._held = ""
        return pieces

    def _read_text(self) -> list[Piece]:
        at = self._held.find(self._opening)
        if at >= 0:
            text, self._held = self._held[:at].rstrip(), self._held[at + len(self._opening) :]
            self._calls = CallObjects()
            return self._say(text)
        sure = len(self._held) - held_back(self._held, self._opening)
        sure = len(self._held[:sure].rstrip())  # space before a call is dropped
        text, self._held = self._held[:sure], self._held[sure:]
        return self._say(text)

    def _read_calls(self, calls: CallObjects) -> list[Piece]:
        pieces: list[Piece] = []
        if calls.rest is None:
            pieces = calls.feed(self._held)
            self._held = calls.rest or ""
        if calls.rest is not None and held_back(self._held, self._closing) != len(self._held):
            self._held = self._held.removeprefix(self._closing) if self._closing else self._held
            self._any |= bool(calls.calls)
            self._quiet = True
            self._calls = None
        return pieces

    def _say(self, text: str) -> list[Piece]:
        if self._any and self._quiet:
            text = text.lstrip()
        if not text:
            return []
        self._quiet = False
        return [Text(text)]


class WholeCalls:
    """An answer that is calls from its first character on, or is none: Llama 3's {"name": ..., "parameters": ...}."""

    def __init__(self, opening: str = "") -> None:
        self._opening = opening  # may stand before them
        self._held = ""
        self._calls: CallObjects | None = None
        self._plain = False

    def feed(self, text: str) -> list[Piece]:
        if self._plain:
            return [Text(text)] if text else []
        if self._calls is not None:
            return self._more(text)
        self._held += text
        start = self._held.lstrip()
        if not start or (self._opening and held_back(start, self._opening) == len(start)):
            return []
        start = start.removeprefix(self._opening).lstrip() if self._opening else start
        if not start:
            return []
        if start[0] != "{":
            self._plain = True
            held, self._held = self._held, ""
            return [Text(held)]
        self._calls, self._held = CallObjects(";, \t\r\n"), ""
        return self._more(start)

    def end(self) -> list[Piece]:
        if self._calls is not None:
            return self._calls.end()
        return [Text(self._held)] if self._held and not self._plain else []

    def _more(self, text: str) -> list[Piece]:
        assert self._calls is not None
        if self._calls.rest is not None:
            return [Text(text)] if text else []
        pieces = self._calls.feed(text)
        return [*pieces, Text(self._calls.rest)] if self._calls.rest else pieces


class PythonicCalls:
    """An answer that is a Python list of calls, [f(a=1), g(b="x")], or Llama's JSON; read when it is complete."""

    def __init__(self) -> None:
        self._held = ""
        self._plain = False

    def feed(self, text: str) -> list[Piece]:
        if self._plain:
            return [Text(text)] if text else []
        self._held += text
        start = self._held.lstrip()
        if start and start[0] not in "[{":
            self._plain = True
            held, self._held = self._held, ""
            return [Text(held)]
        return []

    def end(self) -> list[Piece]:
        if not self._held:
            return []
        text = self._held.strip()
        if text.startswith("{"):
            objects = WholeCalls()
            return [*objects.feed(text), *objects.end()]
        try:
            calls = list(_python_calls(text))
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return [Text(self._held)]
        return [piece for name, arguments in calls for piece in (CallStart(name), CallArguments(arguments))]


def _python_calls(text: str) -> Iterator[tuple[str, str]]:
    """Names and arguments as JSON. Raises SyntaxError, ValueError: it is no list of calls with literal arguments."""
    tree = ast.parse(text, mode="eval").body
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError("no list")
    for call in tree.elts:
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("no call with named arguments")
        arguments: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise ValueError("**")
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        yield ast.unparse(call.func), json.dumps(arguments, ensure_ascii=False)


class NamedCalls:
    """Mistral's newer form: [TOOL_CALLS]name[ARGS]{...}, once for every call; the older list of objects as well."""

    OPENING, BETWEEN = "[TOOL_CALLS]", "[ARGS]"

    def __init__(self) -> None:
        self._held = ""
        self._in_calls = False
        self._older: TaggedCalls | None = None
        self._depth = Nesting()
        self._in_arguments = False

    def feed(self, text: str) -> list[Piece]:
        if self._older is not None:
            return self._older.feed(text)
        self._held += text
        pieces: list[Piece] = []
        while self._held and (found := self._step()) is not None:
            pieces += found
        return pieces

    def end(self) -> list[Piece]:
        if self._older is not None:
            return self._older.end()
        held, self._held = self._held, ""
        return [Text(held)] if held and not self._in_calls else []

    def _step(self) -> Sequence[Piece] | None:
        """One step on; None: more text is needed."""
        if self._in_arguments:
            size = self._depth.feed(self._held)
            text, self._held = self._held[:size], self._held[size:]
            self._in_arguments = not self._depth.closed
            return [CallArguments(text)] if text else []
        if not self._in_calls:
            return self._find_calls()
        start = self._held.lstrip()
        if held_back(start, self.OPENING) == len(start):
            return None
        start = start.removeprefix(self.OPENING).lstrip()
        if start.startswith(("[", "{")):
            self._older, self._held = TaggedCalls(self.OPENING), ""
            return self._older.feed(self.OPENING + start)
        at = start.find("{")
        if at < 0:
            return None
        name = start[:at].removesuffix(self.BETWEEN).strip()
        self._held, self._in_arguments, self._depth = start[at:], True, Nesting()
        return [CallStart(name)]

    def _find_calls(self) -> Sequence[Piece] | None:
        at = self._held.find(self.OPENING)
        if at >= 0:
            text, self._held, self._in_calls = self._held[:at].rstrip(), self._held[at:], True
            return [Text(text)] if text else []
        sure = len(self._held) - held_back(self._held, self.OPENING)
        sure = len(self._held[:sure].rstrip())
        text, self._held = self._held[:sure], self._held[sure:]
        return [Text(text)] if text else None
