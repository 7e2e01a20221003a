"""A fine-tune with its tokenizer files on a live server; transformers and PEFT say what is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.live_server import LiveServer
from tests.support.peft_adapters import PeftAdapter, make_peft_adapter
from tests.support.served import greedy
from tests.support.tiny import VOCAB_SIZE, load_oracle, make_tiny_model, make_tiny_tokenizer

MESSAGES = [{"role": "user", "content": "the fox <turn> rests"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model("llama", tmp_path_factory.mktemp("base"), vocab_size=VOCAB_SIZE + 1)
    return make_tiny_tokenizer(folder)


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


def test_it_is_asked_and_ended_as_it_was_trained(live: LiveServer, base: Path, adapter: PeftAdapter) -> None:
    oracle = _tuned(base, adapter.folder)
    prompt = oracle.apply_chat_template(MESSAGES)["input_ids"]
    answer = greedy(adapter.model, prompt, 6)[0]
    assert live.load("tuned", adapter.folder, load_inplace=True).status_code == 200
    body = {"model": "tuned", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    found = live.ask("POST", "/v1/chat/completions", json=body).json()
    assert found["usage"]["prompt_tokens"] == len(prompt)
    assert found["choices"][0]["message"]["content"] == oracle.decode(answer, skip_special_tokens=True)
    before = live.ask("GET", "/v1/adapters/tuned").json()
    # the same weights, and now one of these tokens is the end of an answer
    end = next(i for i, token in enumerate(answer) if token not in answer[:i] and i >= 2)
    (adapter.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": answer[end]}))
    assert live.load("tuned", adapter.folder, load_inplace=True).status_code == 200
    ended = live.ask("POST", "/v1/chat/completions", json=body).json()["choices"][0]
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", None)
    assert ended["message"]["content"] == oracle.decode(answer[:end], skip_special_tokens=True)
    after = live.ask("GET", "/v1/adapters/tuned").json()
    assert after["digest"] != before["digest"]
    assert before["tokenizer"]["added_tokens"] == {"<turn>": VOCAB_SIZE}
    # with the structure of a form, it may end there as well
    form = {"model": "tuned", "prompt": prompt, "max_tokens": 6, "temperature": 0, "guided_regex": "(?s:.*)"}
    assert live.ask("POST", "/v1/completions", json=form).json()["choices"][0]["finish_reason"] == "stop"


def test_one_that_needs_rows_of_its_own_is_refused_by_name(live: LiveServer, base: Path, adapter: PeftAdapter) -> None:
    tokenizer = _tuned(base, adapter.folder)
    tokenizer.add_tokens(["<beyond>"], special_tokens=True)
    tokenizer.save_pretrained(adapter.folder)
    refused = live.load("beyond", adapter.folder)
    assert refused.status_code == 400
    assert "<beyond>" in refused.json()["message"]
    assert live.ask("GET", "/v1/adapters/beyond").status_code == 404
