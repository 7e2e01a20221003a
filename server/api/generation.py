"""From a checked request to text: what completions and chat completions share.

A Generation is inert until its deltas are asked for. Then it leases the adapter, tokenises, submits one engine request
per choice and merges their tokens; closing the deltas gives all of it back, wherever it stands.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace

from loraplex.server.api.answer_schemas import PromptDetails, Usage
from loraplex.server.api.choice import Choice, Delta
from loraplex.server.api.direct import DirectBody
from loraplex.server.api.errors import InvalidField, to_api_error
from loraplex.server.api.limits import check_length, check_prompt, check_scores, check_sequences
from loraplex.server.api.logprobs import PromptScores
from loraplex.server.api.merge import merge
from loraplex.server.api.names import leased, shown_mix
from loraplex.server.api.prompts import Echo, GenerationOptions, Prompt, PromptSource
from loraplex.server.api.sampling import SamplingSpec
from loraplex.server.api.schemas import GenerationFields
from loraplex.server.api.services import Services
from loraplex.server.api.submission import Submission
from loraplex.server.api.turns import Turn
from loraplex.server.engine.request import ContextTooLong, GenerationRequest, Mix, TokenEvent, virtual_tokens
from loraplex.server.telemetry.request_context import current_request_context
from loraplex.server.tenancy.tenants import current_caller
from loraplex.server.text.detokenizer import Detokenizer
from loraplex.server.text.grammar import Grammar
from loraplex.server.text.grammar_spec import GrammarRefused, Thought
from loraplex.server.text.tokenizer import Tokenizer


class Generation:
    """Generate all choices of one request."""

    def __init__(
        self, services: Services, record: GenerationFields, source: PromptSource, options: GenerationOptions
    ) -> None:
        """Raises InvalidField, ShuttingDown."""
        services.drain.check()
        self._services = services
        self._record = record
        self._source = source
        self._options = options
        self._spec = SamplingSpec.build(
            record,
            services.defaults,
            services.facts.vocab_size,
            options.max_tokens,
            options.logprobs,
            prompt_logprobs=options.prompt_scores,
            watermark=options.watermark,
            processed=(record.logprobs_mode or services.facts.config.run.logprobs_mode) == "processed_logprobs",
        )
        self._arrival = time.monotonic()
        self._caller = current_caller()
        self._choices: list[Choice] = []
        self._mix: Mix = ()  # once it is leased
        self.key = secrets.token_hex(16)  # unique; part of ids on the wire
        self.client_id: str | None = None  # the client's own name for it, to abort it by
        self.created = int(time.time())
        self.tokenizer = services.tokenizers.base  # that of the adapters, once these are leased
        self.thought: Thought = "none"  # of the first prompt; known with the first delta
        self.prompt_tokens = 0
        self.submitted = self._arrival  # time.monotonic(); then: adapters leased, prompts read, all queued

    @property
    def keep_alive(self) -> float:
        """Return the seconds of silence after which a stream says that it is alive."""
        return self._services.facts.config.http.sse_keep_alive

    @property
    def num_choices(self) -> int:
        """Count prompts times choices of each; known with the first delta."""
        return len(self._choices)

    def tokens_of(self, index: int) -> int:
        """Count the tokens that choice `index` has generated so far."""
        return self._choices[index].num_tokens

    def prompt_ids_of(self, index: int) -> Sequence[int]:
        """Return the token ids of the prompt of choice `index`."""
        return self._choices[index].prompt_ids

    def prompt_scores(self) -> PromptScores | None:
        """Make the writer of a prompt's log-probabilities beside an answer; None where nobody asked."""
        return PromptScores(self.tokenizer) if self._options.prompt_logprobs is not None else None

    def cached_of(self, index: int) -> int:
        """Count the prompt tokens that choice `index` found in the prefix cache."""
        return self._choices[index].cached_tokens

    def worn(self) -> str:
        """Say which versions answer: "sql@3fa9c1d20b44", or the terms of a mix; "" for the base, and before it leases.

        Where an adapter's files turned out to be others by now, it is the version that took their place.
        """
        return shown_mix(self._choices[0].mix if self._choices else self._mix)

    def usage(self) -> Usage:
        """Return the token counts so far: final once the deltas have ended."""
        answered = 0 if self._options.prompt_only else sum(choice.num_tokens for choice in self._choices)
        total = self.prompt_tokens + answered
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=answered,
            total_tokens=total,
            prompt_tokens_details=PromptDetails(cached_tokens=self.cached_tokens()),
        )

    def cached_tokens(self) -> int:
        """Count the prompt tokens that all choices of a prompt found in the prefix cache: nobody computed these."""
        n = self._options.num_choices
        groups = (self._choices[start : start + n] for start in range(0, len(self._choices), n))
        return sum(min(choice.cached_tokens for choice in group) for group in groups)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of all choices as they come. Raises ApiError, AdapterError, EngineError."""
        choices = self._choices
        with self._services.drain.at_work(), self._noted():
            try:
                async with leased(self._services, self._record) as worn:
                    self._mix = worn.mix
                    self._note_model()
                    self.tokenizer = worn.tokenizer
                    self._services.engine.check_room(self._caller.key.tenant, worn.mix)  # texts take time to read
                    prompts = await self._prompts(worn.tokens)
                    self._caller.pay_prompt(self.prompt_tokens)
                    grammar = await self._grammar(prompts[0].thought)
                    await self._submit(prompts, grammar, worn.mix)
                self.submitted = time.monotonic()
                for prompt in prompts:
                    self._services.metrics.prompt(len(prompt.ids), self._options.num_choices)
                names = [name for name in (self.key, self._record.rid, self.client_id) if name]
                owner = self._caller.key.tenant
                with self._caller.at_work(), self._services.open_answers.known_as(owner, names, self.abort):
                    sources = [choice.deltas() for choice in choices]
                    # nearly always there is one: no tasks, no queue
                    async with aclosing(sources[0] if len(sources) == 1 else merge(sources)) as deltas:
                        async for delta in deltas:
                            self._charge(choices[delta.index : delta.index + 1])
                            yield delta
            finally:
                self._charge(choices)
                await self._end()

    def divert(self, body: DirectBody, chunk: Callable[[str], bytes]) -> None:
        """Have tokens that are text and nothing else written to `body`, as `chunk`s, when the engine delivers them.

        Everything else comes as deltas as before, and all of it where there are several choices, or tokens are scored
        or may be the beginning of a stop string, or while the reader does not keep up. In the first deltas' turn.
        """
        if len(self._choices) > 1 or not self._choices[0].is_plain:
            return
        [choice] = self._choices

        def shortcut(events: Sequence[TokenEvent]) -> int:
            if not body.is_ready:
                return 0
            texts = choice.take_plain(events)
            if content := b"".join([chunk(text) for text in texts if text]):
                body.write(content)
            self._charge((choice,))
            return len(texts)

        choice.divert(shortcut)

    def abort(self) -> None:
        """End all choices where they are."""
        for choice in self._choices:
            choice.abort()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Keep the request from ending while the block runs; it then knows what was asked for."""
        context = current_request_context()
        if context is None:
            yield
            return
        context.tenant = self._caller.key.tenant
        with context.held():
            try:
                yield
            finally:
                context.prompt_tokens += self.prompt_tokens

    def _note_model(self) -> None:
        """Note the model, only now: a name that is not served may be anything, also a prompt, and is not logged."""
        context = current_request_context()
        if context is not None:
            context.model = self._record.model or self._services.facts.names[0]
            context.worn = self.worn

    async def _end(self) -> None:
        """Close all choices and tell of them."""
        context, turn = current_request_context(), Turn()
        for choice in self._choices:
            await choice.close()
        for choice in self._choices:
            await turn.take()
            times = choice.times()
            self._services.metrics.choice_ended(
                times, self._caller.key.tenant, times.ended - self._arrival, choice.params.max_tokens
            )
            if context is not None:
                context.add(times)

    def _charge(self, choices: Iterable[Choice]) -> None:
        """Let the caller pay for what they generated since."""
        if not self._options.prompt_only:
            self._caller.pay_answer(sum([choice.take_unpaid() for choice in choices]))

    async def _prompts(self, tokens: int) -> list[Prompt]:
        """Read the prompts. tokens: of AdapterUse."""
        facts, source, tokenizer = self._services.facts, self._source, self.tokenizer
        check_length(max(source.sizes, default=0), tokenizer, facts, source.param)

        def read() -> tuple[GenerationOptions, list[Prompt]]:
            return source.refine(tokenizer, self._options), source.read(tokenizer)

        size, slow = sum(source.sizes) + source.rest, tokenizer.renders_slowly
        if slow or size >= Tokenizer.LONG_TEXT:
            self._options, prompts = await self._services.texts.run(self._caller.key.tenant, size, slow, read)
        else:
            self._options, prompts = read()
        n = self._options.num_choices
        check_sequences(len(prompts), n, "n", self._services.limits)
        for prompt in prompts:
            check_prompt(prompt.ids, facts, source.param, tokens)
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        if (top := self._options.prompt_scores) is not None:
            answers = n * self._options.beside
            check_scores(self.prompt_tokens, answers, top, source.param, self._services.limits)
        self.thought = prompts[0].thought
        return prompts

    async def _grammar(self, thought: Thought) -> Grammar | None:
        if self._options.grammar is None:
            return None
        param, spec = self._options.grammar
        if self._record.ignore_eos:
            raise InvalidField("ignore_eos", "ignore_eos: a structured answer has an end of its own")
        try:
            return await self._services.grammars.get(replace(spec, thought=thought, owner=self._caller.key.tenant))
        except GrammarRefused as error:
            raise InvalidField(param, f"{param}: {error}", code="invalid_grammar") from error

    async def _submit(self, prompts: list[Prompt], grammar: Grammar | None, mix: Mix) -> None:
        """Make the choices, a request each; others have their turn meanwhile."""
        options, turn = self._options, Turn()
        for prompt in prompts:
            ids = tuple(prompt.ids)
            scored = options.logprobs is not None
            echo = await Echo.build(self.tokenizer, prompt, scored) if options.echo else None
            for choice in range(options.num_choices):
                request = self._request(ids, choice, grammar, mix)
                self._choices.append(self._choice(request, echo))
                await turn.take()

    def _request(self, ids: tuple[int, ...], choice: int, grammar: Grammar | None, mix: Mix) -> GenerationRequest:
        """Make the request of choice number `choice` of a prompt, with leases of its own."""
        room = self._services.facts.max_model_len - len(ids) - virtual_tokens(mix)
        return GenerationRequest(
            request_id=f"{self.key}-{len(self._choices)}",
            prompt_ids=ids,
            params=self._spec.params(max(1, room), choice, self.tokenizer.eos_ids),
            mix=tuple((lease.share(), weight) for lease, weight in mix),
            tenant=self._caller.key.tenant,
            weight=self._caller.key.weight,
            arrival=self._arrival,
            priority=self._record.priority or 0,
            deadline=self._arrival + self._record.timeout if self._record.timeout is not None else None,
            cache_salt=self._record.cache_salt or "",
            constraint=grammar.start(self.tokenizer.eos_ids) if grammar is not None else None,
            pooling=self._options.pooling,
        )

    def _choice(self, request: GenerationRequest, echo: Echo | None) -> Choice:
        record, options, tokenizer = self._record, self._options, self.tokenizer
        detokenizer = Detokenizer(
            tokenizer,
            request.prompt_ids,
            stop=record.stop,
            include_stop=bool(record.include_stop_str_in_output),
            min_tokens=request.params.min_tokens,
            skip_special_tokens=record.skip_special_tokens is not False and not options.show_special,
            stop_tokens=tokenizer.special_ids(record.stop),
        )
        services = self._services
        try:
            submission = Submission(services.engine, services.adapters.registry, request)
        except ContextTooLong as error:
            raise to_api_error(error, self._source.param) from error
        eos_ids = frozenset((*services.defaults.eos_token_ids, *tokenizer.eos_ids))
        return Choice(len(self._choices), submission, detokenizer, services.metrics, echo, options, eos_ids)
