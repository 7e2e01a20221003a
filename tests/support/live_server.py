"""A whole server on a free loopback port, in a thread of the test's process: real engine, real sockets."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml

from loraplex.server.catalog.state_store import StateStore
from loraplex.server.command.app import create_app
from loraplex.server.command.build import EngineParts, build_engine
from loraplex.server.command.compose import make_services
from loraplex.server.command.load import read_defaults, read_tokenizers
from loraplex.server.config import RunConfig, ServeConfig
from loraplex.server.config_access import AuthConfig
from loraplex.server.config_adapters import AdaptersConfig, DownloadConfig
from loraplex.server.config_engine import EngineConfig
from loraplex.server.http.listening import bind, make_server
from loraplex.server.models.config import ModelConfig
from loraplex.server.text.grammar import Grammars
from loraplex.server.text.tokenizer import Tokenizer
from tests.support.waiting import LIMIT, wait_for

TINY = EngineConfig(device="cpu", dtype="float32", memory=64 << 20, max_num_seqs=16, token_budget=64)
"""An engine for tiny models."""


@dataclass(frozen=True)
class Api:
    """What is asked of a server, wherever it runs."""

    url: str
    keys: dict[str, str] = field(default_factory=dict, kw_only=True)  # name -> secret

    def ask(self, method: str, path: str, key: str | None = None, **fields: Any) -> httpx.Response:
        """Ask with the key of that name; None: without one."""
        headers = dict(fields.pop("headers", {})) | (
            {} if key is None else {"Authorization": f"Bearer {self.keys[key]}"}
        )
        return httpx.request(method, f"{self.url}{path}", headers=headers, timeout=LIMIT, **fields)

    def load(self, name: str, folder: Path | str, key: str | None = None, **fields: Any) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(folder), **fields}
        return self.ask("POST", "/v1/load_lora_adapter", key, json=body)

    def unload(self, name: str, key: str | None = None) -> httpx.Response:
        return self.ask("POST", "/v1/unload_lora_adapter", key, json={"lora_name": name})

    def complete(self, model: str = "tiny", tokens: int = 20, **fields: Any) -> httpx.Response:
        """As many tokens as asked for, greedily."""
        body = {"model": model, "prompt": "the", "max_tokens": tokens, "ignore_eos": True, "temperature": 0, **fields}
        return self.ask("POST", "/v1/completions", json=body)

    def text(self, model: str = "tiny", tokens: int = 20, **fields: Any) -> str:
        """What they say."""
        answer = self.complete(model, tokens, **fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def names(self) -> set[str]:
        """Of all models that are listed."""
        return {card["id"] for card in self.ask("GET", "/v1/models").json()["data"]}


@dataclass(frozen=True)
class LiveServer(Api):
    parts: EngineParts
    tokenizer: Tokenizer

    def openai(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """The official client with the key of that name, or with what is no key's name as its secret."""
        secret = self.keys.get(key, key)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=secret, max_retries=0, **options)

    def idle(self) -> None:
        """Wait until nobody runs and neither a page for keys and values nor a lease is held."""
        registry = self.parts.adapters.registry
        wait_for(lambda: self.parts.engine.stats().running == 0)
        wait_for(lambda: self.parts.engine.stats().kv_usage == 0)
        wait_for(lambda: not any(registry.leases(version) for version in registry.list()))


@contextmanager
def live_server(
    base: Path,
    name: str = "tiny",
    engine: EngineConfig = TINY,
    *,
    keys: Iterable[tuple[str, str]] = (),
    auth: AuthConfig | None = None,
    downloads: DownloadConfig = DownloadConfig(),
    state: Path | None = None,
    load_inplace: bool = False,
) -> Iterator[LiveServer]:
    """Serve the checkpoint in `base` as `name` while the block runs. keys: what new_key() made; state: --state-dir."""
    with tempfile.TemporaryDirectory() as folder:
        made = tuple(keys)
        secrets = {yaml.safe_load(entry)[0]["name"]: secret for secret, entry in made}
        auth = auth or AuthConfig()
        if made:
            (Path(folder) / "keys.yaml").write_text("keys:\n" + "".join(entry for _, entry in made))
            auth = replace(auth, keys_file=Path(folder) / "keys.yaml")
        adapters, run = (
            AdaptersConfig(downloads=downloads, load_inplace=load_inplace),
            RunConfig(grace_seconds=1, state_dir=state),
        )
        with _listening(ServeConfig(str(base), (name,), None, adapters, auth=auth, engine=engine, run=run)) as live:
            yield replace(live, keys=secrets)


@contextmanager
def _listening(config: ServeConfig) -> Iterator[LiveServer]:
    base = Path(config.base)
    model_config, defaults = ModelConfig.from_hf(base), read_defaults(base)
    tokenizers = read_tokenizers(base, model_config.vocab_size, defaults.eos_token_ids)
    grammars = Grammars(tokenizers.base, tokenizers.rows, tokenizers.eos_ids)
    parts = build_engine(
        config.engine,
        base,
        *config.base_names,
        model_config=model_config,
        check_tokenizer=tokenizers.check,
        downloads=config.adapters.downloads,
    )
    held = bind("127.0.0.1", 0)
    listening = threading.Event()
    state = StateStore(config.run.state_dir)
    app = create_app(make_services(config, state, parts, tokenizers, defaults, grammars))
    server = make_server(app, lambda port: listening.set())
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[held])))
    parts.engine.start()
    thread.start()
    try:
        assert listening.wait(LIMIT)
        yield LiveServer(f"http://127.0.0.1:{held.getsockname()[1]}", parts, tokenizers.base)
    finally:
        server.close()
        thread.join(LIMIT)
        parts.engine.stop()
        parts.adapters.close()
        state.close()
        tokenizers.close()
        held.close()
