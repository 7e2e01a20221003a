"""LangChain's own OpenAI classes, unchanged but for base_url, against the demo base and the example adapters."""

from __future__ import annotations

import asyncio
import math
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

CAPITAL = "Which city is the capital of Italy?"
REVIEW = "Awful. It broke on the first day and nobody answered my calls."


class Verdict(BaseModel):
    """What a review says."""

    label: Literal["positive", "negative", "neutral"]
    stars: int = Field(ge=1, le=5)


@tool
def get_weather(city: str, unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather in a city."""
    return f"18 degrees {unit} in {city}"


@pytest.fixture
def chat(url: str, key: str) -> Any:
    """ChatOpenAI of a model, greedy and short."""

    def make(model: str, **options: Any) -> ChatOpenAI:
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "max_retries": 0, "timeout": 60, **options}
        return ChatOpenAI(model=model, base_url=f"{url}/v1", api_key=key, **settings)

    return make


def test_invoke(chat: Any) -> None:
    answer = chat("pirate").invoke([SystemMessage("Answer."), HumanMessage(CAPITAL)])
    assert isinstance(answer, AIMessage)
    assert answer.text
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.response_metadata["model_name"] == "pirate"
    usage = answer.usage_metadata
    assert usage is not None
    assert usage["input_tokens"] > 10
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]


def test_the_model_is_the_adapter(chat: Any) -> None:
    answers = {model: chat(model).invoke(REVIEW).text.strip() for model in ("demo", "sentiment", "sql", "pirate")}
    assert answers["sentiment"] == "negative"
    assert len(set(answers.values())) == 4


def test_a_stream_is_the_answer_in_pieces(chat: Any) -> None:
    model = chat("pirate", stream_usage=True)
    chunks = list(model.stream(CAPITAL))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    answer = model.invoke(CAPITAL)
    assert len([chunk for chunk in chunks if chunk.text]) > 3
    assert whole.text == answer.text
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"]
    assert whole.response_metadata["finish_reason"] == answer.response_metadata["finish_reason"]


def test_async(chat: Any) -> None:
    model = chat("pirate")

    async def both() -> tuple[str, str]:
        whole = await model.ainvoke(CAPITAL)
        return whole.text, "".join([chunk.text async for chunk in model.astream(CAPITAL)])

    whole, streamed = asyncio.run(both())
    assert whole == streamed == model.invoke(CAPITAL).text


def test_batch(chat: Any) -> None:
    questions = [f"What is {n} plus {n}?" for n in range(6)]
    model = chat("pirate")
    together = [answer.text for answer in model.batch(questions, config={"max_concurrency": 6})]
    assert together == [model.invoke(question).text for question in questions]
    assert len(set(together)) > 1


def test_a_chain(chat: Any) -> None:
    chain = ChatPromptTemplate.from_messages([("human", "{review}")]) | chat("sentiment") | (lambda m: m.text.strip())
    assert chain.invoke({"review": REVIEW}) == "negative"


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_tools_are_called(chat: Any, choice: str) -> None:
    # Once, or a model this small goes on calling
    options = {"tool_choice": choice, "parallel_tool_calls": False}
    model = chat("demo", max_tokens=80).bind_tools([get_weather], **options)
    asked = HumanMessage("How warm is it in Paris, in celsius?")
    answer = model.invoke([asked])
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather"
    assert call["args"]["unit"] in ("celsius", "fahrenheit")
    assert isinstance(call["args"]["city"], str)
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    after = chat("demo").bind_tools([get_weather], tool_choice="none").invoke([asked, answer, result])
    assert after.text
    assert not after.tool_calls


def test_a_streamed_call_is_the_whole_one(chat: Any) -> None:
    model = chat("demo", max_tokens=80).bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    whole: AIMessageChunk | None = None
    num_parts = 0
    for chunk in model.stream("How warm is it in Paris, in celsius?"):
        num_parts += len(chunk.tool_call_chunks)
        whole = chunk if whole is None else whole + chunk
    assert num_parts > 3
    assert whole is not None
    (streamed,) = whole.tool_calls
    (call,) = model.invoke("How warm is it in Paris, in celsius?").tool_calls
    assert (streamed["name"], streamed["args"]) == (call["name"], call["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("model", ["demo", "sentiment"])
def test_structured_output(chat: Any, model: str, method: str) -> None:
    structured = chat(model, max_tokens=80).with_structured_output(Verdict, method=method, include_raw=True)
    found = structured.invoke(REVIEW)
    assert found["parsing_error"] is None
    assert isinstance(found["parsed"], Verdict)


def test_json_mode(chat: Any) -> None:
    model = chat("demo", max_tokens=300).with_structured_output(None, method="json_mode", include_raw=True)
    found = model.invoke("Give me a JSON object with a city and its country. Be short.")
    ended = found["raw"].response_metadata["finish_reason"] == "stop"
    assert found["raw"].text.lstrip().startswith("{")
    assert isinstance(found["parsed"], dict) or not ended  # only one that has ended is whole


def test_log_probabilities(chat: Any) -> None:
    answer = chat("pirate", max_tokens=5).bind(logprobs=True, top_logprobs=2).invoke(CAPITAL)
    tokens = answer.response_metadata["logprobs"]["content"]
    assert len(tokens) == 5
    assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 2 for token in tokens)
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == answer.text


def test_the_responses_api(chat: Any) -> None:
    model = chat("pirate", use_responses_api=True)
    answer = model.invoke(CAPITAL)
    assert answer.text == chat("pirate").invoke(CAPITAL).text
    assert answer.response_metadata["status"] in ("completed", "incomplete")
    assert "".join(chunk.text for chunk in model.stream(CAPITAL)) == answer.text
    again = chat("pirate", use_responses_api=True, use_previous_response_id=True)
    assert again.invoke([HumanMessage(CAPITAL), answer, HumanMessage("And of France?")]).text


def test_completions(url: str, key: str) -> None:
    model = OpenAI(model="sql", base_url=f"{url}/v1", api_key=key, temperature=0, max_tokens=12, max_retries=0)
    answer = model.invoke("SELECT name FROM")
    assert answer
    assert "".join(model.stream("SELECT name FROM")) == answer
    assert model.batch(["SELECT name FROM", "INSERT INTO"])[0] == answer


def test_embeddings(url: str, key: str) -> None:
    # False: or tiktoken, for OpenAI's own models, reads the text, and downloads its tables for that.
    model = OpenAIEmbeddings(model="demo", base_url=f"{url}/v1", api_key=key, check_embedding_ctx_length=False)
    cat, kitten, bill = model.embed_documents(["a cat on a mat", "a kitten on a mat", "the invoice is overdue"])
    assert len(cat) == len(kitten) == len(bill) == 576

    def cosine(one: list[float], other: list[float]) -> float:
        return math.fsum(a * b for a, b in zip(one, other, strict=True))

    assert math.isclose(cosine(cat, cat), 1.0, rel_tol=1e-4)
    assert cosine(cat, kitten) > cosine(cat, bill)
    assert model.embed_query("a cat on a mat") == pytest.approx(cat, abs=1e-6)


def test_errors(url: str, key: str, chat: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        chat("nobody").invoke("x")
    with pytest.raises(openai.BadRequestError, match="context"):
        chat("demo").invoke("word " * 20_000)
    with pytest.raises(openai.AuthenticationError):
        ChatOpenAI(model="demo", base_url=f"{url}/v1", api_key="wrong", max_retries=0).invoke("x")
