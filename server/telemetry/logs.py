"""Write the server's log to stderr: one line an event, as text or as JSON, and one line for each request.

Never prompts, answers or keys: the line of a request holds names, counts and times.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import traceback
from collections import Counter
from collections.abc import Mapping
from contextvars import Context
from datetime import UTC, datetime
from numbers import Number
from typing import Any

from loraplex.server.config import LogFormat
from loraplex.server.telemetry.request_context import RequestContext, current_request_context

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("loraplex.access")

QUIET_PATHS = frozenset(
    {"/", "/health", "/ready", "/startup", "/ping", "/metrics", "/version", "/load", "/get_load", "/ui/overview"}
)
"""Paths that machines ask for every few seconds; a line is logged only where the answer is an error."""

MAX_NAME = 200
"""The most characters of a name that a caller made up."""

MAX_ARGUMENT, MAX_MESSAGE = 1000, 4000
"""The most characters of an argument in a line, and of the line: a caller's text may be megabytes."""

MAX_REFUSALS = 10
"""The most lines a second of requests that are refused before the application; one line counts the others."""

MAX_TRACE = 200
"""The most lines of a traceback: half of them are its first lines, half its last."""


def set_up(form: LogFormat) -> None:
    """Log to stderr: our loggers from INFO on, all others from WARNING on, and the errors that end threads."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form is LogFormat.json else TextFormatter())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("loraplex").setLevel(logging.INFO)
    logging.raiseExceptions = False  # a line that cannot be written is not told of on stderr, unescaped
    threading.excepthook = _log_thread


def shown(text: str, limit: int = MAX_NAME) -> str:
    """Write `text` on one line of at most `limit` characters; the rest is cut and its length told.

    Characters that are not printable appear as Python escapes them: control characters, what ends lines anywhere
    (U+0085, U+2028), what colours terminals or turns the direction of writing, and lone surrogates.
    """
    head = text[:limit]
    if not head.isprintable():
        head = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in head)
    return head if len(text) <= limit else f"{head}... ({len(text)} characters)"


class _Cut:
    """Wrap an argument of a log line, which is shortened when the line is formatted."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return shown(str(self._value), MAX_ARGUMENT)

    def __repr__(self) -> str:
        return shown(repr(self._value), MAX_ARGUMENT)


def _message(record: logging.LogRecord) -> str:
    """Format the record's message on one line."""
    args, text = record.args, str(record.msg)
    if isinstance(args, tuple):  # or a mapping, of whoever logs so
        args = tuple(each if isinstance(each, Number) else _Cut(each) for each in args)
    try:
        return shown(text % args if args else text, MAX_MESSAGE)
    except (TypeError, ValueError):  # the two do not fit together: a bug, which must not cost the line
        return shown(f"{text} {args}", MAX_MESSAGE)


def _trace(record: logging.LogRecord) -> list[str]:
    """List the lines of the record's exception, if there is one; none looks like the first line of another record."""
    if not record.exc_info or record.exc_info[1] is None:
        return []
    whole = "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n").split("\n")
    left_out = len(whole) - MAX_TRACE
    if left_out > 0:
        half = MAX_TRACE // 2
        whole = [*whole[:half], f"... {left_out} lines ...", *whole[-half:]]
    return [f"    {shown(line, MAX_ARGUMENT)}" for line in whole]


class TextFormatter(logging.Formatter):
    """Format `12:30:59 LEVEL logger: message` and, indented below it, the traceback: only records begin lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record, self.datefmt)} {record.levelname} {record.name}: {_message(record)}"
        return "\n".join([head, *_trace(record)])


class JsonFormatter(logging.Formatter):
    """Format one JSON object a line: time (UTC), level, logger, message, and the facts of the current request."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        context = current_request_context()
        if context is not None:
            line["request_id"] = context.request_id
            if context.trace_id is not None:
                line["trace_id"] = context.trace_id
        line |= getattr(record, "fields", {})
        if trace := _trace(record):
            line["exception"] = "\n".join(trace)
        return json.dumps(line, default=lambda value: str(_Cut(value)))  # in ASCII: nothing ends the line early


def _log_thread(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread is not None else "?"
    logger.error("thread %s has ended", name, exc_info=args.exc_value)


def log_access(context: RequestContext) -> None:
    """Log the line of a request that has ended."""
    if context.path in QUIET_PATHS and context.status < 400:
        return
    if access_logger.isEnabledFor(logging.INFO):
        fields = access_fields(context)
        access_logger.info("%s", _as_text(fields), extra={"fields": fields})


class RefusalLines:
    """Log the lines of requests that are refused at once: MAX_REFUSALS a second, and the count of the others by status.

    Then a client that sends a thousand bad keys a second neither fills the disk nor takes a core. Loop thread only.
    """

    def __init__(self) -> None:
        self._told = 0  # lines of this second
        self._untold: Counter[int] = Counter()  # by status
        self._second: asyncio.TimerHandle | None = None

    def tell(self, method: str, path: str, status: int, request_id: str) -> None:
        """Log the line of a refused request, or count it for a line at the end of the second."""
        if self._second is None:
            self._second = asyncio.get_running_loop().call_later(1.0, self._next_second, context=Context())
        if self._told >= MAX_REFUSALS:
            self._untold[status] += 1
            return
        self._told += 1
        # A request that is pipelined begins in the context of the one before it, whose trace is not its own
        Context().run(log_access, RequestContext(request_id, method, path, status=status))

    def _next_second(self) -> None:
        if self._untold:
            counts = ", ".join(f"{count} with {status}" for status, count in sorted(self._untold.items()))
            access_logger.info("more requests refused in the last second: %s", counts)
        self._told, self._second = 0, None
        self._untold.clear()


def access_fields(context: RequestContext) -> dict[str, Any]:
    """Return the facts of a request that its line tells: seconds, counts and names."""
    fields: dict[str, Any] = {
        "request_id": context.request_id,
        "method": context.method,
        "path": shown(context.path),
        "status": context.status,
        "duration": round((context.ended or context.began) - context.began, 4),
    }
    if context.trace_id is not None:
        fields["trace_id"] = context.trace_id
    if context.tenant:
        fields["tenant"] = context.tenant
    if context.model:
        fields["model"] = shown(context.model)
        fields["adapters"] = list(dict.fromkeys(name for choice in context.choices for name, _, _ in choice.adapters))
        fields["prompt_tokens"] = context.prompt_tokens
        fields["completion_tokens"] = context.tokens
        fields["finish_reason"] = ",".join(context.finish_reasons)
        if context.first_token is not None:
            fields["ttft"] = round(context.first_token - context.began, 4)
    return fields


def _as_text(fields: Mapping[str, Any]) -> str:
    """Format `POST /v1/completions 200 in 0.31 s key=value ...`; what callers made up cannot look like another key."""
    head = f"{_word(fields['method'])} {_word(fields['path'])} {fields['status'] or 'unanswered'}"
    told = {name: value for name, value in fields.items() if name not in ("method", "path", "status", "duration")}
    rest = " ".join(f"{name}={_word(value)}" for name, value in told.items() if value not in ("", []))
    return f"{head} in {fields['duration']} s {rest}".rstrip()


def _word(value: object) -> str:
    text = ",".join(value) if isinstance(value, list) else str(value)
    return text.replace(" ", "?")
