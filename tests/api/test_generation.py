"""Chat and completions over a scripted engine: what is asked of the engine, and what its tokens become."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from loraplex.server.api.merge import merge
from loraplex.server.engine.request import ContextTooLong, FinishReason, SamplingParams, TokenEvent
from loraplex.server.text.generation_defaults import GenerationDefaults
from tests.support.asking import CHAT, COMPLETIONS, body_of, chat, completion, events_of
from tests.support.fake_serving import EOS_ID, MAX_MODEL_LEN, FakeServer, say


async def test_chat_answer(client: httpx.AsyncClient, server: FakeServer) -> None:
    response = await client.post(CHAT, json=chat(model="alias"))
    assert response.status_code == 200
    body = response.json()
    [request] = server.engine.requests
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "chat.completion",
        "model": "alias",
        "system_fingerprint": None,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "the answer", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(request.prompt_ids),
            "completion_tokens": len(server.tokenizer.encode("the answer", False)) + 1,
            "total_tokens": len(request.prompt_ids) + len(server.tokenizer.encode("the answer", False)) + 1,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert list(request.prompt_ids) == server.tokenizer.chat([{"role": "user", "content": "hi"}])


async def test_completion_answer(client: httpx.AsyncClient, server: FakeServer) -> None:
    body = (await client.post(COMPLETIONS, json=completion(max_tokens=2))).json()
    [request] = server.engine.requests
    assert list(request.prompt_ids) == server.tokenizer.encode("hi")
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    ids = server.tokenizer.encode("the answer", False)[:2]
    expected = {"index": 0, "text": server.tokenizer.decode(ids), "logprobs": None, "finish_reason": "length"}
    assert body["choices"] == [{**expected, "stop_reason": None}]
    assert body["usage"]["completion_tokens"] == 2


async def test_every_sampling_field_reaches_the_engine(client: httpx.AsyncClient, server: FakeServer) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": -1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": -100, "6": 2.5},
        "stop_token_ids": [9],
        "min_tokens": 3,
        "max_tokens": 8,
        "logprobs": 2,
    }
    assert (await client.post(COMPLETIONS, json=completion(**fields))).status_code == 200
    assert server.engine.requests[0].params == SamplingParams(
        max_tokens=8,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=2**64 - 1,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias=((5, -100.0), (6, 2.5)),
        logprobs=2,
        stop_token_ids=frozenset({EOS_ID, 9}),
        min_tokens=3,
    )


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_null_means_not_given(client: httpx.AsyncClient, server: FakeServer, route: str) -> None:
    body = body_of(route)
    names = [
        *("max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "stream", "stop"),
        *("frequency_penalty", "repetition_penalty", "logit_bias", "stop_token_ids", "ignore_eos", "min_tokens"),
        *("logprobs", "top_logprobs", "stream_options", "user", "metadata", "response_format", "tools", "best_of"),
        *("echo", "suffix", "tool_choice", "parallel_tool_calls", "guided_json", "structured_outputs", "grammar"),
    ]
    response = await client.post(route, json={**body, **dict.fromkeys(names)})
    assert response.status_code == 200, response.text
    await client.post(route, json=body)
    first, second = (request.params for request in server.engine.requests)
    assert {**vars(first), "seed": 0} == {**vars(second), "seed": 0}


async def test_defaults_of_max_tokens(client: httpx.AsyncClient, server: FakeServer) -> None:
    await client.post(COMPLETIONS, json=completion())
    await client.post(CHAT, json=chat())
    await client.post(CHAT, json=chat(max_tokens=3, max_completion_tokens=5))
    await client.post(COMPLETIONS, json=completion(max_tokens=10_000))
    first, second, third, fourth = server.engine.requests
    assert first.params.max_tokens == 16
    assert second.params.max_tokens == MAX_MODEL_LEN - len(second.prompt_ids)
    assert third.params.max_tokens == 5
    assert fourth.params.max_tokens == MAX_MODEL_LEN - len(fourth.prompt_ids)


async def test_the_checkpoints_defaults_fill_in(client: httpx.AsyncClient, server: FakeServer) -> None:
    object.__setattr__(server.defaults, "temperature", 0.6)
    for name, value in (("top_k", 20), ("top_p", 0.95), ("min_p", 0.05), ("repetition_penalty", 1.1)):
        object.__setattr__(server.defaults, name, value)
    assert server.defaults == GenerationDefaults((EOS_ID,), 0.6, 0.95, 20, 0.05, 1.1)
    await client.post(COMPLETIONS, json=completion())
    await client.post(COMPLETIONS, json=completion(temperature=0, top_k=-1))
    first, second = (request.params for request in server.engine.requests)
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.95, 20)
    assert (first.min_p, first.repetition_penalty) == (0.05, 1.1)
    assert (second.temperature, second.top_p, second.top_k) == (0, 0.95, 0)


async def test_ignore_eos_takes_only_the_checkpoints_stops_away(client: httpx.AsyncClient, server: FakeServer) -> None:
    await client.post(COMPLETIONS, json=completion(ignore_eos=True, stop_token_ids=[7]))
    assert server.engine.requests[0].params.stop_token_ids == frozenset({7})


async def test_seeds(client: httpx.AsyncClient, server: FakeServer) -> None:
    """Choices differ from each other and repeat; without a seed every request draws another one."""
    for _ in range(2):
        await client.post(COMPLETIONS, json=completion(seed=2**64 - 1, n=3))
        await client.post(COMPLETIONS, json=completion())
    seeds = [request.params.seed for request in server.engine.requests]
    assert seeds[:3] == seeds[4:7] == [2**64 - 1, 0, 1]
    assert seeds[3] != seeds[7]


async def test_prompt_forms(client: httpx.AsyncClient, server: FakeServer) -> None:
    encode = server.tokenizer.encode
    for prompt, expected in [
        ("hi", [encode("hi")]),
        (["hi", "there"], [encode("hi"), encode("there")]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["hi", [7]], [encode("hi"), [7]]),
    ]:
        server.engine.requests.clear()
        body = (await client.post(COMPLETIONS, json=completion(prompt=prompt))).json()
        assert [list(request.prompt_ids) for request in server.engine.requests] == expected
        assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
        assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    await client.post(COMPLETIONS, json=completion(prompt="hi", add_special_tokens=False))
    assert list(server.engine.requests[-1].prompt_ids) == encode("hi", add_special_tokens=False)


async def test_choices_of_several_prompts_keep_their_order(client: httpx.AsyncClient, server: FakeServer) -> None:
    answers = iter(["zero", "one", "two", "three"])
    server.engine.script = lambda request: say(server.tokenizer, next(answers), request)
    body = (await client.post(COMPLETIONS, json=completion(prompt=["a", "b"], n=2))).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "zero"), (1, "one"), (2, "two"), (3, "three")]
    assert body["usage"]["prompt_tokens"] == len(server.tokenizer.encode("a")) + len(server.tokenizer.encode("b"))


async def test_content_parts_and_roles(client: httpx.AsyncClient, server: FakeServer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts, "name": "me"}]
    assert (await client.post(CHAT, json=chat(messages=messages))).status_code == 200
    expected = [{"role": "system", "content": "d"}, {"role": "user", "content": "one\ntwo"}]
    assert list(server.engine.requests[0].prompt_ids) == server.tokenizer.chat(expected)
    await client.post(CHAT, json=chat(messages=messages, add_generation_prompt=False))
    assert list(server.engine.requests[1].prompt_ids) == server.tokenizer.chat(expected, add_generation_prompt=False)


async def test_long_prompts_are_encoded_all_the_same(roomy: httpx.AsyncClient, server: FakeServer) -> None:
    """They go through a thread."""
    text = "<|im_end|>" * 420  # 4200 characters
    response = await roomy.post(COMPLETIONS, json=completion(prompt=text))
    assert response.status_code == 200
    assert list(server.engine.requests[0].prompt_ids) == server.tokenizer.encode(text)


async def test_a_stop_string_ends_the_answer_and_the_work(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.script = lambda request: say(server.tokenizer, "one STOP two three four", request)
    response = await client.post(COMPLETIONS, json=completion(stop=["STOP", "no"], max_tokens=40))
    [choice] = response.json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", "STOP")
    assert server.engine.aborted == [server.engine.requests[0].request_id]
    response = await client.post(
        COMPLETIONS, json=completion(stop="STOP", include_stop_str_in_output=True, max_tokens=40)
    )
    assert response.json()["choices"][0]["text"] == "one STOP"


async def test_stop_tokens_are_not_shown(client: httpx.AsyncClient, server: FakeServer) -> None:
    letter = server.tokenizer.encode("q", False)[0]
    server.engine.script = lambda request: say(server.tokenizer, "one q two", request)
    response = await client.post(COMPLETIONS, json=completion(stop_token_ids=[letter], skip_special_tokens=False))
    [choice] = response.json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", letter)


async def test_special_tokens_are_skipped_unless_asked_for(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.script = lambda request: say(server.tokenizer, "a<|im_end|>b", request)
    assert (await client.post(COMPLETIONS, json=completion())).json()["choices"][0]["text"] == "ab"
    shown = await client.post(COMPLETIONS, json=completion(skip_special_tokens=False))
    assert shown.json()["choices"][0]["text"] == "a<|im_end|>b"


# ------------------------------------------------------------------------------------------------------- streaming


async def test_chat_stream(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.script = lambda request: say(server.tokenizer, "héllo 😀 END", request)
    response = await client.post(
        CHAT, json=chat(stream=True, stop="END", max_tokens=40, stream_options={"include_usage": True})
    )
    chunks = events_of(response)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    first, *middle, last, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in [first, *middle])
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in [*middle, last])
    assert text == "héllo 😀 "
    assert all("\ufffd" not in chunk["choices"][0]["delta"].get("content", "") for chunk in middle)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + usage["usage"]["completion_tokens"]


async def test_streams_without_usage_do_not_mention_it(client: httpx.AsyncClient) -> None:
    for route, body in ((CHAT, chat()), (COMPLETIONS, completion())):
        chunks = events_of(await client.post(route, json={**body, "stream": True}))
        assert all("usage" not in chunk for chunk in chunks)
        assert all(chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_a_stream_says_what_the_whole_says(client: httpx.AsyncClient, server: FakeServer, route: str) -> None:
    answers = ["the first €", "and then the other", "in the end"]
    count = iter(range(100))
    server.engine.script = lambda request: say(server.tokenizer, answers[next(count) % 3], request)
    logprobs = {"logprobs": True, "top_logprobs": 2} if route == CHAT else {"logprobs": 2}
    body = body_of(route, n=3, max_tokens=30, stop=["end"], **logprobs)
    whole = (await client.post(route, json=body)).json()["choices"]
    pieces = events_of(await client.post(route, json={**body, "stream": True}))
    for choice in whole:
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        scored = [piece["logprobs"] for piece in own if piece["logprobs"] is not None]
        if route == CHAT:
            assert "".join(p["delta"].get("content", "") for p in own) == choice["message"]["content"]
            assert [entry for part in scored for entry in part["content"]] == choice["logprobs"]["content"]
            assert sum(p["delta"].get("role") == "assistant" for p in own) == 1
        else:
            assert "".join(p["text"] for p in own) == choice["text"]
            for name, values in choice["logprobs"].items():
                assert [value for part in scored for value in part[name]] == values


async def test_an_error_before_the_first_token_has_a_status(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.break_off(ContextTooLong("no room"))
    response = await client.post(CHAT, json=chat(stream=True))
    assert (response.status_code, response.json()["error"]["message"]) == (400, "no room")


async def test_an_error_after_the_first_token_is_an_event(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.break_off(RuntimeError("secret detail"), after=1)
    response = await client.post(CHAT, json=chat(stream=True))
    assert response.status_code == 200
    events = events_of(response)
    assert "the".startswith(events[1]["choices"][0]["delta"]["content"])
    assert events[-1]["error"]["type"] == "server_error"
    assert "secret" not in response.text
    whole = await client.post(CHAT, json=chat())
    assert whole.status_code == 500
    assert "secret" not in whole.text


async def test_a_grammar_that_gives_up_is_told(client: httpx.AsyncClient, server: FakeServer) -> None:
    """Its answer has ended where it should not: no one may take it for whole."""

    def give_up(request: Any) -> list[TokenEvent]:
        request.constraint.allowed([5, 5])  # not what it allows
        return say(server.tokenizer, "ab", request)

    server.engine.script = give_up
    body = completion(guided_regex="[ab]+")
    whole = await client.post(COMPLETIONS, json=body)
    assert (whole.status_code, whole.json()["error"]["code"]) == (400, "grammar_failed")
    assert whole.json()["error"]["param"] == "guided_regex"
    events = events_of(await client.post(COMPLETIONS, json={**body, "stream": True}))
    assert events[-1]["error"]["code"] == "grammar_failed"
    assert not any(event["choices"][0]["finish_reason"] for event in events[:-1])


# -------------------------------------------------------------------------------------------------------- logprobs


async def test_chat_logprobs(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.script = lambda request: say(server.tokenizer, "a€", request)
    body = (await client.post(CHAT, json=chat(logprobs=True, top_logprobs=2))).json()
    content = body["choices"][0]["logprobs"]["content"]
    ids = server.tokenizer.encode("a€", False)
    assert [entry["logprob"] for entry in content] == [-0.25 * (i + 1) for i in range(len(ids))]  # none for the stop
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "a€".encode()
    assert content[0]["token"] == "a"
    assert content[1]["token"] == "\ufffd"  # a part of the character
    assert [[t["logprob"] for t in entry["top_logprobs"]] for entry in content] == [[-0.5, -1.0]] * len(ids)
    assert content[0]["top_logprobs"][0]["token"] == server.tokenizer.token_text(10)
    plain = (await client.post(CHAT, json=chat(logprobs=True))).json()
    assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert (await client.post(CHAT, json=chat())).json()["choices"][0]["logprobs"] is None


async def test_completion_logprobs(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.script = lambda request: say(server.tokenizer, "ab cd STOP", request)
    body = (await client.post(COMPLETIONS, json=completion(logprobs=1, stop="STOP", max_tokens=30))).json()
    choice = body["choices"][0]
    parts = choice["logprobs"]
    assert choice["text"] == "ab cd "
    assert "".join(parts["tokens"]) == "ab cd "  # the tokens a stop string cut off are gone with it
    offsets = [len("".join(parts["tokens"][:i])) for i in range(len(parts["tokens"]))]
    assert parts["text_offset"] == offsets
    assert parts["token_logprobs"] == [-0.25 * (i + 1) for i in range(len(offsets))]
    drawn_and_top = [{server.tokenizer.token_text(10), token} for token in parts["tokens"]]
    assert [set(top) for top in parts["top_logprobs"]] == drawn_and_top
    zero = (await client.post(COMPLETIONS, json=completion(logprobs=0))).json()["choices"][0]["logprobs"]
    assert [list(top) for top in zero["top_logprobs"]] == [[token] for token in zero["tokens"]]


async def test_minus_infinity_is_sent_as_a_number(client: httpx.AsyncClient, server: FakeServer) -> None:
    def impossible(request: Any) -> list[TokenEvent]:
        return [TokenEvent(request.request_id, 9, float("-inf"), ((8, float("-inf")),), FinishReason.LENGTH)]

    server.engine.script = impossible
    body = (await client.post(CHAT, json=chat(logprobs=True, top_logprobs=1))).json()
    assert body["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


# --------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", ["pirate", "base:pirate", "alias:pirate"])
async def test_the_model_field_picks_the_adapter(client: httpx.AsyncClient, server: FakeServer, name: str) -> None:
    version = await server.adapters.register("pirate", "/adapters/pirate")
    body = (await client.post(CHAT, json=chat(model=name, n=2))).json()
    assert body["model"] == name
    for request in server.engine.requests:
        [(lease, weight)] = request.mix
        assert (lease.version, weight) == (version, 1.0)
    assert server.adapters.registry.leases(version) == 0


async def test_the_base_wears_nothing(client: httpx.AsyncClient, server: FakeServer) -> None:
    await server.adapters.register("pirate", "/adapters/pirate")
    await client.post(CHAT, json=chat())
    assert server.engine.requests[0].mix == ()


async def test_leases_are_given_back_whatever_fails(client: httpx.AsyncClient, server: FakeServer) -> None:
    version = await server.adapters.register("pirate", "/adapters/pirate")
    failing = [
        chat(model="pirate", messages=[{"role": "user", "content": "x" * 500}]),
        chat(model="pirate", logit_bias={"9999": 1}),
        chat(model="pirate", n=3, stop="answer"),
    ]
    for body in failing:
        await client.post(CHAT, json=body)
        assert server.adapters.registry.leases(version) == 0
    server.engine.refusal = ContextTooLong("no room")
    response = await client.post(CHAT, json=chat(model="pirate", n=3))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    assert server.adapters.registry.leases(version) == 0
    assert not server.engine.open


# ------------------------------------------------------------------------------- what clients send in so many forms


async def test_top_p_of_nothing_is_greedy(client: httpx.AsyncClient, server: FakeServer) -> None:
    """OpenAI's range includes 0."""
    for route, body in ((COMPLETIONS, completion(top_p=0, temperature=1.5)), (CHAT, chat(top_p=0.0))):
        assert (await client.post(route, json=body)).status_code == 200
    assert [(r.params.temperature, r.params.top_p) for r in server.engine.requests] == [(0.0, 1.0)] * 2


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_no_name_is_the_base(client: httpx.AsyncClient, server: FakeServer, route: str) -> None:
    body = body_of(route, model="")
    answer = (await client.post(route, json=body)).json()
    assert answer["model"] == "base"
    assert server.engine.requests[0].mix == ()
    await server.adapters.register("sql", "/adapters/sql")
    assert (await client.post(route, json={**body, "adapter_id": "sql"})).status_code == 200
    [(lease, _)] = server.engine.requests[1].mix
    assert lease.version.name == "sql"


