"""SGLang's way to send an adapter to a whole server: its weights as safetensors in a JSON body, and never pickled."""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from loraplex.adapters.sources.remote import CONFIG_FILE, WEIGHTS_FILE
from loraplex.server.config_adapters import DownloadConfig
from loraplex.server.tenancy.keys_file import new_key
from tests.support.left_files import left
from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import ALL, make_peft_adapter
from tests.support.served import greedy
from tests.support.waiting import wait_for

MOST = 400_000
"""Bytes of one adapter; those of the tests have some 60,000."""


@pytest.fixture(scope="module")
def spooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what comes is written."""
    return tmp_path_factory.mktemp("spool")


@pytest.fixture(scope="module")
def made(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An adapter by PEFT."""
    return make_peft_adapter(oracle, tmp_path_factory.mktemp("adapters") / "one", seed=1, r=4, target_modules=ALL)


@pytest.fixture(scope="module")
def live(base: Path, spooled: Path) -> Iterator[LiveServer]:
    with live_server(base, downloads=DownloadConfig(folder=spooled, max_bytes=MOST)) as server:
        yield server


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def body(folder: Path, name: str = "sql", **fields: Any) -> dict[str, Any]:
    """What a client sends of the folder's adapter."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    weights = text((folder / WEIGHTS_FILE).read_bytes())
    return {"lora_name": name, "config_dict": config, "serialized_tensors": weights, **fields}


def send(live: LiveServer, fields: dict[str, Any], key: str | None = None) -> httpx.Response:
    return live.ask("POST", "/load_lora_adapter_from_tensors", key, json=fields)


@pytest.mark.parametrize("newer", [False, True])
def test_safetensors_are_served(live: LiveServer, made: Any, spooled: Path, newer: bool) -> None:
    fields = body(made.folder, load_format="safetensors", pinned=False, lora_id="7")
    if newer:
        fields["serialized_named_tensors"] = [fields.pop("serialized_tensors")]
    answer = send(live, fields)
    assert (answer.status_code, answer.json()["success"]) == (200, True), answer.text
    assert "sql" in answer.json()["loaded_adapters"]
    expected = live.tokenizer.decode(greedy(made.model, live.tokenizer.encode("the"), 20)[0])
    assert live.text("sql") == expected != live.text("tiny")
    again = send(live, fields)
    assert (again.status_code, again.json()["code"]) == (400, "adapter_exists")
    wait_for(lambda: len(left(spooled)) == 2)
    assert live.text("sql") == expected
    assert live.ask("POST", "/unload_lora_adapter", json={"lora_name": "sql"}).status_code == 200
    wait_for(lambda: left(spooled) == [])


def wrong(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Code, and what is sent in place of the fields that are right."""
    tensors = safetensors.torch.load((folder / WEIGHTS_FILE).read_bytes())
    weights, saved = safetensors.torch.save(tensors), io.BytesIO()
    torch.save(tensors, saved)
    named = {name: tensor.tolist() for name, tensor in tensors.items()}
    return {
        "pickled": ("pickled_tensors", {"serialized_tensors": text(pickle.dumps(named))}),
        "pickled, an old protocol": ("pickled_tensors", {"serialized_tensors": text(pickle.dumps(named, 2))}),
        "by torch.save": ("pickled_tensors", {"serialized_tensors": text(saved.getvalue())}),
        "pickled in one tensor": ("pickled_tensors", {"load_format": "flattened_bucket"}),
        "another format": ("invalid_value", {"load_format": "gguf"}),
        "no base64": ("invalid_encoding", {"serialized_tensors": "§"}),
        "half of it": ("invalid_encoding", {"serialized_tensors": text(weights)[:-3]}),
        "cut short": ("bad_file", {"serialized_tensors": text(weights[:-9])}),
        "no weights": ("incomplete_upload", {"serialized_tensors": ""}),
        "of two ranks": ("incomplete_upload", {"serialized_named_tensors": ["", text(weights)]}),
        "no config": ("incomplete_upload", {"config_dict": {}}),
        "another config": ("bad_config", {"config_dict": {"peft_type": "LORA"}}),
        "too large": ("request_too_large", {"serialized_tensors": text(weights + bytes(MOST))}),
        "tokens of its own": ("unsupported_parameter", {"added_tokens_config": {"<x>": 259}}),
        "no name": ("invalid_name", {"lora_name": ""}),
        "the base's name": ("invalid_name", {"lora_name": "tiny"}),
        "the server's own": ("invalid_name", {"lora_name": "pushed/x"}),
    }


CASES = (
    *("pickled", "pickled, an old protocol", "by torch.save", "pickled in one tensor", "another format", "no base64"),
    *("half of it", "cut short", "no weights", "of two ranks", "no config", "another config", "too large"),
    *("tokens of its own", "no name", "the base's name", "the server's own"),
)


def test_every_case_is_named(made: Any) -> None:
    assert set(CASES) == set(wrong(made.folder))


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused(live: LiveServer, made: Any, spooled: Path, case: str) -> None:
    code, fields = wrong(made.folder)[case]
    names = live.names()
    answer = send(live, {**body(made.folder), **fields})
    assert (answer.status_code, answer.json()["code"], answer.json()["success"]) == (400, code, False), answer.text
    assert str(spooled) not in answer.text
    assert live.names() == names
    wait_for(lambda: left(spooled) == [])


def test_a_tenant_may_send_its_own(base: Path, made: Any, tmp_path: Path) -> None:
    keys = [new_key("alice", "acme", max_pushed_bytes=100), new_key("bob", "byte"), new_key("root", "ops", admin=True)]
    with live_server(base, keys=keys, downloads=DownloadConfig(folder=tmp_path, max_bytes=MOST)) as server:

        def code(name: str, key: str, **fields: Any) -> Any:
            return send(server, body(made.folder, name, **fields), key).json().get("code")

        assert code("acme/x", "bob") == "forbidden"
        assert code("acme/x", "alice") == "quota_exceeded"
        assert code("byte/x", "bob", pinned=True) == "invalid_value"
        assert left(tmp_path) == []
        assert code("byte/x", "bob") is None
        assert code("shared", "root", pinned=True) is None
        assert send(server, body(made.folder)).status_code == 401
