"""LoRAX's routes: POST /, /generate_stream and /embed, GET /, /startup and /info. /generate is in sglang.py.

What differs from LoRAX: log-probabilities are the model's own, before temperature and penalties; typical_p comes before
top_k and top_p. `watermark` is drawn by the CPU's generator on every device, as LoRAX does without a GPU: transformers'
WatermarkDetector finds it with device "cpu", greenlist_ratio 0.5, bias 2.0 and else its defaults.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loraplex.adapters.errors import AdapterError
from loraplex.server.api.body import body_schema
from loraplex.server.api.dialects.lorax_fields import (
    check_together,
    neutral_fields,
    prompt_source,
    samples,
    static_headers,
)
from loraplex.server.api.dialects.lorax_schemas import (
    LoraxAnswer,
    LoraxEmbedding,
    LoraxEmbedRequest,
    LoraxInfo,
    LoraxParameters,
    LoraxRequest,
    StreamToken,
)
from loraplex.server.api.dialects.lorax_writer import LoraxChoice, Style, dump, whole_answer
from loraplex.server.api.errors import ApiError, ClientGone, to_api_error
from loraplex.server.api.generation import Generation
from loraplex.server.api.openai.embeddings import collect_vectors
from loraplex.server.api.openapi import LORAX, READ, LoraxErrorAnswer, answers, failures
from loraplex.server.api.prompts import GenerationOptions, Prompt, PromptSource
from loraplex.server.api.services import Services
from loraplex.server.api.sse import SseResponse, answer_or_disconnect
from loraplex.server.api.structured import read_structured
from loraplex.server.engine.request import EngineError
from loraplex.server.version import version

logger = logging.getLogger(__name__)


_told = partial(answers, errors=LORAX, error_shape=LoraxErrorAnswer)


def make_router(services: Services) -> APIRouter:
    """The routes, working with `services`."""
    router = APIRouter()

    @router.post("/", openapi_extra=body_schema(LoraxRequest), **_told(list[LoraxAnswer], streams=StreamToken))
    async def compat_generate(request: Request) -> Response:
        """LoRAX's generation: a list of one answer, or a stream."""
        return await answer(services, request, await _read(services, request), as_list=True, streams=None)

    @router.post("/generate_stream", openapi_extra=body_schema(LoraxRequest), **_told(None, streams=StreamToken))
    async def generate_stream(request: Request) -> Response:
        """LoRAX's generation as a stream."""
        return await answer(services, request, await _read(services, request), as_list=False, streams=True)

    @router.post("/embed", openapi_extra=body_schema(LoraxEmbedRequest), **_told(LoraxEmbedding))
    async def embed(request: Request) -> Response:
        """LoRAX's embedding: the last token's final hidden state, as it is."""
        try:
            return await _embed(services, request, await services.bodies.read(request, LoraxEmbedRequest))
        except ClientGone:
            raise
        except Exception as error:
            return error_response(error)

    @router.get("/", **answers(None, errors=(503,), error_shape=LoraxErrorAnswer))
    @router.get("/startup", **answers(None, errors=(503,), error_shape=LoraxErrorAnswer))
    async def health() -> Response:
        """200 while the engine runs."""
        if not services.engine.alive:
            return JSONResponse({"error": "unhealthy", "error_type": "healthcheck"}, status_code=503)
        return Response(status_code=200)

    @router.get("/info", responses=failures(READ, LoraxErrorAnswer))
    async def info() -> LoraxInfo:
        """What is served, in LoRAX's words."""
        facts = services.facts
        return LoraxInfo(
            model_id=facts.names[0],
            model_sha=None,
            model_dtype=f"torch.{facts.dtype}",
            model_device_type=facts.device,
            model_pipeline_tag="text-generation",
            max_concurrent_requests=facts.max_requests,
            max_best_of=services.limits.max_n,
            max_stop_sequences=services.limits.max_stops,
            max_input_length=facts.max_model_len - 1,
            max_total_tokens=facts.max_model_len,
            waiting_served_ratio=0.0,  # a prompt joins the next step, whoever waits
            max_batch_total_tokens=facts.cache_tokens,
            max_waiting_tokens=0,
            validation_workers=1,
            eager_prefill=True,
            version=version(),
            sha=None,
            docker_label=None,
            request_logger_url=None,
        )

    return router


async def answer(
    services: Services, request: Request, record: LoraxRequest | Exception, *, as_list: bool, streams: bool | None
) -> Response:
    """The answer to a request, or to what was wrong with it; `streams` None: the body says. Raises ClientGone alone."""
    start = time.monotonic()
    try:
        if isinstance(record, Exception):
            raise record
        if record.parameters is not None and record.parameters.api_token is None and services.access is None:
            record.parameters.api_token = _bearer(request)
        work = _LoraxWork(services, record, start, bool(record.stream) if streams is None else streams)
        work.generation.client_id = request.headers.get("x-request-id")
        if work.stream:
            return SseResponse(
                work.events(), work.headers, done=False, keep_alive=services.facts.config.http.sse_keep_alive
            )
        text = await answer_or_disconnect(request, work.whole())
    except ClientGone:
        raise
    except Exception as error:
        return error_response(error)
    content = f"[{text}]" if as_list else text
    return Response(content, media_type="application/json", headers=work.headers)


def error_response(error: Exception) -> Response:
    """LoRAX's body and status: 422 for what the caller can mend, 429, and 424 for what failed under way."""
    known = to_api_error(error)
    status, fields = _explain(error)
    if known.status == 500:  # others of the server's faults are known, and told in full
        logger.error("a request failed", exc_info=error)
    return JSONResponse(fields, status_code=status, headers=known.headers)


