"""A Generation to an answer, in one piece or as a stream; routes differ in their Rendering only."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from loraplex.server.api.choice import Delta, ScoredToken
from loraplex.server.api.direct import DirectBody, direct_body
from loraplex.server.api.generation import Generation
from loraplex.server.api.schemas import GenerationFields, StreamOptions, Usage, Wire
from loraplex.server.api.sse import SseResponse, answer_or_disconnect, encode_event


@dataclass
class Collected:
    """All deltas of one choice."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


@dataclass(frozen=True)
class TextFrame:
    """The JSON around the text of a choice's plain chunks: nearly all chunks there are; 0.2 us, pydantic takes 6."""

    before: str
    after: str

    @classmethod
    def of(cls, rendering: Rendering, index: int, hidden: set[str] | None) -> TextFrame:
        """Cut out of a chunk with a text that stands nowhere else."""
        mark = secrets.token_hex(16)
        (chunk,) = rendering.chunks(Delta(index, mark), None)
        return cls(*chunk.model_dump_json(exclude=hidden).split(f'"{mark}"'))

    def around(self, text: str) -> str:
        """As pydantic writes it: no more is escaped than has to be."""
        return f"{self.before}{encode_basestring(text)}{self.after}"

    def event(self, text: str) -> bytes:
        """The chunk as SseResponse sends it."""
        return encode_event(self.around(text))


class Rendering(Protocol):
    """How one route writes its answers."""

    def opening(self, num_choices: int) -> Iterable[Wire]:
        """Chunks before the first delta's."""
        ...

    def chunks(self, delta: Delta, usage: Usage | None) -> Iterable[Wire]:
        """The chunks of one delta, often none; `usage` is the counts so far where they are wanted in every chunk."""
        ...

    def is_plain(self, delta: Delta) -> bool:
        """Whether chunks() of `delta` is one that adds its text, differs from others of the choice in nothing else,
        and leaves no trace here."""
        ...

    def usage_chunk(self, usage: Usage) -> Wire:
        """The chunk after all others, where it was asked for."""
        ...

    def whole(self, choices: list[Collected], usage: Usage) -> Wire:
        """The answer in one piece; choices in the order of their index."""
        ...


async def respond(
    request: Request, record: GenerationFields, generation: Generation, rendering: Rendering, headers: dict[str, str]
) -> Response:
    """The response to `request`. Raises what Generation.deltas raises, and ClientGone."""
    generation.client_id = request.headers.get("x-request-id")
    if record.stream:
        chunks = _chunks(generation, rendering, record.stream_options or StreamOptions(), direct_body(request.scope))
        return SseResponse(chunks, headers, keep_alive=generation.keep_alive)
    whole = await answer_or_disconnect(request, collect(generation, rendering))
    return Response(whole.model_dump_json(), media_type="application/json", headers=headers)


async def collect(generation: Generation, rendering: Rendering) -> Wire:
    """The answer in one piece."""
    choices: dict[int, Collected] = {}
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            choices.setdefault(delta.index, Collected()).add(delta)
    return rendering.whole([choices[index] for index in sorted(choices)], generation.usage())


async def _chunks(
    generation: Generation, rendering: Rendering, options: StreamOptions, direct: DirectBody | None
) -> AsyncGenerator[str, None]:
    last, always = bool(options.include_usage), bool(options.continuous_usage_stats)
    hidden = None if last or always else {"usage"}  # where it was asked for, chunks before the last say null
    frames: dict[int, TextFrame] = {}
    opened = False
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if not opened:
                opened = True
                for chunk in rendering.opening(generation.num_choices):
                    yield chunk.model_dump_json(exclude=hidden)
            if delta.text and not always and rendering.is_plain(delta):
                frame = frames.get(delta.index)
                if frame is None:
                    frame = frames[delta.index] = TextFrame.of(rendering, delta.index, hidden)
                    if direct is not None:
                        generation.divert(direct, frame.event)
                yield frame.around(delta.text)
                continue
            for chunk in rendering.chunks(delta, generation.usage() if always else None):
                yield chunk.model_dump_json(exclude=hidden)
    if last:
        yield rendering.usage_chunk(generation.usage()).model_dump_json()
