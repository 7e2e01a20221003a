"""Bottlenecks below a whole server, in one batch with the base and a LoRA; the oracle is the `adapters` library."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loraplex.server.command.convert import convert_folder
from tests.adapters.format.record_bottlenecks import IDS
from tests.adapters.format.test_bottleneck import save_as_the_library, saved
from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import QV, make_peft_adapter
from tests.support.served import greedy
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer
from tests.support.waiting import LIMIT

pytestmark = pytest.mark.filterwarnings("ignore")

ADAPTERS = {"houlsby": "Houlsby", "pfeiffer": "Pfeiffer", "parallel": "parallel", "compacter": "Compacter"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, dict[str, list[int]]]]:
    """The server, and by model the tokens that follow IDS."""
    folder = tmp_path_factory.mktemp("made")
    base = make_tiny_tokenizer(make_tiny_model("llama", folder / "base"))
    oracle, expected = load_oracle(base), {}
    lora = make_peft_adapter(oracle, folder / "lora", r=4, target_modules=QV)
    with live_server(base) as live:
        assert live.load("lora", lora.folder).status_code == 200
        for name, case in ADAPTERS.items():
            convert_folder(save_as_the_library(case, folder / f"saved {name}"), folder / name)
            assert live.load(name, folder / name).status_code == 200
            expected[name] = saved(case)[1]["greedy"].tolist()
        tokens = len(expected["houlsby"])
        expected |= {name: greedy(model, IDS, tokens)[0] for name, model in (("tiny", oracle), ("lora", lora.model))}
        yield live, expected


async def ask(client: httpx.AsyncClient, model: str, tokens: int) -> str:
    body = {"model": model, "prompt": IDS, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def test_greedy_tokens_are_the_librarys_under_mixed_load(
    served: tuple[LiveServer, dict[str, list[int]]],
) -> None:
    live, expected = served
    tokens = len(expected["houlsby"])
    wanted = {model: live.tokenizer.decode(ids) for model, ids in expected.items()}
    wanted["pfeiffer*0.5+pfeiffer*0.5"] = wanted["pfeiffer"]
    wanted["houlsby*0.0+lora*1.0"] = wanted["lora"]
    assert len(set(wanted.values())) == len(expected), "an answer tells no adapter from another"
    async with httpx.AsyncClient(base_url=live.url, timeout=LIMIT) as client:
        asked = [model for _ in range(4) for model in wanted]
        answers = await asyncio.gather(*(ask(client, model, tokens) for model in asked))
    assert answers == [wanted[model] for model in asked]


def test_what_is_told_of_a_bottleneck(served: tuple[LiveServer, dict[str, list[int]]]) -> None:
    receipt = served[0].ask("GET", "/v1/adapters/houlsby").json()
    assert (receipt["kind"], receipt["rank"]) == ("bottleneck", 8)
    assert receipt["targets"] == ["attention_out", "mlp_out"]


def test_the_same_after_it_has_left_and_come_back(
    served: tuple[LiveServer, dict[str, list[int]]], tmp_path: Path
) -> None:
    live, expected = served
    convert_folder(save_as_the_library("Houlsby", tmp_path / "saved"), tmp_path / "again")
    wanted = live.tokenizer.decode(expected["houlsby"])
    for _ in range(2):
        assert live.load("again", tmp_path / "again").status_code == 200
        assert live.text("again", len(expected["houlsby"]), prompt=IDS) == wanted
        assert live.unload("again").status_code == 200
