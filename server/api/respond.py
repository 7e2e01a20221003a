"""A Generation to an answer, in one piece or as a stream; routes differ in their Rendering only."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Literal, Protocol

from starlette.requests import Request
from starlette.responses import Response

from loraplex.server.api.answer_schemas import Usage, WrittenTokens
from loraplex.server.api.choice import Delta
from loraplex.server.api.direct import DirectBody, direct_body
from loraplex.server.api.generation import Generation
from loraplex.server.api.logprobs import ChatScores, CompletionScores, PromptScores, fill_in, write_prompt
from loraplex.server.api.names import shown_mix
from loraplex.server.api.schemas import GenerationFields, StreamOptions, Wire
from loraplex.server.api.sse import SseResponse, answer_or_disconnect, encode_event

Scores = CompletionScores | ChatScores


@dataclass
class Collected:
    """Collect all deltas of one choice."""

    scores: Scores | None = None  # where they are asked for
    prompt_scores: PromptScores | None = None  # likewise
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    likelihood: float = 0.0  # the log-probabilities of its own tokens, added up
    tokens: int = 0  # these are of
    token_ids: list[int] = field(default_factory=list)
    versions: list[WrittenTokens] | None = None  # where they changed

    async def add(self, delta: Delta) -> None:
        if self.scores is not None and delta.prompt is not None:
            await write_prompt(self.scores, delta.prompt)
        if self.prompt_scores is not None and delta.prompt_scores is not None:
            await write_prompt(self.prompt_scores, delta.prompt_scores)
        for token in delta.tokens:
            self.likelihood += token.logprob or 0.0
            self.tokens += 1
            self.token_ids.append(token.token_id)
            if self.scores is not None:
                self.scores.add(token)
        self.text += delta.text
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.versions = written_tokens(delta) or self.versions


def written_tokens(delta: Delta) -> list[WrittenTokens] | None:
    """Say which of an answer's tokens are of which versions, where `delta` has it."""
    cache: dict[bool | None, Literal["kept", "recomputed"] | None] = {None: None, True: "kept", False: "recomputed"}
    return [
        WrittenTokens(version=shown_mix(mix) or None, from_token=first, cache=cache[kept])
        for first, mix, kept in delta.stretches
    ] or None


@dataclass(frozen=True)
class TextFrame:
    """The JSON around the text of a choice's plain chunks: nearly all chunks there are; 0.2 us, pydantic takes 6."""

    before: str
    after: str

    @classmethod
    def of(cls, rendering: Rendering, index: int, hidden: set[str] | None) -> TextFrame:
        """Cut the frame out of a chunk with a text that stands nowhere else."""
        mark = secrets.token_hex(16)
        (chunk,) = rendering.chunks(Delta(index, mark), None, None)
        return cls(*chunk.model_dump_json(exclude=hidden).split(f'"{mark}"'))

    def around(self, text: str) -> str:
        """Put `text` into the frame as pydantic writes it: no more is escaped than has to be."""
        return f"{self.before}{encode_basestring(text)}{self.after}"

    def event(self, text: str) -> bytes:
        """Encode the chunk as SseResponse sends it."""
        return encode_event(self.around(text))


class Rendering(Protocol):
    """Write the answers of one route."""

    def opening(self, num_choices: int) -> Iterable[Wire]:
        """Make the chunks before the first delta's."""
        ...

    def scores(self) -> Scores | None:
        """Make the writer of a choice's log-probabilities, of a delta or of all; None where nobody asked."""
        ...

    def chunks(self, delta: Delta, scores: Scores | None, usage: Usage | None) -> Iterable[Wire]:
        """Make the chunks of one delta, often none; `usage`: the counts so far where every chunk has them."""
        ...

    def is_plain(self, delta: Delta) -> bool:
        """Tell whether chunks() of `delta` is one that adds its text and leaves no trace here.

        It differs from others of the choice in nothing else.
        """
        ...

    def usage_chunk(self, usage: Usage) -> Wire:
        """Make the chunk after all others, where it was asked for."""
        ...

    def whole(self, choices: list[Collected], usage: Usage) -> Wire:
        """Write the answer in one piece; choices in the order of their index."""
        ...


async def respond(
    request: Request, record: GenerationFields, generation: Generation, rendering: Rendering, headers: dict[str, str]
) -> Response:
    """Make the response to `request`. Raises what Generation.deltas raises, and ClientGone."""
    generation.client_id = request.headers.get("x-request-id")
    if record.stream:
        chunks = _chunks(generation, rendering, record.stream_options or StreamOptions(), direct_body(request.scope))
        return SseResponse(chunks, headers, keep_alive=generation.keep_alive)
    whole = await answer_or_disconnect(request, collect(generation, rendering))
    return Response(whole, media_type="application/json", headers=headers)


async def collect(generation: Generation, rendering: Rendering) -> str:
    """Collect the answer in one piece."""
    choices: dict[int, Collected] = {}
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta.index not in choices:
                choices[delta.index] = Collected(rendering.scores(), generation.prompt_scores())
            await choices[delta.index].add(delta)
    whole = rendering.whole([choices[index] for index in sorted(choices)], generation.usage())
    written = [each for c in choices.values() for each in (c.scores, c.prompt_scores) if each is not None]
    return fill_in(whole.model_dump_json(), written)


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
                so_far = {"usage": generation.usage()} if always else {}
                for chunk in rendering.opening(generation.num_choices):
                    yield chunk.model_copy(update=so_far).model_dump_json(exclude=hidden)
            if delta.stretches:  # what comes from here on is of another version
                frames.pop(delta.index, None)
            elif delta.text and not always and rendering.is_plain(delta):
                frame = frames.get(delta.index)
                if frame is None:
                    frame = frames[delta.index] = TextFrame.of(rendering, delta.index, hidden)
                    if direct is not None:
                        generation.divert(direct, frame.event)
                yield frame.around(delta.text)
                continue
            choice = Collected(rendering.scores())
            await choice.add(delta)
            written = [choice.scores] if choice.scores is not None else []
            for chunk in rendering.chunks(delta, choice.scores, generation.usage() if always else None):
                yield fill_in(chunk.model_dump_json(exclude=hidden), written)
    if last:
        yield rendering.usage_chunk(generation.usage()).model_dump_json()
