"""What the server writes to stderr: one line an event, as text or as JSON, and one line for each request.

Never prompts, answers or keys: the line of a request holds names, counts and times.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from loraplex.server.exchange import Exchange, current_exchange

access_logger = logging.getLogger("loraplex.access")

QUIET_PATHS = frozenset(
    {"/", "/health", "/ready", "/startup", "/ping", "/metrics", "/version", "/load", "/get_load", "/ui/overview"}
)
"""What machines ask every few seconds: told of only where it goes wrong."""

MAX_NAME = 200
"""Characters of a name that a caller made up."""


class LogFormat(StrEnum):
    """How lines are written."""

    text = "text"
    json = "json"


def set_up(form: LogFormat) -> None:
    """To stderr: ours from INFO on, everybody else's from WARNING on."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter()
        if form is LogFormat.json
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    )
    logging.basicConfig(handlers=[handler])
    logging.getLogger("loraplex").setLevel(logging.INFO)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and what belongs to the request being worked on."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        exchange = current_exchange()
        if exchange is not None:
            line["request_id"] = exchange.request_id
            if exchange.trace_id is not None:
                line["trace_id"] = exchange.trace_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_access(exchange: Exchange) -> None:
    """The line of a request that has ended."""
    if exchange.path in QUIET_PATHS and exchange.status < 400:
        return
    if access_logger.isEnabledFor(logging.INFO):
        fields = access_fields(exchange)
        access_logger.info("%s", _as_text(fields), extra={"fields": fields})


def access_fields(exchange: Exchange) -> dict[str, Any]:
    """What is told of a request: seconds, counts and names."""
    fields: dict[str, Any] = {
        "request_id": exchange.request_id,
        "method": exchange.method,
        "path": exchange.path[:MAX_NAME],
        "status": exchange.status,
        "duration": round((exchange.ended or exchange.began) - exchange.began, 4),
    }
    if exchange.trace_id is not None:
        fields["trace_id"] = exchange.trace_id
    if exchange.tenant:
        fields["tenant"] = exchange.tenant
    if exchange.model:
        fields["model"] = exchange.model[:MAX_NAME]
        fields["adapters"] = list(dict.fromkeys(name for choice in exchange.choices for name, _, _ in choice.adapters))
        fields["prompt_tokens"] = exchange.prompt_tokens
        fields["completion_tokens"] = exchange.tokens
        fields["finish_reason"] = ",".join(exchange.finish_reasons)
        if exchange.first_token is not None:
            fields["ttft"] = round(exchange.first_token - exchange.began, 4)
    return fields


def _as_text(fields: Mapping[str, Any]) -> str:
    """`POST /v1/completions 200 in 0.31 s key=value ...`; what callers made up cannot break the line."""
    head = f"{_plain(fields['method'])} {_plain(fields['path'])} {fields['status'] or 'unanswered'}"
    shown = {name: value for name, value in fields.items() if name not in ("method", "path", "status", "duration")}
    rest = " ".join(f"{name}={_plain(value)}" for name, value in shown.items() if value not in ("", []))
    return f"{head} in {fields['duration']} s {rest}".rstrip()


def _plain(value: object) -> str:
    text = ",".join(value) if isinstance(value, list) else str(value)
    return "".join(c if c.isprintable() and c != " " else "?" for c in text)