async def test_a_stop_string_that_is_a_special_token(client: httpx.AsyncClient, server: FakeServer) -> None:
    """It is skipped in the text, and still ends it."""
    server.engine.script = lambda request: say(server.tokenizer, "one<|im_end|>two three", request)
    for more, text in (({}, "one"), ({"include_stop_str_in_output": True}, "one<|im_end|>")):
        answer = await client.post(COMPLETIONS, json=completion(stop=["STOP", "<|im_end|>"], max_tokens=40, **more))
        [choice] = answer.json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", "<|im_end|>")
    assert len(server.engine.aborted) == 2
    shown = await client.post(COMPLETIONS, json=completion(stop="<|im_end|>", max_tokens=40, skip_special_tokens=False))
    assert shown.json()["choices"][0]["text"] == "one"


async def test_what_earlier_answers_may_hold(client: httpx.AsyncClient, server: FakeServer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "null"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "refusal": "I will not."},
        {"role": "user", "content": "the time"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    answer = await client.post("/tokenize", json={"model": "base", "messages": messages})
    assert answer.status_code == 200, answer.text
    said = {"role": "assistant", "content": "I will not."}
    empty = {**call, "function": {"name": "now", "arguments": "{}"}}
    same = [messages[0], said, messages[2], {**messages[3], "tool_calls": [empty]}]
    assert answer.json()["tokens"] == (await client.post("/tokenize", json={"messages": same})).json()["tokens"]


async def test_tools_that_may_not_be_called_are_not_counted(client: httpx.AsyncClient) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    plain, with_tool, none = [
        (await client.post("/tokenize", json={**body, **more})).json()["count"]
        for more in ({}, {"tools": [tool]}, {"tools": [tool], "tool_choice": "none"})
    ]
    assert plain == none < with_tool


async def test_many_answers_do_not_begin_in_one_turn() -> None:
    """1,000 that did stopped the event loop for 0.3 s."""
    turn, began = 0, Counter[int]()

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def answer(number: int) -> AsyncGenerator[int, None]:
        began[turn] += 1
        yield number

    counting = asyncio.create_task(count())
    assert sorted([number async for number in merge([answer(i) for i in range(200)])]) == list(range(200))
    counting.cancel()
    assert max(began.values()) <= 32
