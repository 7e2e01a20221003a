"""What stands in front of a prompt, over HTTP: usage, limits, mixes, log-probabilities and embeddings of the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.kernels.constants import BLOCK_SIZE
from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import ALL, PeftAdapter, make_peft_adapter
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

VIRTUAL, TOKENS = 37, 8
PROMPT = list(range(20, 39))
ADAPTERS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "PROMPT_TUNING", "num_virtual_tokens": VIRTUAL, "strength": None},
    "prefix": {"kind": "PREFIX_TUNING", "num_virtual_tokens": VIRTUAL, "strength": None},
    "lora": {"r": 4, "target_modules": ALL},
}


class World:
    def __init__(self, live: LiveServer, oracle: Any, made: dict[str, PeftAdapter]) -> None:
        self.live = live
        self.oracle = oracle
        self.made = made

    def logprobs(self, name: str, ids: list[int]) -> Tensor:
        """[len(ids), vocab] of the token after each."""
        with torch.no_grad():
            found = self.made[name].model(torch.tensor([ids]), use_cache=name == "prefix").logits[0, -len(ids) :]
        return found.float().log_softmax(-1)

    def complete(self, model: str, **fields: Any) -> Any:
        answer = self.live.complete(model, TOKENS, prompt=PROMPT, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, model: str, **fields: Any) -> str:
        answer = self.live.complete(model, **{"tokens": TOKENS, "prompt": PROMPT, **fields})
        assert answer.status_code == 400
        return str(answer.json()["error"]["message"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = make_tiny_tokenizer(make_tiny_model("llama", tmp_path_factory.mktemp("base")))
    oracle, folder = load_oracle(base), tmp_path_factory.mktemp("made")
    torch.manual_seed(3)  # PEFT begins with random numbers of the global generator
    made = {name: make_peft_adapter(oracle, folder / name, **options) for name, options in ADAPTERS.items()}
    with live_server(base, "tiny") as live:
        for name, adapter in made.items():
            assert live.load(name, adapter.folder).status_code == 200
        yield World(live, oracle, made)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_usage_is_of_the_prompt(world: World, name: str) -> None:
    """Nor are virtual tokens found in the cache ones of the prompt."""
    for _ in range(2):
        usage = world.complete(name)["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(PROMPT), TOKENS)
        assert usage["total_tokens"] == len(PROMPT) + TOKENS
        cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached == (VIRTUAL + len(PROMPT) - 1) // BLOCK_SIZE * BLOCK_SIZE - VIRTUAL > 0


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_all_requests_share_its_blocks(world: World, name: str) -> None:
    """Another prompt of another cache salt finds the full blocks of the virtual tokens."""
    kv = world.live.parts.engine._scheduler.kv
    world.complete(name)
    before = kv.hits
    world.complete(name, cache_salt=f"of {name}")
    assert kv.hits - before == VIRTUAL // BLOCK_SIZE * BLOCK_SIZE
    world.live.idle()


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_the_context_counts_them(world: World, name: str) -> None:
    most = world.live.parts.memory.max_model_len
    room = most - VIRTUAL - len(PROMPT)
    for tokens in (room, room + 1):
        answer = world.live.complete(name, tokens, prompt=PROMPT)
        assert answer.json()["usage"]["completion_tokens"] == room
    assert "virtual tokens" in world.refused(name, prompt=[5] * (most - VIRTUAL), tokens=1)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_log_probabilities_are_of_the_prompts_tokens(world: World, name: str) -> None:
    choice = world.complete(name, echo=True, logprobs=0)["choices"][0]
    found = choice["logprobs"]["token_logprobs"]
    assert len(found) == len(PROMPT) + TOKENS
    wanted = world.logprobs(name, PROMPT)
    assert found[0] is None
    assert found[1 : len(PROMPT)] == pytest.approx(
        [float(wanted[at, token]) for at, token in enumerate(PROMPT[1:])], abs=2e-4
    )


def test_one_in_front_beside_others(world: World) -> None:
    """A prompt-tuned adapter and a LoRA in one request: the LoRA acts on virtual tokens, too."""
    prompt = world.made["prompt"].model.prompt_encoder["default"].embedding.weight
    lora, ids = world.made["lora"].model, list(PROMPT)
    for _ in range(TOKENS):
        with torch.no_grad():
            inputs = torch.cat((prompt, world.oracle.get_input_embeddings()(torch.tensor(ids))))
            ids.append(int(lora(inputs_embeds=inputs[None]).logits[0, -1].argmax()))
    wanted = world.live.tokenizer.decode(ids[len(PROMPT) :])
    assert world.complete("prompt+lora")["choices"][0]["text"] == wanted
    assert world.complete("lora*1.0+prompt*1.0")["choices"][0]["text"] == wanted
    assert world.complete("prefix+lora")["choices"][0]["text"] != wanted


@pytest.mark.parametrize("model", ["prompt+prefix", "prompt*0.5", "prefix*0.5+lora*0.5", "prompt*0.5+prompt*0.5"])
def test_what_does_not_mix(world: World, model: str) -> None:
    assert "'prefix'" in world.refused(model) if "prefix" in model else "'prompt'" in world.refused(model)


def test_receipts(world: World) -> None:
    receipt = world.live.ask("GET", "/v1/adapters/prefix").json()
    assert (receipt["kind"], receipt["rank"], receipt["targets"]) == ("prefix_tuning", 0, [])
    assert f"{VIRTUAL} virtual tokens" in receipt["remark"]
