"""Adapters of several kinds below a whole server, in one batch with the base: PEFT says what each answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.adapter_reading import put
from tests.support.peft_adapters import ALL, DOWN, UNTRAINED
from tests.support.served import Served, serve_tiny
from tests.support.served import greedy as served_greedy
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer
from tests.support.waiting import LIMIT

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = 12
PROMPTS = ("the other one, and the end of it", "an answer", "the quick brown fox jumps over the lazy dog again " * 3)
CLOSE = 2e-4
"""Log-probabilities in fp32, summed in another order."""

FILES = ("adapter_config.json", "adapter_model.safetensors")
IA3: dict[str, Any] = {
    "kind": "IA3",
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": DOWN,
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "ia3": IA3,
    "other": {**IA3, "target_modules": ALL},
    "lora": {"r": 4, "target_modules": ALL},
    "dora": {"r": 4, "use_dora": True, "target_modules": ALL},
    "pissa": {"r": 4, "init_lora_weights": "pissa", "target_modules": ALL},
    "loha": {**UNTRAINED, "kind": "LOHA", "r": 3},
    "vera": {**UNTRAINED, "kind": "VERA", "r": 8, "save_projection": False},
    "hra": {**UNTRAINED, "kind": "HRA"},
    "lokr": {**UNTRAINED, "kind": "LOKR", "r": 2, "decompose_factor": 4, "alpha": 8},
    "gralora": {**UNTRAINED, "kind": "GRALORA"},
    "bdlora": {"r": 4, "target_modules": ALL, "use_bdlora": {"target_modules_bd_b": ["proj"], "nblocks": 2}},
    "shira": {"kind": "SHIRA", "r": 4, "target_modules": ALL, "random_seed": 1, "init_weights": False},
    "hira": {**UNTRAINED, "kind": "HIRA"},
    "oft": {"kind": "OFT", "oft_block_size": 16, "target_modules": ALL, "init_weights": False},
    "boft": {"kind": "BOFT", "boft_block_size": 8, "target_modules": ["k_proj", "down_proj"], "init_weights": False},
    "glora": {"kind": "GLORA", "r": 2, "target_modules": ALL},
}


LOADED = tuple(name for name in ADAPTERS if name != "other")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A base with biases on all linears."""
    path = make_tiny_tokenizer(make_tiny_model("llama_biased", tmp_path_factory.mktemp("base")))
    folder = tmp_path_factory.mktemp("made")
    with serve_tiny(path, load_oracle(path), folder, ADAPTERS, loaded=LOADED) as made:
        yield made  # the other is loaded on first use


Answer = list[tuple[int, float]]
"""Ids of tokens and their log-probabilities."""


def greedy(served: Served, name: str, prompt: str) -> Answer:
    """What PEFT answers."""
    found = served_greedy(served.oracles[name], served.live.tokenizer.encode(prompt), TOKENS)
    return list(zip(*found, strict=True))


def ids_of(answer: Answer) -> tuple[int, ...]:
    return tuple(token for token, _ in answer)


def assert_same(found: Answer, wanted: Answer) -> None:
    assert ids_of(found) == ids_of(wanted)
    assert [logprob for _, logprob in found] == pytest.approx([logprob for _, logprob in wanted], abs=CLOSE)


