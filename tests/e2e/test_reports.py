"""What people reported of other servers, asked as they asked it.

A live server, a tiny model; transformers and PEFT say what is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from tests.support.served import Served, serve_tiny
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer

PROMPT = "the quick brown fox and the end the fox"
ON: Any = {"ignore_eos": True}
NAMES = ("tiny", "wide")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    base = make_tiny_tokenizer(make_tiny_model("llama", folder / "base"))
    with serve_tiny(base, load_oracle(base), folder, {"wide": {"r": 8, "target_modules": "all-linear"}}) as served:
        yield served


def complete(served: Served, **fields: Any) -> Any:
    options = {"model": "wide", "prompt": PROMPT, "temperature": 0, "max_tokens": 24, "extra_body": ON}
    return served.client.completions.create(**(options | fields))


def chunks(served: Served, **fields: Any) -> list[Any]:
    return [chunk.choices[0] for chunk in complete(served, stream=True, **fields) if chunk.choices]


def test_stop_strings_over_tokens_and_chunks(served: Served) -> None:
    """Wherever it is cut: whole and streamed are the same, and nothing of the stop string is out before it is known."""
    letters = {"guided_regex": "[a-z ]{60}"}  # or many tokens of a random model are parts of characters
    text = complete(served, max_tokens=60, extra_body=letters).choices[0].text
    assert len(text) == 60
    for stop in (text[at : at + 5] for at in range(2, 55, 7)):
        asked = {"max_tokens": 60, "stop": [stop], "extra_body": letters}
        whole, streamed = complete(served, **asked).choices[0], chunks(served, **asked)
        assert whole.text == "".join(choice.text for choice in streamed) == text[: text.index(stop)]
        assert streamed[-1].finish_reason == whole.finish_reason == "stop"
        kept = complete(served, **asked | {"extra_body": {**letters, "include_stop_str_in_output": True}})
        assert kept.choices[0].text == text[: text.index(stop) + len(stop)]


def test_a_least_number_of_tokens_goes_before_stop_strings(served: Served) -> None:
    text = complete(served).choices[0].text
    answer = complete(served, stop=[text[2:5]], extra_body={**ON, "min_tokens": 20})
    assert answer.usage.completion_tokens >= 20
    assert answer.choices[0].text.startswith(text[:5])


def test_offsets_of_a_stream_that_begins_with_its_prompt(served: Served) -> None:
    asked = {"echo": True, "logprobs": 1, "max_tokens": 8}
    whole = complete(served, **asked).choices[0]
    scores = [choice.logprobs for choice in chunks(served, **asked) if choice.logprobs is not None]
    offsets = [offset for each in scores for offset in each.text_offset]
    assert offsets == whole.logprobs.text_offset
    assert offsets[-1] > len(PROMPT)


def test_a_repetition_penalty_looks_at_the_prompt_and_the_others_do_not(served: Served) -> None:
    """As transformers has the one and OpenAI the others: the first token is drawn when nothing has been answered."""
    ids = served.live.tokenizer.encode(PROMPT)
    for name in NAMES:
        with torch.no_grad():
            logits = served.oracles[name](torch.tensor([ids])).logits[:, -1].float()
        plain = complete(served, model=name, prompt=ids, max_tokens=1).choices[0].text
        other = complete(served, model=name, prompt=ids, max_tokens=1, presence_penalty=2, frequency_penalty=2)
        assert other.choices[0].text == plain == served.text([int(logits.argmax())])
        for penalty in (0.2, 5.0):
            expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits.clone()).argmax()
            told = complete(served, model=name, prompt=ids, max_tokens=1, extra_body={"repetition_penalty": penalty})
            assert told.choices[0].text == served.text([int(expected)])


@pytest.mark.parametrize("chat", [True, False])
def test_usage_is_in_every_chunk_or_in_none(served: Served, chat: bool) -> None:
    asked: dict[str, Any] = {"model": "wide", "max_tokens": 5, "temperature": 0, "stream": True, "extra_body": ON}
    if chat:
        asked["messages"] = [{"role": "user", "content": "the fox"}]
    else:
        asked["prompt"] = PROMPT
    create: Any = served.client.chat.completions.create if chat else served.client.completions.create
    options = {"include_usage": True, "continuous_usage_stats": True}
    told = [chunk.usage.completion_tokens for chunk in create(**asked, stream_options=options)]
    assert told == sorted(told)
    assert told[-1] == 5
    assert not any(chunk.usage for chunk in create(**asked, stream_options={}))


def test_seeds_while_others_ask_and_the_adapter_is_loaded_again(served: Served) -> None:
    def one(seed: int) -> str:
        text: str = complete(served, temperature=1, seed=seed).choices[0].text
        return text

    alone = [one(seed) for seed in range(4)]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(8) as threads:
        beside = [threads.submit(complete, served, model="tiny", temperature=1) for _ in range(4)]
        again = [threads.submit(one, seed) for seed in (0, 1, 2, 3, 0, 1, 2, 3)]
        loaded = served.live.load("wide", served.folders["wide"], load_inplace=True)
        assert loaded.is_success, loaded.text
        assert [each.result() for each in again] == alone * 2
        assert all(each.result() for each in beside)


@pytest.mark.parametrize("field", ["adapter", "adapter_name", "lora_adapter", "lora_name", "lora_request", "lora"])
def test_who_names_an_adapter_in_other_words_is_not_answered_by_the_base(served: Served, field: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=field):
            complete(served, model="tiny", stream=stream, extra_body={field: "wide"})
