"""lorax-client as it installs, with the versions it pins, against the demo base and the example adapters.

What it answers is compared with PEFT in tests/e2e/test_lorax_client.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from lorax import AsyncClient, Client
from lorax.errors import GenerationError, ValidationError
from lorax.types import MergedAdapters

PROMPT = "<|im_start|>user\nWhich city is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def client(url: str, key: str) -> Client:
    return Client(url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def test_adapters_answer_for_themselves(client: Client) -> None:
    answers = {name: client.generate(PROMPT, adapter_id=name, max_new_tokens=24) for name in ("pirate", "sql", None)}
    assert len({answer.generated_text for answer in answers.values()}) == 3
    details = answers["pirate"].details
    assert details.generated_tokens == len(details.tokens) <= 24
    assert "".join(token.text for token in details.tokens if not token.special) == answers["pirate"].generated_text


def test_a_stream_is_the_answer_in_pieces(client: Client) -> None:
    whole = client.generate(PROMPT, adapter_id="pirate", max_new_tokens=24)
    events = list(client.generate_stream(PROMPT, adapter_id="pirate", max_new_tokens=24))
    assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
    assert events[-1].generated_text == whole.generated_text


def test_async(url: str, key: str, client: Client) -> None:
    async def ask() -> Any:
        other = AsyncClient(url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        return await other.generate(PROMPT, adapter_id="pirate", max_new_tokens=24)

    assert asyncio.run(ask()) == client.generate(PROMPT, adapter_id="pirate", max_new_tokens=24)


def test_merged_adapters(client: Client) -> None:
    merged = MergedAdapters(ids=["pirate", "sql"], weights=[1.0, 0.0], merge_strategy="linear", density=0.0)
    answer = client.generate(PROMPT, merged_adapters=merged, max_new_tokens=24)
    assert answer.generated_text == client.generate(PROMPT, adapter_id="pirate", max_new_tokens=24).generated_text


def test_a_watermark_changes_the_answer_and_is_the_same_each_time(client: Client) -> None:
    prompt = "Write a story about a dog."  # of which the base is sure of no word
    plain, *marked = (client.generate(prompt, max_new_tokens=24, watermark=mark) for mark in (False, True, True))
    assert marked[0] == marked[1]
    assert marked[0].generated_text != plain.generated_text


def test_errors(client: Client) -> None:
    with pytest.raises(GenerationError, match="does not exist"):
        client.generate(PROMPT, adapter_id="nobody")
    with pytest.raises(ValidationError):
        client.generate(PROMPT, best_of=2)
