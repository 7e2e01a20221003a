"""Norms, tokens and tables of adapters' own, LoRA on tables, in one batch with LoRA and the base: PEFT's answers."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import ALL, PeftAdapter, make_peft_adapter
from tests.support.served import greedy
from tests.support.tiny import VOCAB_SIZE, load_oracle, make_tiny_model, make_tiny_tokenizer
from tests.support.waiting import LIMIT

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = 12
ADDED = ("<turn>", "<beyond>", "<end>")
TURN, BEYOND, END = range(VOCAB_SIZE, VOCAB_SIZE + 3)
LORA: dict[str, Any] = {"r": 4, "target_modules": ALL}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "ln": {"kind": "LN_TUNING", "target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]},
    "tokens": {**LORA, "trainable_token_indices": list(range(1, 310, 2))},
    "tables": {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]},
    "changed": {"r": 5, "target_modules": ["q_proj", "embed_tokens", "lm_head"], "lora_alpha": 8},
    "embedded": {"r": 3, "target_modules": ["embed_tokens"], "ensure_weight_tying": True},
}
PROMPTS = ([5, 9, 200, 31, 7, 8, 301], [77, 4, 4, 19], list(range(20, 90)))


@dataclass
class _World:
    live: LiveServer
    models: dict[str, Any]
    folders: dict[str, Path]


def _add_tokens(base: Path, hf: Any, folder: Path, *, save_tables: bool) -> PeftAdapter:
    """A LoRA on a base with three tokens more, both tables in its file, and a tokenizer that has them."""
    from transformers import AutoTokenizer

    resized = copy.deepcopy(hf)
    resized.resize_token_embeddings(VOCAB_SIZE + len(ADDED))
    with torch.no_grad():  # so strong that they are drawn
        head = resized.lm_head.weight
        generator = torch.Generator().manual_seed(3)
        head[VOCAB_SIZE:] = torch.randn(len(ADDED), head.shape[1], generator=generator) * head.std() * 1.5
        embed = resized.model.embed_tokens.weight
        embed[VOCAB_SIZE:] = torch.randn(len(ADDED), head.shape[1], generator=generator) * embed.std()
    options = {"modules_to_save": ["embed_tokens", "lm_head"]} if save_tables else {}
    adapter = make_peft_adapter(resized, folder, seed=9, **LORA, **options)
    adapter.model.save_pretrained(folder, save_embedding_layers=not save_tables)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(ADDED), special_tokens=False)
    tokenizer.save_pretrained(folder)
    return adapter


@pytest.fixture(scope="module", params=["llama", "smollm2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_World]:
    base = make_tiny_tokenizer(make_tiny_model(request.param, tmp_path_factory.mktemp("base")))
    hf, root = load_oracle(base), tmp_path_factory.mktemp("made")
    tied = hf.config.tie_word_embeddings
    made = {
        name: make_peft_adapter(hf, root / name, seed=seed, **options)
        for seed, (name, options) in enumerate(OPTIONS.items(), 1)
    }
    made["added"] = _add_tokens(base, hf, root / "added", save_tables=False)
    if not tied:
        made["added tables"] = _add_tokens(base, hf, root / "added tables", save_tables=True)
    names = {name: name.replace(" ", "-") for name in made}
    with live_server(base, "tiny") as live:
        for name, adapter in made.items():
            answer = live.load(names[name], adapter.folder)
            assert answer.status_code == 200, answer.text
        models = {names[name]: adapter.model for name, adapter in made.items()}
        folders = {names[name]: adapter.folder for name, adapter in made.items()}
        yield _World(live, {"tiny": hf, **models}, folders)


async def _ask(client: httpx.AsyncClient, name: str, prompt: list[int]) -> list[float]:
    """Return the log-probabilities of a greedy answer's tokens, which tell each token from all others."""
    body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return [float(logprob) for logprob in answer.json()["choices"][0]["logprobs"]["token_logprobs"]]


def _prompts(name: str) -> list[list[int]]:
    """Of an adapter that has added tokens, with them in it."""
    return [[*prompt, TURN, BEYOND] if name.startswith("added") else list(prompt) for prompt in PROMPTS]


