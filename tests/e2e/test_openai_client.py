"""The official openai client against a live server with a tiny model; transformers and PEFT say what is right."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.peft_adapters import make_peft_adapter
from tests.support.served import Served, greedy, serve_tiny
from tests.support.tiny import EOS
from tests.support.waiting import wait_for

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the end, é?"}]
ADAPTERS = {
    "narrow": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 8, "target_modules": "all-linear"},
}


@pytest.fixture(scope="module")
def served(base: Path, oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_tiny(base, oracle, tmp_path_factory.mktemp("adapters"), ADAPTERS) as served:
        yield served


@pytest.fixture
def async_client(served: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.live.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("name", ["tiny", *ADAPTERS, "tiny:wide"])
def test_chat_says_what_the_oracle_says(served: Served, name: str) -> None:
    answer = served.client.chat.completions.create(
        model=name, messages=MESSAGES, temperature=0, max_tokens=12, extra_body={"ignore_eos": True}
    )
    prompt = served.live.tokenizer.chat(MESSAGES)
    expected = served.greedy(name.removeprefix("tiny:"), prompt, 12)
    [choice] = answer.choices
    assert choice.message.content == served.text(expected)
    assert (choice.finish_reason, choice.message.role, answer.model) == ("length", "assistant", name)
    assert answer.usage is not None
    usage = answer.usage.to_dict()
    assert set(usage.pop("prompt_tokens_details")) == {"cached_tokens"}  # type: ignore[call-overload]
    assert usage == {"prompt_tokens": len(prompt), "completion_tokens": 12, "total_tokens": len(prompt) + 12}


def test_adapters_say_something_else_than_the_base(served: Served) -> None:
    """Else the comparisons with the oracle would show little."""
    prompt = served.live.tokenizer.chat(MESSAGES)
    answers = {tuple(served.greedy(name, prompt, 12)) for name in served.oracles}
    assert len(answers) == 3


def test_completions_continue_text_and_token_ids(served: Served) -> None:
    prompt = served.live.tokenizer.encode("the other one")
    expected = served.text(served.greedy("narrow", prompt, 8))
    for given in ("the other one", prompt, ["the other one", "the other one"], [prompt]):
        answer = served.client.completions.create(
            model="narrow", prompt=given, temperature=0, max_tokens=8, extra_body={"ignore_eos": True}
        )
        assert {choice.text for choice in answer.choices} == {expected}


def test_chat_stream(served: Served) -> None:
    options: dict[str, Any] = {"model": "wide", "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    whole = served.client.chat.completions.create(**options)
    chunks = list(served.client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_completion_stream(served: Served) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "the fox", "temperature": 0, "max_tokens": 20, "logprobs": 2}
    whole = served.client.completions.create(**options)
    chunks = list(served.client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    scored = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for part in scored if part for token in part.tokens or []] == whole.choices[0].logprobs.tokens  # type: ignore[union-attr]


async def test_async_client(async_client: openai.AsyncOpenAI, served: Served) -> None:
    options: dict[str, Any] = {"model": "narrow", "messages": MESSAGES, "temperature": 0, "max_tokens": 10}
    async with async_client as client:
        whole = await client.chat.completions.create(**options)
        stream = await client.chat.completions.create(**options, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content


async def test_many_at_once_are_each_as_alone(async_client: openai.AsyncOpenAI, served: Served) -> None:
    """Base and adapters, greedy and sampled, streams and not, all in the same steps."""
    names = list(served.oracles)

    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        options: dict[str, Any] = {
            "model": names[i % 3],
            "messages": [{"role": "user", "content": "the quick brown fox " * (i % 4 + 1)}],
            "temperature": 0 if i % 2 else 1.0,
            "seed": i,
            "max_tokens": 6 + i % 5,
        }
        if i % 3 == 0:
            stream = await client.chat.completions.create(**options, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return (await client.chat.completions.create(**options)).choices[0].message.content or ""

    async with async_client as client:
        together = await asyncio.gather(*(ask(client, i) for i in range(16)))
        alone = [await ask(client, i) for i in range(16)]
    assert together == alone
    assert len(set(together)) > 8
    served.live.idle()


def test_chat_logprobs(served: Served) -> None:
    answer = served.client.chat.completions.create(
        model="wide",
        messages=MESSAGES,
        temperature=0,
        max_tokens=6,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    prompt = served.live.tokenizer.chat(MESSAGES)
    drawn = served.greedy("wide", prompt, 6)
    expected = served.logprobs("wide", prompt + drawn)[len(prompt) - 1 : -1]
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert len(content) == 6
    for entry, token_id, row in zip(content, drawn, expected, strict=True):
        top, ids = row.topk(3)
        assert bytes(entry.bytes or []) == served.live.tokenizer.token_bytes(token_id)
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(top.tolist(), abs=1e-3)
        assert [t.token for t in entry.top_logprobs] == [served.live.tokenizer.token_text(int(i)) for i in ids]


def test_seeds_repeat_and_choices_differ(served: Served) -> None:
    def draw(**options: Any) -> list[str]:
        answer = served.client.completions.create(
            model="tiny", prompt="the", temperature=1, max_tokens=12, extra_body={"ignore_eos": True}, **options
        )
        assert [choice.index for choice in answer.choices] == list(range(options.get("n", 1)))
        return [choice.text for choice in answer.choices]

    first = draw(n=3, seed=5)
    assert len(set(first)) == 3
    assert draw(n=3, seed=5) == first
    assert draw(seed=5) == first[:1]
    assert draw(seed=6) == [first[1]]  # seeds of choices follow each other
    assert draw() != draw()


def test_stop_strings_and_tokens(served: Served) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "the", "temperature": 0, "max_tokens": 30}
    ids = served.greedy("tiny", served.live.tokenizer.encode("the"), 30)
    text = served.text(ids)
    stop = next(text[i : i + 3] for i in range(4, len(text)) if "\ufffd" not in text[i : i + 3])
    answer = served.client.completions.create(**options, stop=stop, extra_body={"ignore_eos": True})
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    unseen = next(i for i in range(1, 30) if ids[i] not in ids[:i])
    answer = served.client.completions.create(
        **options, extra_body={"ignore_eos": True, "stop_token_ids": [ids[unseen]]}
    )
    assert answer.choices[0].text == served.text(ids[:unseen])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == unseen + 1
    served.live.idle()


def test_logit_bias_and_end_of_sequence(served: Served) -> None:
    eos = served.live.tokenizer.encode(EOS, add_special_tokens=False)[0]
    options: dict[str, Any] = {"model": "tiny", "prompt": "the", "temperature": 0, "max_tokens": 5}
    ended = served.client.completions.create(**options, logit_bias={str(eos): 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    forced = served.client.completions.create(**options, logit_bias={"70": 100})
    assert forced.choices[0].text == served.text([70] * 5)
    kept_on = served.client.completions.create(**options, logit_bias={str(eos): 100}, extra_body={"min_tokens": 3})
    assert kept_on.usage is not None
    assert kept_on.usage.completion_tokens == 4


def test_max_tokens_is_cut_to_the_context(served: Served) -> None:
    limit = served.live.parts.memory.max_model_len
    prompt = [70] * (limit - 3)
    answer = served.client.completions.create(
        model="tiny", prompt=prompt, max_tokens=100, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


# --------------------------------------------------------------------------------------------------- models, adapters


def test_models(served: Served) -> None:
    cards = {card.id: card.to_dict() for card in served.client.models.list()}
    assert set(cards) == {"tiny", *ADAPTERS}
    assert cards["tiny"]["parent"] is None
    assert all(cards[name]["parent"] == "tiny" for name in ADAPTERS)
    assert served.client.models.retrieve("wide").id == "wide"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("nobody")


def test_a_damaged_adapter_is_refused_and_others_go_on(served: Served, tmp_path: Path) -> None:
    folder = make_peft_adapter(served.oracles["tiny"], tmp_path / "a", r=2, target_modules=["q_proj"]).folder
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    response = served.live.load("damaged", folder)
    assert response.status_code == 400
    assert response.json()["type"] == response.json()["error"]["type"] == "BadRequestError"
    assert served.live.load("damaged", tmp_path / "nothing").status_code == 404
    with pytest.raises(openai.NotFoundError):
        served.client.completions.create(model="damaged", prompt="the", max_tokens=1)
    test_completions_continue_text_and_token_ids(served)


def test_unloading_lets_a_stream_finish(served: Served, tmp_path: Path) -> None:
    adapter = make_peft_adapter(served.oracles["tiny"], tmp_path / "a", r=4, target_modules=["o_proj"])
    assert served.live.load("brief", adapter.folder).is_success
    prompt = served.live.tokenizer.encode("the")
    stream = served.client.completions.create(
        model="brief", prompt=prompt, temperature=0, max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [next(stream).choices[0].text]
    assert served.live.unload("brief").is_success
    with pytest.raises(openai.NotFoundError):
        served.client.completions.create(model="brief", prompt="the")
    pieces += [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == served.text(greedy(adapter.model, prompt, 60)[0])
    wait_for(lambda: served.live.parts.adapters.registry.draining() == ())


# ------------------------------------------------------------------------------------------------------------ errors


def test_errors_are_the_clients_own(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        served.client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as negative:
        served.client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=-1)
    assert negative.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as long:
        served.client.chat.completions.create(
            model="wide", messages=[{"role": "user", "content": "x" * 2000}], stream=True
        )
    assert (long.value.param, long.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as guided:
        served.client.completions.create(model="tiny", prompt="the", extra_body={"guided_regex": "(a"})
    assert guided.value.param == "guided_regex"
    served.live.idle()


def test_ignored_fields_are_named(served: Served) -> None:
    raw = served.client.chat.completions.with_raw_response.create(
        model="tiny", messages=MESSAGES, max_tokens=1, store=False, extra_body={"mood": "x"}
    )
    assert raw.headers["x-ignored-fields"] == "store, mood"
    assert raw.parse().choices[0].finish_reason is not None


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(served: Served, stream: bool) -> None:
    """Of 16 times 500 tokens only those are computed that the news of the disconnect needs to arrive."""
    stats = served.live.parts.engine.stats
    before = stats().generation_tokens
    body = {"model": "wide", "prompt": "the", "max_tokens": 500, "n": 16, "ignore_eos": True, "stream": stream}
    connection = http.client.HTTPConnection(served.live.url.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps(body))
    if stream:
        connection.getresponse().read(1)
    wait_for(lambda: stats().generation_tokens > before)
    connection.close()
    served.live.idle()
    assert stats().waiting == 0
    assert stats().generation_tokens - before < 16 * 400
