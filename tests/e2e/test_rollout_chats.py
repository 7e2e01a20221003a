"""Token ids and a prompt's own log-probabilities of chats, as vLLM gives them and trainers compare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.live_server import LiveServer

MESSAGES = [{"role": "user", "content": "the fox"}]
CLOSE = 2e-4
"""Of log-probabilities in float32."""


@pytest.fixture(scope="module")
def prompt(live: LiveServer, base: Path) -> list[int]:
    """The conversation as transformers writes it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}


def ask(live: LiveServer, **fields: Any) -> dict[str, Any]:
    answer = live.ask("POST", "/v1/chat/completions", json=body(**fields))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_ids_in_and_out_with_their_log_probabilities(live: LiveServer, oracle: Any, prompt: list[int]) -> None:
    found = ask(live, return_token_ids=True, logprobs=True, temperature=1.5, seed=4, n=2)
    assert found["prompt_token_ids"] == prompt
    assert found["prompt_logprobs"] is None
    assert len(found["choices"]) == 2
    for choice in found["choices"]:
        ids = choice["token_ids"]
        assert len(ids) == 12
        assert choice["message"]["content"] == live.tokenizer.decode(ids)
        with torch.no_grad():
            rows = oracle(torch.tensor([prompt + ids])).logits[0].float().log_softmax(-1)
        expected = rows[len(prompt) - 1 : -1][range(12), ids]
        told = torch.tensor([entry["logprob"] for entry in choice["logprobs"]["content"]])
        torch.testing.assert_close(told, expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_stream_has_all_that_were_drawn(live: LiveServer, prompt: list[int], logprobs: bool) -> None:
    whole = ask(live, return_token_ids=True)["choices"][0]["token_ids"]
    stop = next(token for at, token in enumerate(whole) if at > 2 and token not in whole[:at])
    wanted = whole[: whole.index(stop) + 1]
    fields = body(return_token_ids=True, stop_token_ids=[stop], stream=True, logprobs=logprobs)
    lines = live.ask("POST", "/v1/chat/completions", json=fields).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert chunks[0]["prompt_token_ids"] == prompt
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [token for choice in choices for token in choice.get("token_ids", ())] == wanted
    scored = [entry for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert len(scored) == (len(wanted) if logprobs else 0)
    assert choices[-1]["finish_reason"] == "stop"
    stopped = ask(live, return_token_ids=True, stop_token_ids=[stop])["choices"][0]
    assert (stopped["token_ids"], stopped["stop_reason"]) == (wanted, stop)


def test_a_conversations_own(live: LiveServer, oracle: Any, prompt: list[int]) -> None:
    found = ask(live, prompt_logprobs=2, max_tokens=1, n=2)
    assert found["prompt_token_ids"] is None
    assert all("token_ids" not in choice for choice in found["choices"])
    first, *scored = found["prompt_logprobs"]
    assert first is None
    assert len(scored) == len(prompt) - 1
    with torch.no_grad():
        rows = oracle(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    for place, entry in enumerate(scored):
        own = prompt[place + 1]
        likeliest = rows[place].topk(2).indices.tolist()
        assert list(entry) == [str(own), *(str(i) for i in likeliest if i != own)]
        for token, told in entry.items():
            assert told["logprob"] == pytest.approx(float(rows[place][int(token)]), abs=CLOSE)
            assert told["decoded_token"] == live.tokenizer.token_text(int(token))


def test_nothing_is_added_for_who_does_not_ask(live: LiveServer) -> None:
    found = ask(live)
    assert not {"prompt_token_ids", "prompt_logprobs"} & found.keys()
    assert found["choices"][0].keys() == {"index", "message", "logprobs", "finish_reason", "stop_reason"}


def test_not_in_pieces(live: LiveServer) -> None:
    error = live.ask("POST", "/v1/chat/completions", json=body(prompt_logprobs=1, stream=True)).json()["error"]
    assert (error["param"], error["code"]) == ("prompt_logprobs", "invalid_value")
