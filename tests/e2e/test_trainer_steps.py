"""An adapter of one name that a trainer replaces each step, as prime-rl does, under whoever is reading."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.server.config_access import AuthConfig
from loraplex.server.tenancy.keys_file import new_key
from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import ALL, make_peft_adapter
from tests.support.served import greedy


@pytest.fixture(scope="module")
def steps(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What three steps of a training wrote."""
    folder = tmp_path_factory.mktemp("broadcasts")
    return [make_peft_adapter(oracle, folder / f"step_{step}", seed=step, r=4, target_modules=ALL) for step in range(3)]


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/load_lora_adapter"])
@pytest.mark.parametrize("same_folder", [False, True])
def test_the_name_has_the_last_step(
    live: LiveServer, steps: list[Any], tmp_path: Path, path: str, same_folder: bool
) -> None:
    """A stream that began with a step ends with it."""
    name, prompt, streams = f"step-{path.count('/')}-{same_folder}", live.tokenizer.encode("the"), []
    expected = [live.tokenizer.decode(greedy(step.model, prompt, 20)[0]) for step in steps]
    assert len(set(expected)) == len(steps)
    fields: dict[str, Any] = {"prompt": "the", "max_tokens": 20, "temperature": 0, "extra_body": {"ignore_eos": True}}
    for step, text in zip(steps, expected, strict=True):
        folder = shutil.copytree(step.folder, tmp_path / "now", dirs_exist_ok=True) if same_folder else step.folder
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        answer = live.ask("POST", path, json=body)
        assert answer.status_code == 200, answer.text
        assert live.text(name) == text
        stream = iter(live.openai().completions.create(model=name, stream=True, **fields))
        streams.append((next(stream).choices[0].text, stream))
    for text, (begun, stream) in zip(expected, streams, strict=True):
        assert begun + "".join(chunk.choices[0].text for chunk in stream) == text
    body = {"lora_name": name, "lora_path": str(steps[0].folder)}
    assert live.ask("POST", path, json=body).status_code == 400


def test_prime_rls_own_requests_with_the_option(base: Path, steps: list[Any]) -> None:
    """Name and path alone at every step, and the last again as after a lost answer; compare-and-swap is as ever.

    As prime-rl 005c286c sends them, src/prime_rl/utils/client.py: setup_admin_clients, load_lora_adapter.
    """
    keys = [new_key("trainer", "ops", admin=True), new_key("alice", "acme"), new_key("bob", "byte")]
    auth = AuthConfig(allowed_paths=(steps[0].folder.parent,))
    with live_server(base, keys=keys, auth=auth, load_inplace=True) as live:
        prompt = live.tokenizer.encode("the")

        async def load_lora_adapter(name: str, path: Path, key: str = "trainer") -> httpx.Response:
            headers = {"Authorization": f"Bearer {live.keys[key]}"}
            async with httpx.AsyncClient(base_url=live.url, headers=headers, timeout=httpx.Timeout(60)) as client:
                body = {"lora_name": name, "lora_path": path.as_posix()}
                return await client.post("/load_lora_adapter", json=body)

        def says(name: str) -> str:
            fields: dict[str, Any] = {"prompt": "the", "max_tokens": 20, "temperature": 0}
            answer = live.openai("trainer").completions.create(model=name, extra_body={"ignore_eos": True}, **fields)
            return answer.choices[0].text

        for step in [*steps, steps[-1]]:
            asyncio.run(load_lora_adapter("policy", step.folder)).raise_for_status()
            assert says("policy") == live.tokenizer.decode(greedy(step.model, prompt, 20)[0])
        last = live.parts.adapters.registry.get("policy")
        assert last is not None
        assert last.digest is not None
        first = steps[0].folder
        assert live.load("policy", first, "trainer", load_inplace=False).status_code == 400
        for lost in ("", "0" * 12):
            answer = live.load("policy", first, "trainer", expected_version=lost)
            assert (answer.status_code, answer.json()["error"]["present"]) == (409, last.digest)
        for key in ("alice", "bob"):
            assert asyncio.run(load_lora_adapter("policy", first, key)).status_code == 400
            assert live.load("policy", first, key).status_code == 403
        assert live.parts.adapters.registry.get("policy") == last
        assert live.load("policy", first, "trainer", expected_version=last.digest).status_code == 200