async def test_greedy_tokens_are_pefts_in_one_batch(world: _World) -> None:
    expected = {
        (name, i): greedy(model, prompt, TOKENS)
        for name, model in world.models.items()
        for i, prompt in enumerate(_prompts(name))
    }
    assert any(
        token >= VOCAB_SIZE for (name, _), (answer, _) in expected.items() if name == "added" for token in answer
    )
    async with httpx.AsyncClient(base_url=world.live.url, timeout=LIMIT) as client:
        asked = [(name, i) for _ in range(2) for name, i in expected]
        answers = await asyncio.gather(*(_ask(client, name, _prompts(name)[i]) for name, i in asked))
    for place, answer in zip(asked, answers, strict=True):
        assert answer == pytest.approx(expected[place][1], abs=2e-4), place


def test_tables_that_are_the_bases_own_take_no_pages(world: _World) -> None:
    """Beside the LoRA, "added" has three rows of each table and "tables" all of both."""
    names = ("lora", "added", "changed", "tables")
    pages = {name: world.live.ask("GET", f"/v1/adapters/{name}").json()["pages"] for name in names}
    assert pages["added"] <= pages["lora"] + 1
    assert pages["changed"] < pages["tables"]  # PEFT saves the tables beside the factors


def test_changes_of_tables_mix(world: _World) -> None:
    """A whole weight and none are the adapter alone; others are others."""
    body = {"prompt": PROMPTS[2], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 0}

    def ask(model: str) -> list[float]:
        answer = world.live.ask("POST", "/v1/completions", json={**body, "model": model})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"][0]["logprobs"]["token_logprobs"])

    alone = [ask(name) for name in ("changed", "embedded")]
    assert ask("changed*1.0+embedded*0.0") == pytest.approx(alone[0], abs=1e-5)
    assert ask("changed*0.0+embedded*1.0") == pytest.approx(alone[1], abs=1e-5)
    assert ask("changed*0.5+changed*0.5") == pytest.approx(alone[0], abs=1e-5)
    assert ask("changed*0.5+embedded*0.5") != pytest.approx(alone[0], abs=1e-2)


def test_texts_know_the_added_tokens(world: _World) -> None:
    body = {"model": "added", "prompt": "the fox<turn>", "max_tokens": 1, "temperature": 0, "echo": True}
    answer = world.live.ask("POST", "/v1/completions", json=body).json()
    assert answer["choices"][0]["text"].startswith("the fox<turn>")
    beyond = {**body, "model": "lora", "prompt": [5, TURN]}
    assert world.live.ask("POST", "/v1/completions", json=beyond).status_code == 400
    scored = {**body, "prompt": [5, TURN, 9, BEYOND], "max_tokens": 1, "logprobs": 2}
    found = world.live.ask("POST", "/v1/completions", json=scored).json()["choices"][0]["logprobs"]["token_logprobs"]
    with torch.no_grad():
        logits = world.models["added"](torch.tensor([[5, TURN, 9, BEYOND]])).logits[0].float().log_softmax(-1)
    wanted = [float(logits[i, token]) for i, token in enumerate((TURN, 9, BEYOND))]
    assert found[1:4] == pytest.approx(wanted, abs=2e-4)


def test_an_added_token_ends_an_answer_and_a_form(world: _World) -> None:
    folder = world.folders["added"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    assert world.live.load("added", folder, load_inplace=True).status_code == 200
    for more in ({}, {"guided_regex": "[a-z ]{2,6}"}, {"guided_regex": "(a|b)"}):
        body = {"model": "added", "prompt": [5, TURN], "max_tokens": 40, "temperature": 0, "logit_bias": {}, **more}
        choice = world.live.ask("POST", "/v1/completions", json=body).json()["choices"][0]
        assert choice["finish_reason"] in ("stop", "length")
        assert not more or choice["finish_reason"] == "stop"
        assert not any(text in choice["text"] for text in ADDED) or not more


@pytest.mark.parametrize("model", ["ln*0.5+lora*0.5", "lora+tokens", "tables*0.5", "ln+ln"])
def test_what_has_rows_of_its_own_does_not_mix(world: _World, model: str) -> None:
    body = {"model": model, "prompt": [5], "max_tokens": 1}
    answer = world.live.ask("POST", "/v1/completions", json=body)
    assert answer.status_code == 400
    assert "of its own in place of the base's" in answer.json()["error"]["message"]
