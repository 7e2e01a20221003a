"""What callers are told of the prefix cache, by a real engine: whole blocks, of one adapter and one tenant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.server.tenancy.keys_file import new_key
from tests.support.live_server import live_server
from tests.support.peft_adapters import make_peft_adapter
from tests.support.waiting import LIMIT

PROMPT = list(range(5, 5 + 3 * BLOCK_SIZE + 7))
WHOLE = 3 * BLOCK_SIZE
"""Of its tokens: those in blocks that are full."""


@pytest.fixture(scope="module")
def clients(base: Path, oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, httpx.Client]]:
    """By key: two of the tenant "one" and one of "two", before one live server with two adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    keys = [new_key(name, name.partition("-")[0], adapters=["**"]) for name in ("one", "one-too", "two")]
    with live_server(base, keys=keys) as live, ExitStack() as stack:
        for seed, name in enumerate(("red", "blue")):
            make_peft_adapter(oracle, folder / name, seed=seed, r=2, target_modules=["q_proj"])
            assert live.parts.adapters.register_unread(folder / name) is not None
        yield {
            name: stack.enter_context(httpx.Client(base_url=live.url, headers={"x-api-key": secret}, timeout=LIMIT))
            for name, secret in live.keys.items()
        }


def completion(client: httpx.Client, prompt: list[int], model: str = "red", **fields: Any) -> Any:
    body = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0, **fields}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def cached(client: httpx.Client, prompt: list[int], model: str = "red", **fields: Any) -> int:
    usage = completion(client, prompt, model, **fields).json()["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_whole_blocks_of_the_same_adapter_and_tenant(clients: dict[str, httpx.Client]) -> None:
    one, two = clients["one"], clients["two"]
    assert cached(one, PROMPT) == 0
    assert cached(one, PROMPT) == WHOLE
    assert cached(one, PROMPT[:-20] + [4] * 20) == WHOLE - BLOCK_SIZE, "up to the first token that differs"
    assert cached(one, PROMPT, "blue") == 0, "another adapter"
    assert cached(one, PROMPT, "tiny") == 0, "the base"
    assert cached(two, PROMPT) == 0, "another tenant"
    assert cached(two, PROMPT) == WHOLE
    assert cached(clients["one-too"], PROMPT) == WHOLE, "another key of the same tenant"
    assert cached(one, PROMPT, cache_salt="mine") == 0
    assert cached(two, PROMPT, cache_salt="mine") == 0
    assert cached(one, PROMPT) == WHOLE


def test_several_prompts_and_choices_count_each_prompt_once(clients: dict[str, httpx.Client]) -> None:
    one, prompt = clients["one"], [9, *PROMPT]
    assert cached(one, prompt, n=2, temperature=1) == 0, "what one choice computed for the other was not there before"
    assert cached(one, prompt, n=2, temperature=1) == WHOLE
    both = completion(one, [prompt, [8, *PROMPT]]).json()["usage"]  # type: ignore[list-item]
    assert both["prompt_tokens_details"]["cached_tokens"] == WHOLE
    assert both["prompt_tokens"] == 2 * len(prompt)


def stream(client: httpx.Client, route: str, body: dict[str, Any]) -> list[Any]:
    lines = client.post(route, json={**body, "stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_every_api_tells(clients: dict[str, httpx.Client]) -> None:
    one = clients["one"]
    said = " ".join(["the other one"] * 20)
    chat = {"model": "red", "messages": [{"role": "user", "content": said}], "max_tokens": 2}
    response = {"model": "red", "input": said, "max_output_tokens": 2}
    sglang = {"input_ids": [7, *PROMPT], "lora_path": "red", "sampling_params": {"max_new_tokens": 2}}
    usage = one.post("/v1/chat/completions", json=chat).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    expected = (usage["prompt_tokens"] - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert expected >= 2 * BLOCK_SIZE
    assert one.post("/v1/chat/completions", json=chat).json()["usage"]["prompt_tokens_details"] == {
        "cached_tokens": expected
    }
    chunks = stream(one, "/v1/chat/completions", {**chat, "stream_options": {"include_usage": True}})
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": expected}
    assert one.post("/v1/responses", json=response).json()["usage"]["input_tokens_details"]["cached_tokens"] == expected
    last = stream(one, "/v1/responses", response)[-1]["response"]
    assert last["usage"]["input_tokens_details"]["cached_tokens"] == expected
    assert one.post("/generate", json=sglang).json()["meta_info"]["cached_tokens"] == 0
    assert one.post("/generate", json=sglang).json()["meta_info"]["cached_tokens"] == WHOLE
    assert stream(one, "/generate", sglang)[-1]["meta_info"]["cached_tokens"] == WHOLE
