"""/v1/responses over a scripted engine; the openai package's own types say what an event must look like."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from loraplex.server.api.chat_schemas import Message, TokenLogprob, TopLogprob
from loraplex.server.api.openai.response_store import ResponseStore, StoredResponse
from loraplex.server.api.openai.responses_schemas import OutputMessage, OutputText, ResponseObject
from tests.support.fake_serving import FakeServer, say
from tests.support.waiting import LIMIT, until

URL = "/v1/responses"
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "input": "hi", **fields}


async def create(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json=ask(**fields))
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    OpenAIResponse.model_validate(body, strict=False)
    return body


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Events, each checked against the client's own type, named and numbered as it should be."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENTS.validate_python(event)
        events.append(event)
    return events


async def test_an_answer(client: httpx.AsyncClient, server: FakeServer) -> None:
    body = await create(client, instructions="be brief", metadata={"a": "b"}, temperature=0.5, max_output_tokens=20)
    assert body["id"].startswith("resp_")
    assert (body["status"], body["object"], body["error"], body["model"]) == ("completed", "response", None, "base")
    [message] = body["output"]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    assert message["content"] == [{"type": "output_text", "text": "the answer", "annotations": [], "logprobs": []}]
    assert (body["metadata"], body["temperature"], body["max_output_tokens"]) == ({"a": "b"}, 0.5, 20)
    [request] = server.engine.requests
    assert (request.params.temperature, request.params.max_tokens) == (0.5, 20)
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert list(request.prompt_ids) == server.tokenizer.chat(said)
    tokens = len(server.tokenizer.encode("the answer", False)) + 1
    assert body["usage"]["input_tokens"] == len(request.prompt_ids)
    assert body["usage"]["output_tokens"] == tokens
    assert body["usage"]["total_tokens"] == len(request.prompt_ids) + tokens


async def test_a_stream(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.script = lambda request: say(server.tokenizer, "héllo 😀", request)
    events = events_of(await client.post(URL, json=ask(stream=True)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    text = "".join(event["delta"] for event in events if event["type"].endswith("delta"))
    assert text == events[-4]["text"] == "héllo 😀"
    final = events[-1]["response"]
    assert final["output"][0]["content"][0]["text"] == text
    stored = (await client.get(f"{URL}/{final['id']}")).json()
    assert stored == final


async def test_an_answer_cut_short_is_incomplete(client: httpx.AsyncClient, server: FakeServer) -> None:
    body = await create(client, max_output_tokens=1)
    assert body["status"] == body["output"][0]["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    events = events_of(await client.post(URL, json=ask(stream=True, max_output_tokens=1)))
    assert events[-1]["type"] == "response.incomplete"


async def test_calls(roomy: httpx.AsyncClient, server: FakeServer) -> None:
    client = roomy
    server.engine.script = lambda request: say(server.tokenizer, f"Well.\n{CALL}\n{CALL}", request)
    body = await create(client, tools=[TOOL])
    text, first, second = body["output"]
    assert text["content"][0]["text"] == "Well."
    assert first["call_id"] != second["call_id"]
    for call in (first, second):
        assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "f", {"a": 1})
    assert '"name": "f"' in server.prompt()

    events = events_of(await client.post(URL, json=ask(tools=[TOOL], stream=True)))
    by_item: dict[str, str] = {}
    for event in events:
        if event["type"] == "response.function_call_arguments.delta":
            by_item[event["item_id"]] = by_item.get(event["item_id"], "") + event["delta"]
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert {event["item_id"]: event["arguments"] for event in done} == by_item
    assert len(by_item) == 2
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["message", "function_call", "function_call"]


async def test_a_conversation_goes_on(roomy: httpx.AsyncClient, server: FakeServer) -> None:
    """What came before is there, without its instructions; a call is followed by its result."""
    client = roomy
    server.engine.script = lambda request: say(server.tokenizer, CALL, request)
    first = await create(client, input="one", instructions="first", tools=[TOOL])
    server.engine.script = lambda request: say(server.tokenizer, "so be it", request)
    call_id = first["output"][0]["call_id"]
    result = [{"type": "function_call_output", "call_id": call_id, "output": "42"}]
    second = await create(client, input=result, previous_response_id=first["id"], instructions="second")
    third = await create(client, input="three", previous_response_id=second["id"])
    prompt = server.prompt()
    assert third["previous_response_id"] == second["id"]
    found = [prompt.index(part) for part in ("one", CALL, "42", "so be it", "three")]
    assert found == sorted(found)
    assert "second" in server.prompt(-2)
    assert "first" not in server.prompt(-2)
    # the same, sent whole by a client that keeps the conversation itself
    items = [{"role": "user", "content": "one"}, *first["output"], *result, *second["output"]]
    await create(client, input=[*items, {"role": "user", "content": "three"}], store=False)
    assert server.prompt() == prompt


async def test_thoughts_are_items_of_their_own(server: FakeServer) -> None:
    server.use_template("{% for m in messages %}{{ m.content }}{% endfor %}<think>")
    server.engine.script = lambda request: say(server.tokenizer, "hm the</think>\n\nthe end", request)
    client = server.client()
    body = await create(client)
    streamed = events_of(await client.post(URL, json=ask(stream=True)))
    thought, message = body["output"]
    assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", "hm the")
    assert message["content"][0]["text"] == "the end"
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] == len(server.tokenizer.encode("hm the", False))
    kinds = [event["type"] for event in streamed]
    assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")


async def test_logprobs(client: httpx.AsyncClient, server: FakeServer) -> None:
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    body = await create(client, **fields)
    scores = body["output"][0]["content"][0]["logprobs"]
    assert "".join(score["token"] for score in scores) == "the answer"
    assert [len(score["top_logprobs"]) for score in scores] == [2] * len(scores)
    events = events_of(await client.post(URL, json=ask(stream=True, **fields)))
    streamed = [score for event in events if event["type"].endswith("text.delta") for score in event["logprobs"]]
    assert streamed == scores


async def test_stored_responses_can_be_read_and_deleted(client: httpx.AsyncClient) -> None:
    body = await create(client, input=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    url = f"{URL}/{body['id']}"
    assert (await client.get(url)).json() == body
    items = (await client.get(f"{url}/input_items")).json()
    assert [item["content"] for item in items["data"]] == ["b", "a"]
    assert items["first_id"] == items["data"][0]["id"]
    assert (await client.post(f"{url}/cancel")).status_code == 400  # it was not made in the background
    assert (await client.delete(url)).json() == {"id": body["id"], "object": "response", "deleted": True}
    for response in (await client.get(url), await client.delete(url), await client.get(f"{url}/input_items")):
        assert response.status_code == 404
    gone = await client.post(URL, json=ask(previous_response_id=body["id"]))
    assert (gone.status_code, gone.json()["error"]["param"]) == (400, "previous_response_id")
    unstored = await create(client, store=False)
    assert (await client.get(f"{URL}/{unstored['id']}")).status_code == 404


async def wait_for(client: httpx.AsyncClient, response_id: str, *states: str) -> dict[str, Any]:
    async with asyncio.timeout(LIMIT):
        while (body := (await client.get(f"{URL}/{response_id}")).json())["status"] not in states:
            await asyncio.sleep(0.001)
    OpenAIResponse.model_validate(body)
    result: dict[str, Any] = body
    return result


async def test_in_the_background(client: httpx.AsyncClient) -> None:
    body = await create(client, background=True)
    assert (body["status"], body["background"], body["output"]) == ("queued", True, [])
    done = await wait_for(client, body["id"], "completed")
    assert done["output"][0]["content"][0]["text"] == "the answer"
    assert (await client.post(f"{URL}/{body['id']}/cancel")).json()["status"] == "completed"  # too late


async def test_cancelling(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.gate.clear()
    first, second = [await create(client, background=True) for _ in range(2)]
    await until(lambda: len(server.engine.open) == 2)
    cancelled = (await client.post(f"{URL}/{first['id']}/cancel")).json()
    assert cancelled["status"] == "cancelled"
    early = await client.post(URL, json=ask(previous_response_id=second["id"]))
    assert (early.status_code, early.json()["error"]["param"]) == (400, "previous_response_id")
    assert (await client.delete(f"{URL}/{second['id']}")).status_code == 200
    assert len(server.engine.aborted) == 2
    assert not server.engine.open


async def test_failures(client: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.break_off(RuntimeError("secret detail"), after=1)
    response = await client.post(URL, json=ask(stream=True))
    events = events_of(response)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1]["response"]["error"]["code"] == "server_error"
    assert "secret" not in response.text
    assert (await client.post(URL, json=ask())).status_code == 500
    body = await create(client, background=True)
    failed = await wait_for(client, body["id"], "failed")
    assert "secret" not in json.dumps(failed)
    server.engine.break_off(RuntimeError("secret detail"))
    assert (await client.post(URL, json=ask(stream=True))).status_code == 500  # nothing was sent: a status tells


async def test_log_probabilities_take_room_in_the_store(client: httpx.AsyncClient) -> None:
    """8,000 tokens with 20 likeliest ones each are 80 MB as they are kept, and 40 kB of text."""
    template = ResponseObject.model_validate(await create(client))
    store = ResponseStore(max_chars=60_000)
    top = TopLogprob(token="a", logprob=-1.0, bytes=[97])
    score = TokenLogprob(token="a", logprob=-1.0, bytes=[97], top_logprobs=[top] * 20)

    def stored(name: str) -> StoredResponse:
        text = OutputText(text="a" * 5, logprobs=[score] * 5)
        output = [OutputMessage(id="m", content=[text])]
        return StoredResponse(template.model_copy(update={"id": name, "output": output}), [])

    store.put(stored("a"))
    assert store.get("a")
    store.put(stored("b"))
    assert (store.get("a"), store.get("b") is not None) == (None, True)


async def test_the_store_is_bounded(client: httpx.AsyncClient) -> None:
    template = ResponseObject.model_validate(await create(client))
    store = ResponseStore(max_responses=3, max_chars=10_000)

    def stored(name: str, text: str = "") -> StoredResponse:
        response = template.model_copy(update={"id": name})
        return StoredResponse(response, [], [Message(role="user", content=text)])

    for name in "abc":
        store.put(stored(name))
    assert store.get("a")
    store.put(stored("d"))
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]
    store.put(stored("e", "x" * 9_850))
    assert [name for name in "acde" if store.get(name)] == ["e"]
    store.pop("e")
    store.put(stored("f", "x" * 9_000))
    assert store.get("f")