def _explain(error: Exception) -> tuple[int, dict[str, str]]:
    known = to_api_error(error)
    if known.status in (413, 415):
        return known.status, {"error": known.message, "error_type": "validation"}
    if known.status == 429:
        return 429, {"error": known.message, "error_type": "overloaded"}
    if known.code == "shutting_down":
        return 503, {"error": known.message, "error_type": "overloaded"}
    if known.code == "aborted":
        return 500, {"error": "Incomplete generation", "error_type": "incomplete_generation"}
    adapters = isinstance(error, AdapterError) or known.code in ("model_not_found", "not_finite")
    if known.status >= 500 or adapters:  # LoRAX finds out about adapters only when it generates
        return 424, {"error": f"Request failed during generation: {known.message}", "error_type": "generation"}
    return 422, {"error": f"Input validation error: {known.message}", "error_type": "validation"}


async def _read(services: Services, request: Request) -> LoraxRequest | Exception:
    try:
        return await services.bodies.read(request, LoraxRequest)
    except (ApiError, EngineError) as error:
        return error


class _LoraxWork:
    """One request: its generation and how it is written."""

    def __init__(self, services: Services, record: LoraxRequest, start: float, stream: bool) -> None:
        """Raises ApiError."""
        params = record.parameters or LoraxParameters()
        self.stream = stream
        self._services = services
        self._start = start
        self._first: float | None = None  # when the first token came
        check_together(params, stream)
        sampled = samples(params)
        seed = (secrets.randbits(63) if params.seed is None else params.seed) if sampled else None
        scored = stream or params.details or params.decoder_input_details or (params.best_of or 1) > 1
        k = params.return_k_alternatives
        self._style = Style(
            beginning=record.inputs if params.return_full_text else "",
            seed=seed,
            alternatives=k is not None,
            prefill=bool(params.decoder_input_details),
            details=bool(params.details or params.decoder_input_details),
        )
        options = GenerationOptions(
            max_tokens=params.max_new_tokens,
            num_choices=params.best_of or 1,
            logprobs=(k or 0) if scored else None,
            grammar=read_structured(params, services.limits),
            whole_tokens=True,
            echo=self._style.prefill,
            watermark=bool(params.watermark),
        )
        fields = neutral_fields(services, params, seed if sampled else 0, sampled)
        self.generation = Generation(services, fields, prompt_source(services, record, params), options)
        self.headers = static_headers(services, record, params)

    async def whole(self) -> str:
        """The answer as JSON; the headers are complete then. Raises what Generation.deltas raises."""
        sequences: dict[int, LoraxChoice] = {}
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                self._first = self._first or time.monotonic()
                if delta.index not in sequences:
                    sequences[delta.index] = LoraxChoice(self._style, self.generation)
                await sequences[delta.index].add(delta, self.generation.prompt_tokens)
        self._add_counts()
        return whole_answer([sequences[index] for index in sorted(sequences)])

    async def events(self) -> AsyncGenerator[str, None]:
        """One event a token; an error is an event, too, from the first one on, as LoRAX has it."""
        sequence = LoraxChoice(self._style, self.generation)
        try:
            async with aclosing(self.generation.deltas()) as deltas:
                async for delta in deltas:
                    tokens = await sequence.add(delta, self.generation.prompt_tokens)
                    for number, token in enumerate(tokens, 1):
                        yield dump(sequence.stream_token(token, number == len(tokens)))
        except ClientGone:
            raise
        except Exception as error:
            status, fields = _explain(error)
            if to_api_error(error).status == 500:
                logger.error("a stream failed", exc_info=error)
            elif status == 424:
                logger.warning("a stream failed: %s", fields["error"])
            yield json.dumps(fields)

    def _add_counts(self) -> None:
        """Times in whole milliseconds, of which queueing is not told apart from computing."""
        end = time.monotonic()
        usage = self.generation.usage()
        submitted, first = self.generation.submitted, self._first or end
        tokens = max(1, usage.completion_tokens)
        times = {
            "x-compute-time": end - self._start,
            "x-total-time": end - self._start,
            "x-validation-time": submitted - self._start,
            "x-inference-time": end - submitted,
            "x-time-per-token": (end - submitted) / tokens,
            "x-time-to-first-token": first - submitted,
            "x-time-per-output-token": (end - first) / max(1, tokens - 1),
        }
        self.headers |= {name: str(int(1000 * seconds)) for name, seconds in times.items()}
        self.headers |= {
            "x-prompt-tokens": str(usage.prompt_tokens),
            "x-generated-tokens": str(usage.completion_tokens),
            "x-skipped-tokens": "0",
            "x-total-tokens": str(usage.total_tokens),
        }


def _bearer(request: Request) -> str | None:
    """LoRAX's other way to give api_token, where it is not the key to this server."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


async def _embed(services: Services, request: Request, record: LoraxEmbedRequest) -> Response:
    params = record.parameters or LoraxParameters()
    options = GenerationOptions(max_tokens=1, num_choices=1, prompt_only=True, pooling="last")
    fields = neutral_fields(services, params, 0, False)
    source = PromptSource("inputs", (len(record.inputs),), lambda tokenizer: [Prompt(tokenizer.encode(record.inputs))])
    generation = Generation(services, fields, source, options)
    (vector,) = await answer_or_disconnect(request, collect_vectors(generation))
    found = LoraxEmbedding(embeddings=[float(value) for value in vector])
    return Response(found.model_dump_json(), media_type="application/json")
