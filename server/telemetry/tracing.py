"""Trace requests with OpenTelemetry: the HTTP span, and spans of what each choice waited for and computed.

    POST /v1/chat/completions
      choice           adapters and their digests, tokens, why it ended
        queue          waiting for its turn
        load           waiting for its adapters: source, host memory, device
        prefill        admitted with its adapters, to the first token
        decode         first token to last

Spans are made when a request has ended, of times that are kept without tracing too: tracing adds nothing to a step. The
library is loaded only where tracing is asked for (the extra `otel`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from loraplex.server.telemetry.logs import shown
from loraplex.server.telemetry.request_context import ChoiceTimes, RequestContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

FLUSH_SECONDS = 3.0
"""Seconds at the end in which a collector can take the remaining spans."""


class TracingUnavailable(Exception):
    """Say that the library is not installed, or that the endpoint is none; the message says what to do."""


class Tracing:
    """Begin a span for each request and end it with all facts of the request. Loop thread only."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("loraplex")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, context: RequestContext, headers: Mapping[str, str]) -> None:
        """Begin the span of a request; its parent is the caller's traceparent, where there is one."""
        from opentelemetry.trace import SpanKind, format_trace_id

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        span = self._tracer.start_span(
            f"{context.method} {shown(context.path)}",
            self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=context.began_ns,
        )
        context.trace_id = format_trace_id(span.get_span_context().trace_id)
        ended = context.on_end

        def end(context: RequestContext) -> None:
            self._end(span, context)
            ended(context)

        context.on_end = end

    def flush(self) -> None:
        """Give the remaining spans to the collector; blocks for FLUSH_SECONDS at most."""
        self._provider.force_flush(round(1000 * FLUSH_SECONDS))

    def _end(self, span: Span, context: RequestContext) -> None:
        from opentelemetry.trace import Status, StatusCode

        if span.is_recording():
            span.set_attributes(_request_attributes(context))
            if context.status >= 500 or context.status == 0:
                span.set_status(Status(StatusCode.ERROR))
            for index, choice in enumerate(context.choices):
                self._tell_choice(span, context, index, choice)
        span.end(context.unix_ns(context.ended or context.began))

    def _tell_choice(self, parent: Span, context: RequestContext, index: int, choice: ChoiceTimes) -> None:
        attributes = {**_choice_attributes(choice), "loraplex.choice": index}
        span = self._child(parent, context, "choice", choice.submitted, attributes)
        for name, start, end in phases_of(choice):
            self._child(span, context, name, start).end(context.unix_ns(end))
        span.end(context.unix_ns(choice.ended))

    def _child(
        self,
        parent: Span,
        context: RequestContext,
        name: str,
        start: float,
        attributes: Mapping[str, Any] | None = None,
    ) -> Span:
        from opentelemetry.trace import set_span_in_context

        inside = set_span_in_context(parent)
        return self._tracer.start_span(name, inside, attributes=attributes, start_time=context.unix_ns(start))


def phases_of(choice: ChoiceTimes) -> list[tuple[str, float, float]]:
    """List (name, start, end) by time.monotonic() of the phases reached. `load` lies in `queue` or after it."""
    phases = choice.phases
    if phases is None:
        return [("queue", choice.submitted, choice.ended)]
    first = choice.first_token if choice.first_token is not None else choice.ended
    found = [("queue", choice.submitted, phases.admitted)]
    if phases.load is not None:
        found.append(("load", *phases.load))
    found.append(("prefill", phases.ready, first))
    if choice.tokens > 1:
        found.append(("decode", first, choice.ended))
    return found


def start_tracing(endpoint: str) -> Tracing:
    """Send spans to the OTLP/HTTP collector at `endpoint` in the background. Raises TracingUnavailable."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise TracingUnavailable(f"--otlp-endpoint {endpoint!r} is no URL; expected one as http://collector:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracingUnavailable(
            f"--otlp-endpoint needs OpenTelemetry, which is not installed ({error}): pip install 'loraplex[otel]'"
        ) from error
    url = endpoint if parts.path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"
    return Tracing(make_provider(OTLPSpanExporter(endpoint=url), batched=True))


def make_provider(exporter: SpanExporter, *, batched: bool) -> TracerProvider:
    """Make the provider of spans to `exporter`; `batched`: a thread sends them, and drops what is too much."""
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    from loraplex.server.version import version

    named = Resource({SERVICE_NAME: "loraplex", SERVICE_VERSION: version()})
    # the environment's (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) comes last, and wins
    provider = TracerProvider(resource=named.merge(_from_environment()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter) if batched else SimpleSpanProcessor(exporter))
    return provider


def _from_environment() -> Any:
    from opentelemetry.sdk.resources import OTELResourceDetector

    return OTELResourceDetector().detect()


def _request_attributes(context: RequestContext) -> dict[str, Any]:
    found: dict[str, Any] = {
        "http.request.method": context.method,
        "url.path": shown(context.path),
        "http.response.status_code": context.status,
        "loraplex.request_id": context.request_id,
    }
    if context.tenant:
        found["loraplex.tenant"] = context.tenant
    if context.model:
        found["gen_ai.request.model"] = shown(context.model)
        found["gen_ai.usage.input_tokens"] = context.prompt_tokens
        found["gen_ai.usage.output_tokens"] = context.tokens
        found["gen_ai.response.finish_reasons"] = context.finish_reasons
    if context.first_token is not None:
        found["gen_ai.latency.time_to_first_token"] = context.first_token - context.began
    return found


def _choice_attributes(choice: ChoiceTimes) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.usage.input_tokens": choice.prompt_tokens,
        "gen_ai.usage.output_tokens": choice.tokens,
        "gen_ai.response.finish_reasons": (choice.finish_reason,),
    }
    if choice.adapters:
        found["loraplex.adapter.name"] = tuple(name for name, _, _ in choice.adapters)
        found["loraplex.adapter.digest"] = tuple(digest or "" for _, digest, _ in choice.adapters)
        found["loraplex.adapter.weight"] = tuple(weight for _, _, weight in choice.adapters)
    if choice.phases is not None:
        found["loraplex.cached_tokens"] = choice.phases.cached_tokens
    return found