async def ask(client: httpx.AsyncClient, adapter: str | None, prompt: str) -> Answer:
    """A greedy answer over LoRAX's route; adapter: a name, or a folder to be loaded on first use."""
    parameters = {"max_new_tokens": TOKENS, "ignore_eos_token": True, "details": True, "adapter_id": adapter}
    parameters["adapter_source"] = "local"
    answer = await client.post("/generate", json={"inputs": prompt, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return [(token["id"], token["logprob"]) for token in answer.json()["details"]["tokens"]]


async def test_greedy_tokens_are_pefts_under_mixed_load(served: Served) -> None:
    """Over a hundred requests at once: a dozen adapters of ten kinds and the base, each as PEFT answers it alone."""
    names = {name: name for name in LOADED} | {"other": str(served.folders["other"]), "tiny": None}
    expected = {(name, prompt): greedy(served, name, prompt) for name in names for prompt in PROMPTS}
    for prompt in PROMPTS:
        assert len({ids_of(expected[name, prompt]) for name in names}) == len(names), (
            "an answer tells no adapter from another"
        )
    async with httpx.AsyncClient(base_url=served.live.url, timeout=LIMIT) as client:
        asked = [(name, prompt) for _ in range(4) for prompt in PROMPTS for name in names]
        answers = await asyncio.gather(*(ask(client, names[name], prompt) for name, prompt in asked))
    for place, answer in zip(asked, answers, strict=True):
        assert_same(answer, expected[place])


def test_what_is_told_of_adapters_that_are_computed(served: Served) -> None:
    names = ("pissa", "loha", "vera", "hra", "lokr", "gralora")
    receipts = {name: served.live.ask("GET", f"/v1/adapters/{name}").json() for name in names}
    assert {name: (receipt["kind"], receipt["rank"]) for name, receipt in receipts.items()} == {
        "pissa": ("lora", 8),
        "loha": ("loha", 9),
        "vera": ("vera", 8),
        "hra": ("hra", 4),
        "lokr": ("lokr", 8),
        "gralora": ("gralora", 4),
    }
    assert "its start (pissa) is computed again" in receipts["pissa"]["remark"]
    assert all(receipt["remark"] is None for name, receipt in receipts.items() if name != "pissa")


def test_what_is_told_of_an_ia3_adapter(served: Served) -> None:
    receipts = {name: served.live.ask("GET", f"/v1/adapters/{name}").json() for name in ("ia3", "lora")}
    assert (receipts["ia3"]["kind"], receipts["lora"]["kind"]) == ("ia3", "lora")
    assert (receipts["ia3"]["rank"], receipts["lora"]["rank"]) == (0, 4)
    assert receipts["ia3"]["targets"] == ["k_proj", "v_proj", "down_proj"]
    assert receipts["ia3"]["pages"] == 1
    assert len(receipts["ia3"]["digest"]) == 64
    cards = served.live.ask("GET", "/v1/models").json()["data"]
    assert {"ia3", "lora"} <= {card["id"] for card in cards}


async def test_a_mix_of_one_is_the_adapter_and_of_nothing_the_base(served: Served) -> None:
    async def text(client: httpx.AsyncClient, model: str) -> str:
        body = {"model": model, "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    async with httpx.AsyncClient(base_url=served.live.url, timeout=LIMIT) as client:
        models = ("ia3", "ia3*0.5+ia3*0.5", "ia3*1.0+lora*0.0", "tiny", "ia3*0.0+lora*0.0", "ia3*0.5+lora*0.5")
        whole, halves, with_lora, base, nothing, both = await asyncio.gather(*(text(client, model) for model in models))
    assert whole == halves == with_lora == served.text(list(ids_of(greedy(served, "ia3", PROMPTS[0]))))
    assert base == nothing == served.text(list(ids_of(greedy(served, "tiny", PROMPTS[0]))))
    assert len({whole, base, both}) == 3


async def test_files_exchanged_in_place_answer_as_the_new_ones(served: Served, tmp_path: Path) -> None:
    """From IA3 to other vectors, and on to LoRA: answers and receipt follow; bad files change nothing."""
    folder = tmp_path / "live"
    folder.mkdir()
    body = {"lora_name": "live", "lora_path": str(folder), "load_inplace": True}
    digests = set()
    async with httpx.AsyncClient(base_url=served.live.url, timeout=LIMIT) as client:
        for name in ("ia3", "other", "lora"):
            for file in FILES:
                put(folder / file, (served.folders[name] / file).read_bytes())
            assert (await client.post("/v1/load_lora_adapter", json=body)).status_code == 200
            assert_same(await ask(client, "live", PROMPTS[0]), greedy(served, name, PROMPTS[0]))
            receipt = (await client.get("/v1/adapters/live")).json()
            digests.add(receipt["digest"])
            assert receipt["kind"] == ("lora" if name == "lora" else "ia3")
        assert len(digests) == 3
        put(folder / FILES[0], (served.folders["ia3"] / FILES[0]).read_bytes())
        refused = await client.post("/v1/load_lora_adapter", json=body)
        assert refused.status_code == 400
        assert "lora_A.weight" in refused.text
        assert_same(await ask(client, "live", PROMPTS[0]), greedy(served, "lora", PROMPTS[0]))
