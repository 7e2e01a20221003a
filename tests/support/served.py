"""A live server of a tiny model with adapters made by PEFT, beside the models that say what each of them answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch

from loraplex.server.command import cli
from loraplex.server.config_engine import EngineConfig
from tests.support.live_server import TINY, LiveServer, live_server
from tests.support.peft_adapters import make_peft_adapter
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer


def greedy(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """What transformers' or PEFT's `model` says, with its whole context at every token, and their log-probabilities."""
    ids, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(tokens):
            row = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            ids.append(int(row.argmax()))
            logprobs.append(float(row.max()))
    return ids[len(prompt) :], logprobs


@dataclass(frozen=True)
class Served:
    live: LiveServer
    client: openai.OpenAI
    oracles: dict[str, Any]  # name -> transformers' or PEFT's model; "tiny" is the base
    folders: dict[str, Path]  # of adapters, by name

    def greedy(self, name: str, prompt: list[int], tokens: int) -> list[int]:
        return greedy(self.oracles[name], prompt, tokens)[0]

    def logprobs(self, name: str, ids: list[int]) -> torch.Tensor:
        """[len(ids), vocab] of the token after each."""
        with torch.no_grad():
            return self.oracles[name](torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def text(self, ids: list[int]) -> str:
        return self.live.tokenizer.decode(ids)


@contextmanager
def serve_tiny(
    base: Path,
    oracle: Any,
    folder: Path,
    adapters: Mapping[str, Mapping[str, Any]],
    *,
    loaded: Iterable[str] | None = None,
    engine: EngineConfig = TINY,
) -> Iterator[Served]:
    """Serve `base` as "tiny". adapters: name -> options of make_peft_adapter; loaded: those of them, by default all."""
    made = {
        name: make_peft_adapter(oracle, folder / name, seed=seed, **options)
        for seed, (name, options) in enumerate(adapters.items())
    }
    folders = {name: adapter.folder for name, adapter in made.items()}
    with live_server(base, "tiny", engine) as live:
        for name in folders if loaded is None else loaded:
            answer = live.load(name, folders[name])
            assert answer.status_code == 200, answer.text
        with live.openai() as client:
            yield Served(live, client, {"tiny": oracle} | {n: a.model for n, a in made.items()}, folders)


@contextmanager
def serve_new(folder: Path, adapters: Mapping[str, Mapping[str, Any]], **options: Any) -> Iterator[Served]:
    """Serve a llama made in `folder` with adapters, as serve_tiny does."""
    base = make_tiny_tokenizer(make_tiny_model("llama", folder / "base"))
    with serve_tiny(base, load_oracle(base), folder / "made", adapters, **options) as served:
        yield served


def run(served: Served, *given: str) -> int:
    """Run `loraplex adapters ...` against the server, in this process. Returns its exit code."""
    try:
        return int(cli.app(["adapters", *given, "--url", served.live.url], standalone_mode=False) or 0)
    except SystemExit as ended:
        return int(ended.code or 0)
