"""LiteLLM's OpenAI-compatible provider against the demo base and the example adapters: api_base and api_key alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
import pytest

MESSAGES = [{"role": "user", "content": "Which city is the capital of Italy?"}]
REVIEW = [{"role": "user", "content": "Awful. It broke on the first day and nobody answered my calls."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def server(url: str, key: str) -> dict[str, Any]:
    """Arguments of every call."""
    return {"api_base": f"{url}/v1", "api_key": key, "max_retries": 0, "timeout": 60}


@pytest.fixture
def greedy(server: dict[str, Any]) -> dict[str, Any]:
    return {**server, "temperature": 0, "max_tokens": 40}


def test_completion(greedy: dict[str, Any]) -> None:
    answer = litellm.completion("openai/pirate", MESSAGES, **greedy)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens
    assert litellm.completion("openai/sentiment", REVIEW, **greedy).choices[0].message.content.strip() == "negative"


def test_streams(greedy: dict[str, Any]) -> None:
    whole = litellm.completion("openai/pirate", MESSAGES, **greedy)
    chunks = list(
        litellm.completion("openai/pirate", MESSAGES, stream=True, stream_options={"include_usage": True}, **greedy)
    )
    assert len(chunks) > 5
    rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content
    assert rebuilt.choices[0].finish_reason == whole.choices[0].finish_reason
    assert rebuilt.usage.completion_tokens == whole.usage.completion_tokens


def test_async(greedy: dict[str, Any]) -> None:
    async def both() -> tuple[str, str]:
        whole = await litellm.acompletion("openai/pirate", MESSAGES, **greedy)
        stream = await litellm.acompletion("openai/pirate", MESSAGES, stream=True, **greedy)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(parts)

    whole, streamed = asyncio.run(both())
    assert whole == streamed


def test_batch(greedy: dict[str, Any]) -> None:
    asked = [[{"role": "user", "content": f"What is {n} plus {n}?"}] for n in range(5)]
    together = litellm.batch_completion("openai/pirate", asked, **greedy)
    alone = [litellm.completion("openai/pirate", each, **greedy) for each in asked]
    texts = [answer.choices[0].message.content for answer in together]
    assert texts == [answer.choices[0].message.content for answer in alone]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools(greedy: dict[str, Any], choice: Any) -> None:
    options = {**greedy, "max_tokens": 80, "tools": [WEATHER], "tool_choice": choice}
    options["parallel_tool_calls"] = False  # or a model this small goes on calling
    asked = [{"role": "user", "content": "How warm is it in Paris, in celsius?"}]
    answer = litellm.completion("openai/demo", asked, **options)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"}
    chunks = list(litellm.completion("openai/demo", asked, stream=True, **options))
    (streamed,) = litellm.stream_chunk_builder(chunks, messages=asked).choices[0].message.tool_calls
    assert json.loads(streamed.function.arguments) == arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}
    history = [*asked, answer.choices[0].message, result]
    after = litellm.completion("openai/demo", history, **{**options, "tool_choice": "none"})
    assert after.choices[0].message.content


def test_a_schema(greedy: dict[str, Any]) -> None:
    schema = WEATHER["function"]["parameters"]  # type: ignore[index]
    form = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": schema}}
    answer = litellm.completion("openai/demo", MESSAGES, response_format=form, **{**greedy, "max_tokens": 120})
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "unit"}


def test_text_completion(greedy: dict[str, Any]) -> None:
    options = {**greedy, "max_tokens": 12}
    answer = litellm.text_completion(model="text-completion-openai/sql", prompt="SELECT name FROM", **options)
    assert answer.choices[0].text
    parts = litellm.text_completion(
        model="text-completion-openai/sql", prompt="SELECT name FROM", stream=True, **options
    )
    assert "".join(part.choices[0].text or "" for part in parts) == answer.choices[0].text


def test_embeddings(server: dict[str, Any]) -> None:
    answer = litellm.embedding("openai/demo", ["a cat on a mat", "the invoice is overdue"], **server)
    vectors = [each["embedding"] for each in answer.data]
    assert [len(vector) for vector in vectors] == [576, 576]
    assert vectors[0] != vectors[1]
    assert sum(value * value for value in vectors[0]) == pytest.approx(1.0, abs=1e-3)
    assert answer.usage.prompt_tokens > 5


def test_the_responses_api(greedy: dict[str, Any]) -> None:
    options = {**{name: value for name, value in greedy.items() if name != "max_tokens"}, "max_output_tokens": 40}
    answer = litellm.responses(model="openai/pirate", input=MESSAGES[0]["content"], **options)
    said = litellm.completion("openai/pirate", MESSAGES, **greedy).choices[0].message.content
    assert answer.output[0].content[0].text == said


@pytest.mark.parametrize(
    ("model", "options", "error"),
    [
        ("nobody", {}, litellm.NotFoundError),
        ("demo", {"temperature": -1}, litellm.BadRequestError),
        ("demo", {"max_tokens": 0}, litellm.BadRequestError),
        ("demo", {"api_key": "wrong"}, litellm.AuthenticationError),
        ("demo", {"messages": [{"role": "user", "content": "word " * 20_000}]}, litellm.ContextWindowExceededError),
    ],
)
def test_errors_are_the_ones_that_they_are(
    greedy: dict[str, Any], model: str, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        litellm.completion(f"openai/{model}", **{"messages": MESSAGES, **greedy, **options})
    with pytest.raises(error):
        list(litellm.completion(f"openai/{model}", stream=True, **{"messages": MESSAGES, **greedy, **options}))


def test_too_many_requests(greedy: dict[str, Any], slow_key: str) -> None:
    def ask_twice() -> None:
        for _ in range(2):  # the first may be this minute's one
            litellm.completion("openai/sql", MESSAGES, **{**greedy, "api_key": slow_key, "max_tokens": 1})

    with pytest.raises(litellm.RateLimitError):
        ask_twice()
