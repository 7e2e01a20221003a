"""Log lines: JSON that parses, text that stays on its line, and nothing in them that is nobody's business."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from typing import Any
from unittest.mock import patch

import pytest

from loraplex.adapters.histogram import Histogram
from loraplex.server.telemetry.logs import (
    MAX_REFUSALS,
    JsonFormatter,
    LogFormat,
    RefusalLines,
    TextFormatter,
    access_fields,
    access_logger,
    log_access,
    set_up,
)
from loraplex.server.telemetry.request_context import ChoiceTimes, RequestContext, in_request_context, request_id
from loraplex.server.telemetry.usage import GAPS
from tests.support.waiting import turns, until


def choice(reason: str, *, first: float | None, tokens: int, adapter: str = "sql") -> ChoiceTimes:
    return ChoiceTimes(((adapter, "d1", 1.0),), 100.0, None, first, 103.0, 12, tokens, Histogram(GAPS), reason)


def context() -> RequestContext:
    made = RequestContext("req-1", "POST", "/v1/completions", began=100.0, began_ns=0)
    made.status, made.model, made.tenant, made.prompt_tokens, made.ended = 200, "sql", "acme", 12, 103.25
    made.add(choice("stop", first=100.5, tokens=7))
    made.add(choice("length", first=100.25, tokens=9))
    made.add(choice("length", first=None, tokens=0))
    return made


def formatted(record: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(record)
    assert "\n" not in line
    return json.loads(line)


def test_what_is_told_of_a_request() -> None:
    assert access_fields(context()) == {
        "request_id": "req-1",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "duration": 3.25,
        "tenant": "acme",
        "model": "sql",
        "adapters": ["sql"],
        "prompt_tokens": 12,
        "completion_tokens": 16,
        "finish_reason": "stop,length",
        "ttft": 0.25,  # of the first choice that had one
    }


def test_a_line_of_json(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "loraplex"):
        log_access(context())
    [record] = caplog.records
    line = formatted(record)
    assert line.items() >= access_fields(context()).items()
    assert line["level"] == "INFO"
    assert line["logger"] == "loraplex.access"
    assert line["time"].endswith("+00:00")


def test_a_line_of_text(caplog: pytest.LogCaptureFixture) -> None:
    made = context()
    made.model = "x y\nERROR forged\x1b[31m"
    with caplog.at_level(logging.INFO, "loraplex"):
        log_access(made)
    [record] = caplog.records
    text = record.getMessage()
    assert text.startswith("POST /v1/completions 200 in 3.25 s request_id=req-1 ")
    assert "model=x?y\\nERROR?forged\\x1b[31m" in text
    assert text.isprintable()


@pytest.mark.parametrize(("path", "status", "told"), [("/health", 200, 0), ("/health", 503, 1), ("/v1/models", 200, 1)])
def test_probes_are_told_of_when_they_fail(path: str, status: int, told: int, caplog: pytest.LogCaptureFixture) -> None:
    made = RequestContext("r", "GET", path)
    made.status, made.ended = status, made.began
    with caplog.at_level(logging.INFO, "loraplex"):
        log_access(made)
    assert len(caplog.records) == told


async def test_every_line_about_a_request_has_its_id() -> None:
    def line(message: str) -> dict[str, Any]:
        return formatted(logging.LogRecord("loraplex.x", logging.WARNING, "", 0, message, (), None))

    async def work(name: str) -> dict[str, Any]:
        with in_request_context(RequestContext(name, "GET", "/")):
            await asyncio.sleep(0)
            return await asyncio.create_task(later(name))

    async def later(name: str) -> dict[str, Any]:
        await asyncio.sleep(0)
        return line(f"about {name}")

    a, b = await asyncio.gather(work("a"), work("b"))
    assert (a["request_id"], a["message"]) == ("a", "about a")
    assert (b["request_id"], b["message"]) == ("b", "about b")
    assert "request_id" not in line("outside")


NASTY = "x\n12:00:00 ERROR loraplex: forged\r\x1b[31m\x00\x7f\x85\x9b1m\u2028\u2029\u202e\ud800 end"
"""Ends lines in every way there is (for str.splitlines, too), colours, turns the direction, is no UTF-8."""


def record(message: str, *args: object, error: Exception | None = None) -> logging.LogRecord:
    trouble = (type(error), error, error.__traceback__) if error is not None else None
    return logging.LogRecord("loraplex.x", logging.ERROR, "", 0, message, args, trouble)


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
@pytest.mark.parametrize(
    "made",
    [
        record("adapter %s is refused", NASTY),
        record("adapter %r is refused", NASTY),
        record(f"adapter {NASTY} is refused"),
        record("adapter %(name)s is refused", {"name": NASTY}),
        record("refused: %s", ValueError(NASTY)),
        record("%d of %s, %.1f", 3, [NASTY], 0.5),
        record("no place for it", NASTY),
        record("a %d", NASTY),
    ],
)
def test_what_a_client_sends_stays_on_its_line(formatter: logging.Formatter, made: logging.LogRecord) -> None:
    text = formatter.format(made)
    assert text.isprintable()
    assert len(text.splitlines()) == 1
    assert "forged" in text
    assert "end" in text


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_traceback_forges_no_line(formatter: logging.Formatter) -> None:
    def failed() -> Exception:
        try:
            raise ValueError(NASTY)
        except ValueError as error:
            return error

    first, *others = formatter.format(record("%s failed", NASTY, error=failed())).splitlines()
    assert first.isprintable()
    for line in others:
        assert line.isprintable()
        assert line.startswith("    ")
    if isinstance(formatter, TextFormatter):
        assert "    Traceback (most recent call last):" in others


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_lines_have_a_length(formatter: logging.Formatter) -> None:
    """3 MB of a name, of a message, of an exception's text, and of its lines."""
    huge = "n" * 3_000_000
    for made in (
        record("adapter %s", huge),
        record("adapter %r", huge),
        record(huge),
        record("%s" * 9, *[huge] * 9),
        record("failed", error=ValueError(huge)),
        record("failed", error=ValueError("\n" * 1_000_000)),
    ):
        text = formatter.format(made)
        assert len(text) < 30_000
    assert "(3000000 characters)" in formatter.format(record("adapter %s", huge))


