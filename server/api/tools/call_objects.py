"""The JSON of tool calls, read as it comes: one object a call, one after another."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Of the answer itself."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins; its arguments follow, until the next one begins."""

    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the arguments' JSON."""

    text: str


Piece = Text | CallStart | CallArguments


def held_back(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag` and not all of it."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0


NAME_KEYS = ("name", "function")
ARGUMENT_KEYS = ("arguments", "parameters")


class CallObject:
    """One call as a JSON object, character by character: its name, and the raw text of its arguments.

    `done` once its closing brace was read.
    """

    def __init__(self) -> None:
        self.raw = ""
        self.done = False
        self.started = False  # the call's beginning was passed on
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._string = ""  # the string being read at depth 1, quotes included
        self._key: str | None = None  # whose value is being read
        self._value = ""
        self._sent = 0  # characters of the arguments passed on
        self._name: str | None = None
        self._arguments: str | None = None

    def feed(self, text: str) -> tuple[list[Piece], str]:
        """What is sure now, and what of `text` stands behind the object."""
        for i, char in enumerate(text):
            self.raw += char
            self._take(char)
            if self.done:
                return self._sure(), text[i + 1 :]
        return self._sure(), ""

    def _take(self, char: str) -> None:
        if self._in_string:
            self._take_in_string(char)
            return
        if char in "]}" and self._depth == 1:
            self._end_value()
            self.done = True
            return
        if self._depth == 1 and char == "," and self._key is not None:
            self._end_value()
            return
        if self._depth == 1 and self._key is None:
            if char == ":":
                self._key, self._string = _unquoted(self._string), ""
                return
            if char == '"':
                self._in_string, self._string = True, char
            return
        if self._depth:
            if self._value or not char.isspace():
                self._value += char
            self._in_string = char == '"'
        self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(char, 0)

    def _take_in_string(self, char: str) -> None:
        if self._depth == 1 and self._key is None:
            self._string += char
        else:
            self._value += char
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False

    def _end_value(self) -> None:
        value = self._value.rstrip()
        if self._key in NAME_KEYS and self._name is None:
            name = _unquoted(value)
            self._name = name or None
        elif self._key in ARGUMENT_KEYS and self._arguments is None:
            self._arguments = _as_object(value)
        self._key, self._value = None, ""

    def _sure(self) -> list[Piece]:
        if self._name is None:
            return []
        pieces: list[Piece] = []
        if self._arguments is not None:
            known = self._arguments
        elif self._key in ARGUMENT_KEYS and self._value.startswith("{"):
            known = self._value.rstrip()  # space behind the last brace is none of it
        else:
            known = ""
        if not self.started and (known or self.done):
            self.started = True
            pieces.append(CallStart(self._name))
        if self.done and self._arguments is None:
            known = self._arguments = "{}"
        if len(known) > self._sent:
            pieces.append(CallArguments(known[self._sent :]))
            self._sent = len(known)
        return pieces


def _unquoted(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def _as_object(text: str) -> str:
    """Arguments as the text of an object: some models write them as a string that holds it, or null for none."""
    if text.startswith('"'):
        return _unquoted(text) or "{}"
    return text if text.startswith("{") else "{}"


class CallObjects:
    """Call objects one after another, in a list or not; `rest` is what follows them, once something else does."""

    def __init__(self, separators: str = ",;[] \t\r\n") -> None:
        self.rest: str | None = None
        self.calls = 0
        self._separators = separators
        self._object: CallObject | None = None

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text and self.rest is None:
            if self._object is None:
                stripped = text.lstrip(self._separators)
                if stripped and stripped[0] != "{":
                    self.rest = stripped
                    break
                text = stripped
                if text:
                    self._object = CallObject()
                continue
            found, text = self._object.feed(text)
            pieces += found
            if self._object.done:
                pieces += self._close(self._object)
                self._object = None
        return pieces

    def end(self) -> list[Piece]:
        """An object that never ended: what was passed on as a call stays one."""
        last, self._object = self._object, None
        return [Text(last.raw)] if last is not None and not last.started and last.raw else []

    def _close(self, call: CallObject) -> list[Piece]:
        if call.started:
            self.calls += 1
            return []
        return [Text(call.raw)]


class Nesting:
    """Finds the end of a JSON object in pieces of text."""

    def __init__(self) -> None:
        self.closed = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """Characters of `text` that belong to the object."""
        for i, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            else:
                self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(char, 0)
                if self._depth == 0 and char in "]}":
                    self.closed = True
                    return i + 1
        return len(text)
