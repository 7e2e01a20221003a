"""Token ids in, token ids and exact log-probabilities out, as trainers compare them with their own model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.live_server import LiveServer

PROMPT = [5, 9, 40, 17, 8]
CLOSE = 2e-4
"""Of log-probabilities in float32."""


def logits(oracle: Any, ids: list[int]) -> Tensor:
    """[len(ids), vocab], of the token after each."""
    with torch.no_grad():
        return oracle(torch.tensor([ids])).logits[0].float()


def ask(live: LiveServer, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, **fields}
    answer = live.ask("POST", "/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", None])
def test_the_log_probabilities_of_what_was_drawn(live: LiveServer, oracle: Any, mode: str | None) -> None:
    sampling = {"temperature": 1.5, "top_k": 30, "seed": 4, "logit_bias": {"7": 3}}
    choice = ask(live, return_token_ids=True, logprobs=0, logprobs_mode=mode, **sampling)["choices"][0]
    ids = choice["token_ids"]
    assert (len(ids), choice["prompt_token_ids"]) == (12, PROMPT)
    rows = logits(oracle, PROMPT + ids)[len(PROMPT) - 1 : -1]
    if mode == "processed_logprobs":
        rows[:, 7] += 3
        rows = rows.masked_fill(rows < rows.topk(30).values[:, -1:], -torch.inf) / 1.5
    expected = rows.log_softmax(-1)[range(12), ids]
    torch.testing.assert_close(torch.tensor(choice["logprobs"]["token_logprobs"]), expected, atol=CLOSE, rtol=0)
    assert choice["text"] == live.tokenizer.decode(ids)


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_that_stops_is_among_them(live: LiveServer, stream: bool) -> None:
    whole = ask(live, return_token_ids=True, temperature=0)["choices"][0]["token_ids"]
    stop = next(token for at, token in enumerate(whole) if at > 2 and token not in whole[:at])
    wanted = whole[: whole.index(stop) + 1]
    fields = {"temperature": 0, "stop_token_ids": [stop], "return_token_ids": True, "logprobs": 0}
    if not stream:
        choice = ask(live, **fields)["choices"][0]
        assert (choice["token_ids"], choice["finish_reason"], choice["stop_reason"]) == (wanted, "stop", stop)
        assert len(choice["logprobs"]["token_logprobs"]) == len(wanted)
        return
    found, prompts, scores = [], [], []
    client = live.openai()
    fields = {"stop_token_ids": [stop], "return_token_ids": True, "ignore_eos": True}
    for chunk in client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=0, stream=True, extra_body=fields
    ):
        choice = chunk.choices[0].model_dump()
        found += choice["token_ids"]
        prompts.append(choice["prompt_token_ids"])
        scores += choice["logprobs"]["token_logprobs"]
    assert (found, len(scores)) == (wanted, len(wanted))
    assert prompts == [PROMPT, *[None] * (len(prompts) - 1)]


def test_what_a_stop_string_cuts_off_is_among_them(live: LiveServer) -> None:
    whole = ask(live, return_token_ids=True, temperature=0)["choices"][0]
    stop = whole["text"][6:8]
    choice = ask(live, return_token_ids=True, temperature=0, stop=[stop])["choices"][0]
    assert choice["text"] == whole["text"][: whole["text"].index(stop)]
    assert stop in live.tokenizer.decode(choice["token_ids"])
    assert choice["token_ids"] == whole["token_ids"][: len(choice["token_ids"])]


@pytest.mark.parametrize("echo", [False, True])
def test_a_prompts_own(live: LiveServer, oracle: Any, echo: bool) -> None:
    found = ask(live, prompt_logprobs=2, max_tokens=1, temperature=0, echo=echo, logprobs=1, n=2)["choices"]
    expected = logits(oracle, PROMPT).log_softmax(-1)
    for choice in found:
        first, *scored = choice["prompt_logprobs"]
        assert first is None
        assert len(scored) == len(PROMPT) - 1
        for place, entry in enumerate(scored):
            row, own = expected[place], PROMPT[place + 1]
            likeliest = row.topk(2).indices.tolist()
            assert list(entry) == [str(own), *(str(i) for i in likeliest if i != own)]
            for token, told in entry.items():
                assert told["logprob"] == pytest.approx(float(row[int(token)]), abs=CLOSE)
                rank = int((row > row[int(token)]).sum()) + 1
                assert told["rank"] == (rank if rank <= 2 else None)
                assert told["decoded_token"] == live.tokenizer.token_text(int(token))
        tops = choice["logprobs"]["top_logprobs"]
        assert all(len(top) <= 2 for top in tops if top is not None)  # the likeliest and its own
        assert len(tops) == (len(PROMPT) + 1 if echo else 1)


def test_tokens_as_ids(live: LiveServer) -> None:
    choice = ask(live, temperature=0, logprobs=2, return_tokens_as_token_ids=True, return_token_ids=True)["choices"][0]
    scores = choice["logprobs"]
    assert scores["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(len(top) == 2 and all(name.startswith("token_id:") for name in top) for top in scores["top_logprobs"])


def test_nothing_is_added_for_who_does_not_ask(live: LiveServer) -> None:
    assert ask(live)["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}


def test_not_in_pieces(live: LiveServer) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "prompt_logprobs": 1, "stream": True}
    error = live.ask("POST", "/v1/completions", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("prompt_logprobs", "invalid_value")
