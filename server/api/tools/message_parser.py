"""What a chat model wrote, taken apart as it comes: thoughts, text, tool calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from loraplex.server.api.tools.call_objects import CallArguments, CallStart, Text, held_back
from loraplex.server.api.tools.call_parsers import CallParser
from loraplex.server.text.grammar_spec import Thought

OPENING, CLOSING = "<think>", "</think>"


@dataclass(frozen=True)
class Thinking:
    """Of what the model thinks aloud before it answers."""

    text: str


Part = Thinking | Text | CallStart | CallArguments


class MessageParser:
    """Of one answer: `feed` every piece of text, then `end`; neighbouring parts of one kind belong together."""

    def __init__(self, thought: Thought, calls: CallParser | None) -> None:
        self._state: Thought = thought  # "possible" becomes "open" or "none", "open" becomes "none"
        self._calls = calls
        self._held = ""
        self._begun = False  # has thought something: the lines before are dropped
        self._thought = False  # has thought, and not answered yet: the lines between are dropped

    @property
    def is_plain(self) -> bool:
        """Whether all that comes from here on is text, as it comes."""
        return self._state == "none" and not self._thought and self._calls is None

    def feed(self, text: str) -> list[Part]:
        """What `text` adds, as far as it is certain."""
        if self._state == "none" and not self._thought:
            return self._answer(text)
        parts: list[Part] = []
        self._held += text
        if self._state == "possible" and not self._begin():
            return parts
        if self._state == "open":
            parts += self._think()
        if self._state == "none":
            text, self._held = self._held, ""
            text = text.lstrip("\n") if self._thought else text
            self._thought = self._thought and not text
            parts += self._answer(text)
        return parts

    def end(self) -> list[Part]:
        """What was held back."""
        held, self._held = self._held, ""
        if self._state == "open":
            return [Thinking(held)] if held else []
        calls = self._calls.end() if self._calls is not None else []
        return [*self._answer(held), *calls]

    def _begin(self) -> bool:
        """Whether it is known by now if there is a thought."""
        start = self._held.lstrip()
        if start.startswith(OPENING):
            self._held, self._state = start.removeprefix(OPENING), "open"
            return True
        if held_back(start, OPENING) == len(start):
            return False
        self._state = "none"
        return True

    def _think(self) -> list[Part]:
        if not self._begun:
            self._held = self._held.lstrip("\n")
            self._begun = bool(self._held)
        at = self._held.find(CLOSING)
        if at >= 0:
            text, self._held = self._held[:at].rstrip("\n"), self._held[at + len(CLOSING) :]
            self._state, self._thought = "none", True
        else:
            sure = len(self._held) - held_back(self._held, CLOSING)
            sure = len(self._held[:sure].rstrip("\n"))
            text, self._held = self._held[:sure], self._held[sure:]
        return [Thinking(text)] if text else []

    def _answer(self, text: str) -> list[Part]:
        if self._calls is not None:
            return [*self._calls.feed(text)] if text else []
        return [Text(text)] if text else []


@dataclass
class WholeCall:
    """A tool call as far as it has come."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class WholeMessage:
    """The parts of one answer put together."""

    new_id: Callable[[], str]  # for calls
    text: str = ""
    thought: str = ""
    calls: list[WholeCall] = field(default_factory=list)

    def add(self, parts: Iterable[Part]) -> None:
        for part in parts:
            match part:
                case Text(text):
                    self.text += text
                case Thinking(text):
                    self.thought += text
                case CallStart(name):
                    self.calls.append(WholeCall(self.new_id(), name))
                case CallArguments(text):
                    self.calls[-1].arguments += text


def joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one kind made one; a call's start and its first arguments stay two."""
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        if not isinstance(part, CallStart) and last is not None and type(last) is type(part):
            result[-1] = type(part)(last.text + part.text)
        else:
            result.append(part)
    return result
