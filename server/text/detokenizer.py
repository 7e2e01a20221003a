"""Tokens of one request to text, piece by piece: characters stay whole and stop strings never show.

A piece is released as soon as nothing that follows can change it. Two things can: a character whose last byte has not
come yet (the decoder shows it as U+FFFD at the end), and a text that may turn out to be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

UNFINISHED = "\ufffd"

PROMPT_TOKENS = 6
"""Last tokens of the prompt decoded in front: whether a word gets its space depends on what stands before it."""

MAX_UNFINISHED = 32
"""Tokens without a whole character after which they are shown as they are. A character has at most 4 bytes, so these
are no text; without a bound each further one would cost a decode of all before it."""


class TokenDecoder(Protocol):
    """Decode tokens: what is asked of a tokenizer here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def lone_text(self, token_id: int) -> str | None:
        """Return what a token adds to a text wherever it stands; None: it has to be decoded with those before it."""
        ...


class Detokenizer:
    """Write one request's text: `push` every token, then `finish`; the texts returned, joined, are the answer.

    `decoded` counts the characters decoded so far and `released` those given out; the difference is held back.
    """

    def __init__(
        self,
        decoder: TokenDecoder,
        prompt_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        stop_tokens: Mapping[int, str] | None = None,
    ) -> None:
        """Stop strings (none empty) count from token `min_tokens` + 1 on; `include_stop` leaves the found one in.

        stop_tokens: those of them that are a single token which may not show in the text, by its id.
        """
        self._decoder = decoder
        self._skip_special = skip_special_tokens
        self._stop = tuple(stop)
        self._stop_tokens = stop_tokens or {}
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._tokens = 0
        self._held = ""  # decoded, not released: the beginning of a stop string, perhaps
        self.decoded = 0
        self.released = 0
        self.stopped_by: str | None = None
        # [0, _read) of _ids is decoded and only gives context; [_read, end) is not decoded yet
        self._ids: list[int] = list(prompt_ids[-PROMPT_TOKENS:])
        self._read = len(self._ids)
        self._prefix = self._decode(self._ids)
        if self._prefix.endswith(UNFINISHED):  # a prompt of token ids may end anywhere
            self._ids, self._read, self._prefix = [], 0, ""

    @property
    def has_stops(self) -> bool:
        """Tell whether a stop string may end the text."""
        return bool(self._stop)

    def push(self, token_id: int) -> str:
        """Take one token; returns the text that is now certain. After a stop string (`stopped_by`) there is no more."""
        if self.stopped_by is not None:
            return ""
        self._tokens += 1
        if token_id in self._stop_tokens and self._tokens > self._min_tokens:
            last = self.finish()  # which may find another stop string in what was held back
            if self.stopped_by is None:
                self.stopped_by = self._stop_tokens[token_id]
                last += self._stop_tokens[token_id] if self._include_stop else ""
            return last
        if self._read == len(self._ids) and (text := self._decoder.lone_text(token_id)):  # nearly always
            self._ids, self._read, self._prefix = [token_id], 1, text
            return self._release(text)
        self._ids.append(token_id)
        return self._release(self._advance(final=False))

    def finish(self) -> str:
        """Return what was held back, unfinished characters as U+FFFD: the text ends."""
        if self.stopped_by is not None:
            return ""
        text = self._release(self._advance(final=True)) if self._read < len(self._ids) else ""
        if self.stopped_by is not None:
            return text
        held, self._held = self._held, ""
        self.released += len(held)
        return text + held

    def _decode(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(ids, skip_special_tokens=self._skip_special)

    def _advance(self, final: bool) -> str:
        """Decode the tokens not decoded yet; "" when their last character is unfinished."""
        text = self._decode(self._ids)
        unread = len(self._ids) - self._read
        if text.endswith(UNFINISHED) and unread < MAX_UNFINISHED and not final:
            return ""
        # The prefix may read differently with more behind it where a decoder joins byte tokens (a run of them is one
        # text or no text): then the new tokens stand on their own
        fresh = text[len(self._prefix) :] if text.startswith(self._prefix) else self._decode(self._ids[self._read :])
        if fresh or unread >= MAX_UNFINISHED:  # a token that shows nothing is no context for the next
            del self._ids[: self._read]
            self._read = len(self._ids)
            self._prefix = self._decode(self._ids)
        return fresh

    def _release(self, fresh: str) -> str:
        """Pass `fresh` on, up to the first stop string or to what may become one."""
        self.decoded += len(fresh)
        text = self._held + fresh
        self._held = ""
        if self._stop and self._tokens > self._min_tokens:
            cut = self._find_stop(text)
            if cut is not None:
                text = text[:cut]
            else:
                keep = len(text) - self._possible_stop(text)
                text, self._held = text[:keep], text[keep:]
        self.released += len(text)
        return text

    def _find_stop(self, text: str) -> int | None:
        """Find where to cut `text`: at the stop string that was complete first, however the tokens fell."""
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if not found:
            return None
        end, start, self.stopped_by = min(found)
        return end if self._include_stop else start

    def _possible_stop(self, text: str) -> int:
        """Measure the longest end of `text` that is the beginning of a stop string."""
        longest = max(map(len, self._stop)) - 1
        for size in range(min(longest, len(text)), 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0
