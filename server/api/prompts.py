"""Prompts: where they come from, what is asked for beside them, and how they are the beginning of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loraplex.server.api.errors import InvalidField
from loraplex.server.api.turns import Turn
from loraplex.server.engine.request import (
    Pooling,
    TokenScores,
)
from loraplex.server.text.detokenizer import Detokenizer
from loraplex.server.text.grammar_spec import GrammarSpec, Thought
from loraplex.server.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScoredToken:
    """Hold one token and how likely it was."""

    token_id: int
    logprob: float | None  # None: the first one of a prompt
    top: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first
    offset: int  # characters of the choice's text before it


@dataclass(frozen=True, eq=False)
class ScoredPrompt:
    """Make the tokens of an echoed prompt, each when it is looked at, as there may be very many."""

    ids: Sequence[int]
    offsets: Sequence[int]
    scores: TokenScores | None  # of all ids but the first, which nothing predicts
    top: int  # likeliest ones of each place that are shown

    def tokens(self, start: int = 0) -> Iterator[ScoredToken]:
        """Yield the tokens from number `start` on."""
        for place in range(start, len(self.ids)):
            known = self.scores if place else None
            logprob = None if known is None else float(known.logprobs[place - 1])
            top = () if known is None else known.top(place - 1)[: self.top]
            yield ScoredToken(self.ids[place], logprob, top, self.offsets[place])


@dataclass(frozen=True)
class Prompt:
    """One prompt; `text` is what an echo of it says, `thought` where it leaves a model that thinks aloud."""

    ids: Sequence[int]
    thought: Thought = "none"
    text: str | None = None


@dataclass(frozen=True)
class GenerationOptions:
    """Hold what a route asks for beyond the fields that all routes have."""

    max_tokens: int | None  # None: up to the context's end
    num_choices: int  # of each prompt
    logprobs: int | None = None  # see SamplingParams
    grammar: tuple[str, GrammarSpec] | None = None  # the field that asked, and what the answer is held to
    show_special: bool = False  # whatever the request says
    whole_tokens: bool = (
        False  # scored tokens come when all of their text is out; the one that stops, without text, too
    )
    echo: bool = False  # the prompt comes before the answer, with its own log probabilities if there are any
    beside: int = 1  # generations that make up one answer, this one included
    prompt_only: bool = False  # nothing of the answer is shown
    pooling: Pooling | None = None  # the prompt as one vector
    watermark: bool = False  # see SamplingParams
    every_token: bool = False  # all that are drawn come, at once: the one that stops, and what a stop string cuts off
    prompt_logprobs: int | None = None  # the prompt's own, with so many of the likeliest tokens, beside the answer

    @property
    def prompt_scores(self) -> int | None:
        """Count the likeliest tokens of each place of the prompt that are wanted, for an echo or beside the answer."""
        wanted = [self.logprobs if self.echo else None, self.prompt_logprobs]
        return max((k for k in wanted if k is not None), default=None)


def prompt_logprobs_of(asked: int | None, stream: bool) -> int | None:
    """Return `asked`, the likeliest tokens of each place of the prompt. Raises InvalidField in a stream, as vLLM."""
    if asked is not None and stream:
        raise InvalidField("prompt_logprobs", "prompt_logprobs: they come with the whole answer, not with stream: true")
    return asked


def _as_it_is(tokenizer: Tokenizer, options: GenerationOptions) -> GenerationOptions:
    return options


@dataclass(frozen=True)
class PromptSource:
    """Make the prompts, once the tokenizer is known: that of the adapters which the request wears."""

    param: str  # the field they come in
    sizes: tuple[int, ...]  # of each of its texts, in characters
    read: Callable[[Tokenizer], list[Prompt]]  # may take long
    # What else the tokenizer decides; raises ApiError.
    refine: Callable[[Tokenizer, GenerationOptions], GenerationOptions] = _as_it_is
    rest: int = 0  # characters, about, of what else the two look at


def source_of(param: str, given: Sequence[str | Sequence[int]], special: bool | None) -> PromptSource:
    """Make the source of prompts `given` as texts or as ids. special: whether texts get the tokenizer's own tokens;
    None: they do."""
    texts = [each for each in given if isinstance(each, str)]

    def read(tokenizer: Tokenizer) -> list[Prompt]:
        encoded = iter(tokenizer.encode_all(texts, special is not False))
        return [Prompt(next(encoded), text=each) if isinstance(each, str) else Prompt(each) for each in given]

    return PromptSource(param, tuple(map(len, texts)), read)


@dataclass(frozen=True)
class Echo:
    """Hold a prompt as the beginning of an answer; `offsets` are empty where its tokens are not scored."""

    text: str
    offsets: tuple[int, ...]

    @classmethod
    async def build(cls, tokenizer: Tokenizer, prompt: Prompt, scored: bool) -> Echo:
        """Build the echo; others have their turn meanwhile: 1,000 tokens take 2 ms."""
        text = prompt.text if prompt.text is not None else tokenizer.decode(prompt.ids)
        if not scored:
            return cls(text, ())
        offsets, reader, turn = [], Detokenizer(tokenizer), Turn()
        for token_id in prompt.ids:
            offsets.append(min(reader.decoded, len(text)))
            reader.push(token_id)
            await turn.take()
        return cls(text, tuple(offsets))

    def prompt(self, ids: Sequence[int], scores: TokenScores | None, top: int | None) -> ScoredPrompt | None:
        """Return the prompt's tokens; None where they are not scored."""
        return ScoredPrompt(ids, self.offsets, scores, top or 0) if self.offsets else None
