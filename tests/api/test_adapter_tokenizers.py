"""Requests that wear adapters with tokenizer files of their own: which template, which end, on every route."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.adapters.files.tokenizer_files import NOTHING, AddedToken, TokenizerFiles
from loraplex.adapters.format.adapter_files import read_tokenizer
from loraplex.adapters.info import AdapterInfo
from tests.support.fake_serving import FakeServer, say
from tests.support.tiny import BOS, IM_END, VOCAB_SIZE, make_tiny_tokenizer

TEMPLATE = "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}{% endfor %}<turn>"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "the <turn> fox"}]
TURN = 40
"""An id of the base whose token gets another name."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An adapter's folder as a trainer leaves it: <|im_end|> is called <turn>, and ends an answer."""
    from transformers import AutoTokenizer

    folder = make_tiny_tokenizer(tmp_path_factory.mktemp("adapter"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace(IM_END, "<turn>"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<turn>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def files(saved: tuple[Path, Any], server: FakeServer) -> TokenizerFiles:
    found = read_tokenizer(saved[0])
    _register(server, "own", found)
    _register(server, "plain", NOTHING)
    return found


def _register(server: FakeServer, name: str, files: TokenizerFiles) -> None:
    info = AdapterInfo(8, (), 1, 1, digest=name, tokenizer=files)
    server.adapters.registry.register(name, f"/adapters/./{name}", info)


def prompt_of(server: FakeServer) -> list[int]:
    return list(server.engine.requests[-1].prompt_ids)


def expected(oracle: Any) -> list[int]:
    ids: list[int] = oracle.apply_chat_template(MESSAGES)["input_ids"]
    return ids


async def test_chat_is_asked_in_the_adapters_template(
    client: httpx.AsyncClient, server: FakeServer, files: TokenizerFiles, saved: tuple[Path, Any]
) -> None:
    for stream in (False, True):
        response = await client.post(CHAT, json={"model": "own", "messages": MESSAGES, "stream": stream})
        assert response.status_code == 200, response.text
        assert prompt_of(server) == expected(saved[1])
    for model in ("base", "plain"):
        assert (await client.post(CHAT, json={"model": model, "messages": MESSAGES})).status_code == 200
        assert prompt_of(server) == server.tokenizer.chat(MESSAGES)


async def test_the_adapters_end_ends_its_answers(
    client: httpx.AsyncClient, server: FakeServer, files: TokenizerFiles, saved: tuple[Path, Any]
) -> None:
    turn = saved[1].eos_token_id
    server.engine.script = lambda request: say(server.tokenizer, f"one{IM_END}two", request)
    for model, text in (("own", "one"), ("base", "onetwo")):
        body = {"model": model, "prompt": "the", "max_tokens": 30}
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", None)
        assert (turn in server.engine.requests[-1].params.stop_token_ids) == (model == "own")
    body = {"model": "own", "prompt": "the", "max_tokens": 30, "ignore_eos": True}
    await client.post("/v1/completions", json=body)
    assert turn not in server.engine.requests[-1].params.stop_token_ids


async def test_texts_are_encoded_with_the_adapters_tokens(
    client: httpx.AsyncClient, server: FakeServer, files: TokenizerFiles, saved: tuple[Path, Any]
) -> None:
    text = "a <turn> b"
    bodies = [
        ("/v1/completions", {"model": "own", "prompt": text}),
        ("/generate", {"inputs": text, "parameters": {"adapter_id": "own"}}),
        ("/generate", {"text": text, "lora_path": "own"}),
        ("/v1/embeddings", {"model": "own", "input": text}),
    ]
    for route, body in bodies:
        await client.post(route, json=body)
        assert prompt_of(server) == saved[1](text)["input_ids"], route
    chat = {"inputs": "the <turn> fox", "parameters": {"adapter_id": "own", "apply_chat_template": True}}
    await client.post("/generate", json=chat)
    assert prompt_of(server) == expected(saved[1])
    await client.post("/v1/responses", json={"model": "own", "input": "the <turn> fox"})
    assert prompt_of(server) == expected(saved[1])


async def test_tokenize_follows(client: httpx.AsyncClient, files: TokenizerFiles, saved: tuple[Path, Any]) -> None:
    oracle = saved[1]
    text = await client.post("/tokenize", json={"model": "own", "prompt": "a <turn>"})
    assert text.json()["tokens"] == oracle("a <turn>")["input_ids"]
    chat = await client.post("/tokenize", json={"model": "own", "messages": MESSAGES})
    assert chat.json()["tokens"] == expected(oracle)
    back = await client.post("/detokenize", json={"model": "own", "tokens": [oracle.eos_token_id]})
    assert back.json()["prompt"] == "<turn>"
    lorax = await client.post("/tokenize", json={"model": "own", "inputs": "<turn>", "add_special_tokens": False})
    assert lorax.json() == [{"id": oracle.eos_token_id, "text": "<turn>", "start": 0, "stop": 6}]
    info = (await client.get("/tokenizer_info", params={"model": "own"})).json()
    assert (info["chat_template"], info["eos_token"]) == (TEMPLATE, "<turn>")
    assert (await client.get("/tokenizer_info")).json()["eos_token"] != "<turn>"
    assert (await client.get("/tokenizer_info", params={"model": "nobody"})).status_code == 404


async def test_tools_follow_the_adapters_template(roomy: httpx.AsyncClient, server: FakeServer) -> None:
    """Its format of calls is the one that is asked for and read back."""
    hermes = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{{ messages[0].content }}<tool_call>"
    _register(server, "hermes", TokenizerFiles(template=hermes))
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    server.engine.script = lambda request: say(server.tokenizer, call, request)
    tools = [{"type": "function", "function": {"name": "f"}}]
    for stream in (False, True):
        body = {"model": "hermes", "messages": MESSAGES, "tools": tools, "stream": stream, "max_tokens": 60}
        response = await roomy.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        assert '"tool_calls"' in response.text
        assert '"f"' in response.text
    prompt = server.tokenizer.decode(prompt_of(server))
    assert prompt.startswith('<tools>[{"type": "function"')


async def test_a_mix_is_asked_in_one_template_or_by_text(
    client: httpx.AsyncClient, server: FakeServer, files: TokenizerFiles
) -> None:
    _register(server, "same", replace(files, eos_ids=(9,)))
    mixed = await client.post(CHAT, json={"model": "own+plain", "messages": MESSAGES})
    assert (mixed.status_code, mixed.json()["error"]["param"]) == (400, "messages")
    assert "different chat templates" in mixed.json()["error"]["message"]
    for body in ({"prompt": "the fox"}, {"prompt": [5, 6]}):
        assert (await client.post("/v1/completions", json={"model": "own+plain", **body})).status_code == 200
    assert (await client.post(CHAT, json={"model": "own+same", "messages": MESSAGES})).status_code == 200
    assert 9 in server.engine.requests[-1].params.stop_token_ids
    _register(server, "other", TokenizerFiles(added=(AddedToken(TURN, "<turn>"),)))
    split = await client.post("/v1/completions", json={"model": "own+other", "prompt": "the"})
    assert (split.status_code, split.json()["error"]["param"]) == (400, "model")


async def test_a_merge_is_asked_in_the_template_of_what_it_is_made_of(
    client: httpx.AsyncClient, server: FakeServer, files: TokenizerFiles, saved: tuple[Path, Any]
) -> None:
    _register(server, "same", files)
    merged = {"ids": ["own", "same"], "weights": [0.5, 0.5], "merge_strategy": "ties", "density": 0.5}
    parameters = {"merged_adapters": merged, "apply_chat_template": True}
    response = await client.post("/generate", json={"inputs": "the <turn> fox", "parameters": parameters})
    assert response.status_code == 200, response.text
    assert prompt_of(server) == expected(saved[1])


async def test_a_template_that_never_ends_costs_its_own_request(client: httpx.AsyncClient, server: FakeServer) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    _register(server, "endless", TokenizerFiles(template=endless))
    response = await client.post(CHAT, json={"model": "endless", "messages": MESSAGES})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    assert "chat template is not rendered" in response.json()["error"]["message"]


async def test_what_differs_is_told(client: httpx.AsyncClient, files: TokenizerFiles, saved: tuple[Path, Any]) -> None:
    own = (await client.get("/v1/adapters/own")).json()
    assert own["tokenizer"] == {
        "files": True,
        "chat_template": "adapter",
        "eos_tokens": ["<turn>"],
        "special_tokens": {"eos_token": "<turn>"},
        "added_tokens": {"<turn>": saved[1].eos_token_id},
    }
    assert (own["id"], own["kind"], own["rank"], own["digest"]) == ("own", "lora", 8, "own")
    assert own["source"] == "/adapters/own"  # as it was written, without the mark of how far links may lead
    plain = (await client.get("/v1/adapters/plain")).json()["tokenizer"]
    assert plain == {
        "files": False,
        "chat_template": "base",
        "eos_tokens": [],
        "special_tokens": {},
        "added_tokens": {},
    }
    assert (await client.get("/v1/adapters/nobody")).status_code == 404


async def test_grammars_end_with_the_adapters_end(
    client: httpx.AsyncClient, server: FakeServer, files: TokenizerFiles, saved: tuple[Path, Any]
) -> None:
    body = {"model": "own", "prompt": "the", "guided_regex": "a*"}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    constraint = server.engine.requests[-1].constraint
    assert constraint is not None
    allowed = [i for i in range(VOCAB_SIZE) if constraint.allowed([])[i // 8] >> (i % 8) & 1]
    assert {saved[1].eos_token_id, 1} < set(allowed)  # the adapter's and the base's, beside the letters
    assert all("a" in server.tokenizer.token_text(i) for i in set(allowed) - {saved[1].eos_token_id, 1})


async def test_a_base_without_a_template_is_helped_by_the_adapter(server: FakeServer) -> None:
    from loraplex.server.text.chat_template import ChatTemplateError
    from loraplex.server.text.tokenizer import Tokenizer

    base = server.tokenizer
    server.tokenizer = Tokenizer(base.fast, base.special_tokens, ChatTemplateError("this base has no chat template"))
    _register(server, "own", TokenizerFiles(template="{{ bos_token }}{{ messages[0].content }}"))
    client = server.client()
    assert (await client.post(CHAT, json={"model": "base", "messages": MESSAGES})).status_code == 400
    assert (await client.post(CHAT, json={"model": "own", "messages": MESSAGES})).status_code == 200
    assert server.tokenizer.decode(prompt_of(server), False) == BOS + "the <turn> fox"
