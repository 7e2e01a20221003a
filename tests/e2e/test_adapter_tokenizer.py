"""A fine-tune with its tokenizer files on a live server; transformers and PEFT say what is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from loraplex.server.config import EngineConfig
from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import PeftAdapter, make_peft_adapter
from tests.support.tiny import VOCAB_SIZE, load_oracle, make_tiny_model, make_tiny_tokenizer
from tests.support.waiting import LIMIT

ENGINE = EngineConfig(
    device="cpu", max_model_len=256, memory_bytes=1 << 27, max_num_seqs=8, token_budget=64, dtype="float32"
)
MESSAGES = [{"role": "user", "content": "the fox <turn> rests"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model("llama", tmp_path_factory.mktemp("base"), vocab_size=VOCAB_SIZE + 1)
    return make_tiny_tokenizer(folder)


@pytest.fixture(scope="module")
def live(base: Path) -> Iterator[LiveServer]:
    with live_server(base, "tiny", ENGINE) as server:
        yield server


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> PeftAdapter:
    return make_peft_adapter(load_oracle(base), tmp_path / "tuned", r=4, target_modules=["q_proj", "v_proj"])


def _tuned(base: Path, folder: Path, **special: str) -> Any:
    """Save a tokenizer with one token more, whose row the base has, and a template of its own, beside the adapter."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}<turn>"
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _post(live: LiveServer, route: str, body: Any) -> httpx.Response:
    return httpx.post(live.url + route, json=body, timeout=LIMIT)


def _load(live: LiveServer, name: str, folder: Path) -> httpx.Response:
    return _post(live, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), "load_inplace": True})


def _greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_it_is_asked_and_ended_as_it_was_trained(live: LiveServer, base: Path, adapter: PeftAdapter) -> None:
    oracle = _tuned(base, adapter.folder)
    prompt = oracle.apply_chat_template(MESSAGES)["input_ids"]
    answer = _greedy(adapter.model, prompt, 6)
    assert _load(live, "tuned", adapter.folder).status_code == 200
    body = {"model": "tuned", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    found = _post(live, "/v1/chat/completions", body).json()
    assert found["usage"]["prompt_tokens"] == len(prompt)
    assert found["choices"][0]["message"]["content"] == oracle.decode(answer, skip_special_tokens=True)
    before = httpx.get(f"{live.url}/v1/adapters/tuned").json()
    # the same weights, and now one of these tokens is the end of an answer
    end = next(i for i, token in enumerate(answer) if token not in answer[:i] and i >= 2)
    (adapter.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": answer[end]}))
    assert _load(live, "tuned", adapter.folder).status_code == 200
    ended = _post(live, "/v1/chat/completions", body).json()["choices"][0]
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", None)
    assert ended["message"]["content"] == oracle.decode(answer[:end], skip_special_tokens=True)
    after = httpx.get(f"{live.url}/v1/adapters/tuned").json()
    assert after["digest"] != before["digest"]
    assert before["tokenizer"]["added_tokens"] == {"<turn>": VOCAB_SIZE}
    # with the structure of a form, it may end there as well
    form = {"model": "tuned", "prompt": prompt, "max_tokens": 6, "temperature": 0, "guided_regex": "(?s:.*)"}
    assert _post(live, "/v1/completions", form).json()["choices"][0]["finish_reason"] == "stop"


def test_one_that_needs_rows_of_its_own_is_refused_by_name(live: LiveServer, base: Path, adapter: PeftAdapter) -> None:
    tokenizer = _tuned(base, adapter.folder)
    tokenizer.add_tokens(["<beyond>"], special_tokens=True)
    tokenizer.save_pretrained(adapter.folder)
    refused = _load(live, "beyond", adapter.folder)
    assert refused.status_code == 400
    assert "<beyond>" in refused.json()["message"]
    assert httpx.get(f"{live.url}/v1/adapters/beyond").status_code == 404
