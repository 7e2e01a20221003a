"""The official openai client: structured answers, tools, responses, embeddings, echo. A live server, a tiny model.

The model is random, so what it says shows nothing: what holds it to a form does.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
import torch
from pydantic import BaseModel, Field

from tests.support.live_server import TINY
from tests.support.served import Served, serve_tiny
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer
from tests.support.waiting import LIMIT

ASK: list[Any] = [{"role": "user", "content": "the fox"}]
NAMES = ("tiny", "wide")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Fox(BaseModel):
    colour: Colour
    age: int = Field(ge=0, le=20)
    kind: Literal["a", "b"]
    legs: list[bool] = Field(max_length=3)
    nick: str | None = Field(max_length=5)


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "hunt",
        "parameters": {
            "type": "object",
            "properties": {"what": {"enum": ["hen", "hare"]}, "hours": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["what", "hours"],
        },
    },
}
SLEEP: Any = {"type": "function", "function": {"name": "sleep", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    base = make_tiny_tokenizer(make_tiny_model("llama", folder / "base", max_position_embeddings=2048))
    adapters = {"wide": {"r": 8, "target_modules": "all-linear"}}
    with serve_tiny(base, load_oracle(base), folder, adapters, engine=replace(TINY, memory=96 << 20)) as served:
        yield served


@pytest.fixture
def async_client(served: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.live.url}/v1", api_key="none", max_retries=0)


# --------------------------------------------------------------------------------------------------- structured output


@pytest.mark.parametrize("name", NAMES)
def test_parse(served: Served, name: str) -> None:
    for seed in range(3):
        answer = served.client.chat.completions.parse(
            model=name, messages=ASK, response_format=Fox, seed=seed, max_tokens=500
        )
        [choice] = answer.choices
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Fox)
    with served.client.chat.completions.stream(
        model=name, messages=ASK, response_format=Fox, seed=0, max_tokens=500
    ) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Fox)


async def test_many_forms_in_the_same_steps(async_client: openai.AsyncOpenAI) -> None:
    """Adapters and grammars differ from row to row, and some rows have neither."""
    forms: list[tuple[dict[str, Any], str]] = [
        ({"guided_regex": r"[a-c]{3}\d\d"}, r"^[a-c]{3}\d\d$"),
        ({"guided_choice": ["hen", "hare"]}, "^(hen|hare)$"),
        ({"structured_outputs": {"grammar": 'start: "x" start | "y"'}}, "^x*y$"),
        ({"response_format": {"type": "regex", "regex": "z{4,6}"}}, "^z{4,6}$"),
        ({}, ""),
    ]

    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        extra, _ = forms[i % len(forms)]
        answer = await client.chat.completions.create(
            model=NAMES[i % 2],
            messages=ASK,
            seed=i,
            max_tokens=60,
            temperature=1,
            logit_bias={"1": 5},
            extra_body=extra,
        )
        return answer.choices[0].message.content or ""

    async with async_client as client:
        together = await asyncio.gather(*(ask(client, i) for i in range(30)))
        alone = [await ask(client, i) for i in range(30)]
    assert together == alone
    for i, text in enumerate(together):
        if pattern := forms[i % len(forms)][1]:
            jsonschema.validate(text, {"type": "string", "pattern": pattern})


def test_a_form_that_is_cut_short_says_so(served: Served) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "the", "extra_body": {"guided_regex": "[a-z]{50}"}}
    answer = served.client.completions.create(**options, max_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text.isalpha()
    stopped = served.client.completions.create(**options, max_tokens=200, stop=list("abcdefghijklmnop"))
    assert stopped.choices[0].finish_reason == "stop"
    assert set(stopped.choices[0].text) <= set("qrstuvwxyz")
    hardly = served.client.completions.create(
        model="tiny", prompt="the", max_tokens=30, extra_body={"guided_choice": ["x"], "min_tokens": 20}
    )
    assert (hardly.choices[0].text, hardly.choices[0].finish_reason) == ("x", "stop")  # the form is stronger


# --------------------------------------------------------------------------------------------------------------- tools


def check_call(name: str, arguments: str) -> None:
    function = {"hunt": TOOL, "sleep": SLEEP}[name]["function"]
    schema = {**function["parameters"], "additionalProperties": False}
    jsonschema.validate(json.loads(arguments), schema)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "hunt"}}])
@pytest.mark.parametrize("name", NAMES)
def test_calls(served: Served, name: str, choice: Any) -> None:
    options: dict[str, Any] = {"model": name, "messages": ASK, "tools": [TOOL, SLEEP], "tool_choice": choice}
    options |= {"temperature": 0, "max_tokens": 900, "parallel_tool_calls": False}
    [whole] = served.client.chat.completions.create(**options).choices
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    [call] = whole.message.tool_calls or []
    assert isinstance(choice, str) or call.function.name == "hunt"  # type: ignore[union-attr]
    check_call(call.function.name, call.function.arguments)  # type: ignore[union-attr]
    with served.client.chat.completions.stream(**options) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    [streamed] = final.message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments  # type: ignore[union-attr]
    assert final.finish_reason == "tool_calls"
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(deltas) > 1
    after = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call.to_dict()]},
        {"role": "tool", "tool_call_id": call.id, "content": "two hens"},
    ]
    assert served.client.chat.completions.create(model=name, messages=after, max_tokens=3, tools=[TOOL]).choices


def test_parallel_calls(served: Served) -> None:
    """Each has an id of its own; the last one may be cut short."""
    answer = served.client.chat.completions.create(
        model="tiny", messages=ASK, tools=[SLEEP], tool_choice="required", max_tokens=600, logit_bias={"1": -100}
    )
    calls = answer.choices[0].message.tool_calls or []
    assert 2 < len({call.id for call in calls}) == len(calls)
    for call in calls[:-1]:
        check_call(call.function.name, call.function.arguments)  # type: ignore[union-attr]


def test_no_tools_no_calls(served: Served) -> None:
    answer = served.client.chat.completions.create(
        model="tiny", messages=ASK, tools=[TOOL], tool_choice="none", max_tokens=5
    )
    assert answer.choices[0].message.tool_calls is None


# ----------------------------------------------------------------------------------------------------------- responses


def test_responses(served: Served) -> None:
    first = served.client.responses.create(model="wide", input="the fox", max_output_tokens=8, temperature=0)
    assert first.status in ("completed", "incomplete")
    chat = served.client.chat.completions.create(model="wide", messages=ASK, max_tokens=8, temperature=0)
    assert first.output_text == chat.choices[0].message.content
    with served.client.responses.stream(
        model="wide", input="and then?", previous_response_id=first.id, max_output_tokens=8, temperature=0
    ) as stream:
        events = list(stream)
    kinds, second = [event.type for event in events], events[-1].response  # type: ignore[union-attr]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    messages: Any = [
        *ASK,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "and then?"},
    ]
    again = served.client.chat.completions.create(model="wide", messages=messages, max_tokens=8, temperature=0)
    assert second.output_text == again.choices[0].message.content
    assert served.client.responses.retrieve(second.id).output_text == second.output_text
    assert served.client.responses.input_items.list(second.id).data
    served.client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        served.client.responses.retrieve(second.id)


async def test_responses_async_with_forms_and_tools(async_client: openai.AsyncOpenAI) -> None:
    async with async_client as client:
        parsed = await client.responses.parse(model="tiny", input="the fox", text_format=Fox, max_output_tokens=500)
        assert isinstance(parsed.output_parsed, Fox)
        flat = {"type": "function", **TOOL["function"], "strict": True}
        called = await client.responses.create(
            model="tiny", input="the fox", tools=[flat], tool_choice="required", max_output_tokens=900
        )
        calls = [item for item in called.output if item.type == "function_call"]
        assert calls
        for call in calls:
            check_call(call.name, call.arguments)
        slow = await client.responses.create(model="tiny", input="x", background=True, max_output_tokens=1500)
        assert (await client.responses.cancel(slow.id)).status in ("cancelled", "completed", "incomplete")


# --------------------------------------------------------------------------------------- embeddings, echo, tokenisation


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings(served: Served, name: str, pooling: str) -> None:
    """Longer than a step's 64 tokens, too, and next to other requests' prompts."""
    texts = ["the fox", "another one " * 30, "x"]
    answer = served.client.embeddings.create(
        model=name, input=texts, encoding_format="float", extra_body={"pooling": pooling}
    )
    assert [item.index for item in answer.data] == [0, 1, 2]
    for item, text in zip(answer.data, texts, strict=True):
        ids = torch.tensor([served.live.tokenizer.encode(text)])
        with torch.no_grad():
            hidden = served.oracles[name](ids, output_hidden_states=True).hidden_states[-1][0]
        expected = hidden[-1] if pooling == "last" else hidden.mean(0)
        expected = expected / expected.norm()
        assert torch.tensor(item.embedding) == pytest.approx(expected.numpy(), abs=1e-3)
    packed = served.client.embeddings.create(
        model=name, input=texts, extra_body={"pooling": pooling}
    )  # base64 by default
    for item, other in zip(answer.data, packed.data, strict=True):
        assert item.embedding == pytest.approx(other.embedding, abs=1e-6)
    short = served.client.embeddings.create(model=name, input=texts[0], dimensions=8, extra_body={"pooling": pooling})
    assert len(short.data[0].embedding) == 8
    assert sum(x * x for x in short.data[0].embedding) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_with_logprobs(served: Served, name: str, max_tokens: int) -> None:
    """As lm-eval asks for the likelihood of a text; of prompts in chunks and of prompts seen before."""
    prompt = served.live.tokenizer.encode("the quick brown fox and the end " * 4)
    for _ in range(2):
        [choice] = served.client.completions.create(
            model=name, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=2, temperature=0,
            extra_body={"ignore_eos": True},
        ).choices  # fmt: skip
        scores = choice.logprobs
        assert scores is not None
        assert scores.tokens is not None
        assert scores.token_logprobs is not None
        assert scores.top_logprobs is not None
        assert len(scores.tokens) == len(prompt) + max_tokens
        assert scores.token_logprobs[0] is None
        with torch.no_grad():
            expected = served.oracles[name](torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        own = [float(row[token]) for row, token in zip(expected, prompt[1:], strict=False)]
        assert scores.token_logprobs[1 : len(prompt)] == pytest.approx(own, abs=1e-3)
        for row, top in zip(expected, scores.top_logprobs[1 : len(prompt)], strict=False):
            assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-3)
        assert choice.text.startswith(served.live.tokenizer.decode(prompt))
        assert scores.text_offset == sorted(scores.text_offset or [])


def test_best_of(served: Served) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "the", "max_tokens": 6, "seed": 3, "logprobs": 0}
    options["extra_body"] = {"ignore_eos": True}
    everything = served.client.completions.create(**options, n=5).choices
    ranked = sorted(everything, key=lambda choice: -sum(choice.logprobs.token_logprobs or [0]))  # type: ignore[union-attr, arg-type]
    best = served.client.completions.create(**options, n=2, best_of=5)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage is not None
    assert best.usage.completion_tokens == 30


def test_tokenize_and_back(served: Served) -> None:
    post = lambda route, **body: httpx.post(f"{served.live.url}/{route}", json=body, timeout=LIMIT).json()  # noqa: E731
    text = "the fox é"
    found = post("tokenize", model="wide", prompt=text, return_token_strs=True)
    assert found["tokens"] == served.live.tokenizer.encode(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == served.live.parts.memory.max_model_len
    assert text in post("detokenize", tokens=found["tokens"])["prompt"]
    chat = post("tokenize", messages=ASK)
    assert chat["tokens"] == served.live.tokenizer.chat(ASK)