async def test_what_clients_name_is_cut_in_the_line_of_a_request() -> None:
    made = context()
    made.model, made.path = NASTY * 100_000, f"/{NASTY * 100_000}"
    text = JsonFormatter().format(access_record(made))
    assert text.isprintable()
    assert len(text) < 2_000


def access_record(made: RequestContext) -> logging.LogRecord:
    with patch.object(access_logger, "info") as info, patch.object(access_logger, "isEnabledFor", return_value=True):
        log_access(made)
    message, *args = info.call_args.args
    found = record(message, *args)
    found.__dict__.update(info.call_args.kwargs["extra"])
    return found


def test_what_a_thread_ends_with_is_a_line_of_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own way is to write it to stderr, with whatever is in it."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    set_up(LogFormat.text)  # the handlers are pytest's: there are some already

    def fail() -> None:
        raise ValueError("of two\nlines")

    thread = threading.Thread(target=fail, name="worker")
    thread.start()
    thread.join()
    [found] = caplog.records
    assert "worker" in found.getMessage()
    assert found.exc_info is not None


def test_a_traceback_is_one_line_of_json() -> None:
    try:
        raise ValueError("of two\nlines")
    except ValueError as error:
        record = logging.LogRecord(
            "x", logging.ERROR, "", 0, "it %s", ("failed",), (type(error), error, error.__traceback__)
        )
    line = formatted(record)
    assert line["message"] == "it failed"
    assert "ValueError: of two\n    lines" in line["exception"]


async def test_lines_of_refusals_are_few_and_none_is_uncounted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "loraplex.access")
    lines = RefusalLines()
    delays: list[float] = []
    loop = asyncio.get_running_loop()
    real = loop.call_later
    monkeypatch.setattr(
        loop, "call_later", lambda delay, *rest, **named: delays.append(delay) or real(0.0, *rest, **named)
    )
    for number in range(MAX_REFUSALS + 500):
        lines.tell("GET", "/v1/models", 431 if number == MAX_REFUSALS else 401, f"id-{number}")
    await until(lambda: len(caplog.records) > MAX_REFUSALS)
    *told, last = caplog.records
    assert [record.__dict__["fields"]["request_id"] for record in told] == [f"id-{i}" for i in range(MAX_REFUSALS)]
    assert {record.__dict__["fields"]["status"] for record in told} == {401}
    assert last.getMessage() == "more requests refused in the last second: 499 with 401, 1 with 431"
    assert delays[0] == 1.0
    lines.tell("GET", "/health", 401, "id-next")  # a second of its own
    assert caplog.records[-1].__dict__["fields"]["request_id"] == "id-next"


async def test_lines_of_refusals_are_not_the_request_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("loraplex.access")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    loop = asyncio.get_running_loop()
    real = loop.call_later
    monkeypatch.setattr(loop, "call_later", lambda delay, *rest, **named: real(0.0, *rest, **named))
    before = RequestContext("before", "POST", "/", trace_id="of-before")
    with in_request_context(before):
        lines = RefusalLines()
        for _ in range(MAX_REFUSALS + 1):
            lines.tell("GET", "/v1/models", 401, "mine")
    await until(lambda: stream.getvalue().count("\n") > MAX_REFUSALS)
    *told, last = map(json.loads, stream.getvalue().splitlines())
    assert [(line["request_id"], line.get("trace_id")) for line in told] == [("mine", None)] * MAX_REFUSALS
    assert "request_id" not in last


async def test_an_exchange_ends_with_the_last_that_holds_it() -> None:
    ended: list[int] = []
    go_on = asyncio.Event()
    made = RequestContext("r", "POST", "/", on_end=lambda context: ended.append(context.tokens))

    async def in_background() -> None:
        with made.held():
            await go_on.wait()
            made.add(choice("stop", first=None, tokens=5))

    with in_request_context(made):
        task = asyncio.create_task(in_background())  # it has not run when the response is out
    await turns()
    assert ended == []
    go_on.set()
    await task
    await turns()
    assert ended == [5]


@pytest.mark.parametrize("given", ["a", "req-123", "01H.z_9:/+=@-", "x" * 128])
def test_sane_ids_are_kept(given: str) -> None:
    assert request_id(given) == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", "a\nb", "é", '"', "-a", "a;b", "${x}"])
def test_other_ids_are_replaced(given: str | None) -> None:
    made = request_id(given)
    assert made != given
    assert request_id(made) == made
    assert made != request_id(given)
