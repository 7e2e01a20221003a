"""The client and the ledger: what each way in which a server can answer, or fail to, is entered as."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from loraplex.benchmarks.load import Address, Reply, Request, call, closed_loop, send
from loraplex.benchmarks.many.ledger import End, Ledger, Lost, end_of
from tests.support.answering import HEAD, answering, body_of

DONE = b"data: [DONE]\n\n"


def event(text: str = "a", finish: str | None = None, usage: Any = None) -> bytes:
    choices = [{"index": 0, "text": text, "finish_reason": finish}]
    body = {"choices": [] if usage else choices, "usage": {"completion_tokens": usage} if usage else None}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def whole(status: str, body: object, **headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(content)}", *(f"{k}: {v}" for k, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + content


ERROR = b'data: {"error":{"message":"the adapter is gone","type":"x","param":null,"code":null}}\n\n'
LAST = event("b", "length")

ANSWERS: dict[str, tuple[bytes, End | str]] = {
    "finished": (HEAD + event() + event('"finish_reason":"stop"') + LAST + event(usage=3) + DONE, End.FINISHED),
    "stopped at once": (HEAD + event("", "stop") + event(usage=1) + DONE, End.FINISHED),
    "ended by the server": (HEAD + event() + event("", "abort") + DONE, End.CANCELLED),
    "failed": (HEAD + event() + ERROR + DONE, End.FAILED),
    "refused": (whole("404 Not Found", {"error": {"message": "no such model"}}), End.REFUSED),
    "in one piece": (
        whole("200 OK", {"choices": [{"finish_reason": "stop", "text": "x"}], "usage": {"completion_tokens": 2}}),
        End.FINISHED,
    ),
    "nothing": (b"", "no answer"),
    "not HTTP": (b"\x00\x01\r\n\r\n", "no answer"),
    "broken off": (HEAD + event(), "broke off after 1 events"),
    "broken off after its end": (HEAD + LAST, "broke off"),
    "no finish": (HEAD + event() + DONE, "no finish_reason"),
    "two ends": (HEAD + LAST + LAST + DONE, "more than once"),
    "an end and an error": (HEAD + LAST + ERROR + DONE, "more than once"),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_each_answer_has_one_end_or_is_lost(name: str) -> None:
    answer, expected = ANSWERS[name]
    async with answering(answer) as address:
        reply = await send(address, Request("m", [1, 2], 3))
    if isinstance(expected, End):
        assert end_of(reply) is expected
        return
    with pytest.raises(Lost, match=expected):
        end_of(reply)
    ledger = Ledger()
    assert ledger.add("ask", reply) is None
    assert ledger.violations == {"ask": 1}


async def test_what_is_measured_of_a_stream() -> None:
    async with answering(ANSWERS["finished"][0]) as address:
        reply = await send(address, Request("m", [1], 3))
    assert reply.ok
    assert (len(reply.arrivals), len(reply.gaps), reply.tokens, reply.finishes) == (3, 2, 3, ["length"])
    assert reply.first > 0


async def test_leaving_before_and_after_events() -> None:
    request = Request("m", [1], 3)
    for events in (0, 2):

        def enough(reply: Reply, events: int = events) -> bool:
            return len(reply.arrivals) >= events

        async with answering(ANSWERS["finished"][0]) as address:
            reply = await send(address, request, enough)
        assert end_of(reply) is End.CANCELLED
        assert len(reply.arrivals) == events


async def test_a_request_says_what_is_wanted() -> None:
    bodies: list[dict[str, Any]] = []
    async with answering(ANSWERS["in one piece"][0], bodies) as address:
        await send(address, Request("m", "hi", 3, {"stream": False, "temperature": 1}))
    assert bodies == [
        {"model": "m", "prompt": "hi", "max_tokens": 3, "temperature": 1, "ignore_eos": True, "stream": False}
    ]


async def test_a_closed_loop_has_so_many_under_way_and_stops_at_an_error() -> None:
    running = most = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        body = await body_of(reader)
        await asyncio.sleep(0)
        writer.write(ANSWERS["finished" if body["model"] == "m" else "refused"][0])
        running -= 1
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        outcome = await closed_loop(address, [Request("m", [1], 3)] * 10, 4)
        assert [reply.ok for reply in outcome.replies] == [True] * 10
        assert outcome.tokens_per_second == pytest.approx(30 / outcome.seconds)
        assert most == 4
        with pytest.raises(RuntimeError, match="other: status 404"):
            await closed_loop(address, [Request("m", [1], 3), Request("other", [1], 3)], 1)
        assert await call(address, "POST", "/any", {"model": "m"}) == (
            200,
            ANSWERS["finished"][0][len(HEAD) :].decode(),
        )


def test_statuses_are_held_against_what_was_expected() -> None:
    ledger = Ledger()
    ledger.add("unknown", Reply("m", 0, status=404, error="no"), (404,))
    ledger.add("burst", Reply("m", 0, status=429, retry_after="3", error="busy"))
    assert not ledger.violations
    ledger.add("burst", Reply("m", 0, status=429, error="busy"))
    ledger.add("burst", Reply("m", 0, status=429, retry_after="0", error="busy"))
    ledger.add("stream", Reply("m", 0, status=503, error="engine dead"))
    assert ledger.violations == {"burst": 2, "stream": 1}
    assert ledger.ends == {End.REFUSED: 5}
    assert "503" in ledger.told[-1]


def _ended(**reasons: int) -> dict[str, float]:
    return {f"vllm:request_success_total:{reason}": float(count) for reason, count in reasons.items()}


def test_counters_must_agree_with_the_clients() -> None:
    done = Reply("m", 0, 200, arrivals=[1.0], finishes=["stop"], done=True)
    left = Reply("m", 0, 200, arrivals=[1.0], cut=True)
    unseen = Reply("m", 0, 0, cut=True)
    failed = Reply("m", 0, 200, arrivals=[1.0], error="gone", done=True)

    def agree(**reasons: int) -> bool:
        ledger = Ledger()
        for reply in (done, done, left, unseen, failed):
            ledger.add("any", reply)
        ledger.add("refused", Reply("m", 0, 404, error="no"), (404,))
        ledger.compare(_ended(**reasons))
        return not ledger.violations

    assert agree(stop=2, abort=1, error=1)  # the unseen one never came
    assert agree(stop=1, length=1, abort=2, error=1)
    assert agree(stop=2, length=2, error=2)  # both who left were answered; the refused one was queued first
    assert not agree(stop=1, abort=3, error=1)  # a client has an answer that the server does not count
    assert not agree(stop=5, error=1)  # more than the clients asked for
    assert not agree(stop=2, abort=1)  # the failed one is missing
    assert not agree(stop=2, abort=4, error=1)  # ended twice

    for counted, right in ((0, False), (1, True), (2, True), (3, False)):
        ledger = Ledger()
        ledger.add("burst", Reply("m", 0, status=429, retry_after="3", error="busy"))
        ledger.add("leave", unseen)
        ledger.compare({"loraplex:requests_refused_total": counted})
        assert bool(ledger.violations) is not right
