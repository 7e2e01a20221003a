"""QLoRA from end to end: a base quantised by bitsandbytes and adapters trained on it by PEFT, served as saved."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.support.live_server import LiveServer, live_server
from tests.support.served import greedy
from tests.support.tiny import VOCAB_SIZE, make_tiny_model, make_tiny_tokenizer
from tests.support.waiting import LIMIT

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and bitsandbytes warn of much that is meant here

TOKENS = 12
PROMPTS = ("the other one, and the end of it", "an answer", "the quick brown fox jumps over the lazy dog again " * 3)
CLOSE = 2e-4
"""Log-probabilities in fp32, summed in another order."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "few": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
}


@dataclass(frozen=True)
class Qlora:
    live: LiveServer
    oracles: dict[str, Any]  # name -> the library's quantised model, and PEFT's over it
    folders: dict[str, Path]  # of adapters, by name


def quantised(path: Path) -> Any:
    """Load the base as QLoRA does, in NF4 with double quantisation, to compute in fp32."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=settings, dtype=torch.float32, attn_implementation="eager"
    )
    for module in model.modules():  # or else it computes in bf16 where the CPU has instructions for that
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def trained(base: Any, folder: Path, seed: int, options: dict[str, Any]) -> Any:
    """Train an adapter for a few steps, save it in `folder`, and return PEFT's model of it."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(seed)
    prepared = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(prepared, LoraConfig(task_type="CAUSAL_LM", **options)).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
    ids = torch.randint(4, VOCAB_SIZE, (4, 24), generator=torch.Generator().manual_seed(seed))
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5, "nothing was learnt"
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qlora]:
    root = tmp_path_factory.mktemp("qlora")
    path = make_tiny_model("llama", root / "original", intermediate_size=128)
    base = quantised(path)
    base.save_pretrained(root / "base")
    make_tiny_tokenizer(root / "base")
    oracles = {"tiny": base}
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        oracles[name] = trained(quantised(path), root / name, seed, options)
    with live_server(root / "base", "tiny") as live:
        for name in ADAPTERS:
            answer = live.load(name, root / name)
            assert answer.status_code == 200, answer.text
        yield Qlora(live, oracles, {name: root / name for name in ADAPTERS})


async def test_greedy_tokens_are_those_of_the_library_in_mixed_batches(qlora: Qlora) -> None:
    """Thirty-six requests at once: both adapters and the base, each as the library answers alone."""
    ids = {prompt: qlora.live.tokenizer.encode(prompt) for prompt in PROMPTS}
    expected = {(name, p): greedy(qlora.oracles[name], ids[p], TOKENS) for name in qlora.oracles for p in PROMPTS}
    for prompt in PROMPTS:
        assert len({tuple(expected[name, prompt][0]) for name in qlora.oracles}) == 3, "adapters that change nothing"
    async with httpx.AsyncClient(base_url=qlora.live.url, timeout=LIMIT) as client:

        async def ask(name: str, prompt: str) -> tuple[list[int], list[float]]:
            parameters = {"max_new_tokens": TOKENS, "ignore_eos_token": True, "details": True}
            parameters |= {} if name == "tiny" else {"adapter_id": name, "adapter_source": "local"}
            answer = await client.post("/generate", json={"inputs": prompt, "parameters": parameters})
            assert answer.status_code == 200, answer.text
            tokens = answer.json()["details"]["tokens"]
            return [token["id"] for token in tokens], [token["logprob"] for token in tokens]

        asked = list(expected) * 4
        answers = await asyncio.gather(*(ask(name, prompt) for name, prompt in asked))
    for place, (tokens, logprobs) in zip(asked, answers, strict=True):
        assert tokens == expected[place][0]
        assert logprobs == pytest.approx(expected[place][1], abs=CLOSE)


@pytest.mark.parametrize(
    ("named", "said"), [("unsloth/tiny-bnb-4bit", None), ("TheBloke/tiny-GPTQ", "in GPTQ, and this one is in nf4")]
)
def test_adapters_of_other_bases_have_a_remark(qlora: Qlora, tmp_path: Path, named: str, said: str | None) -> None:
    folder = tmp_path / "other"
    shutil.copytree(qlora.folders["few"], folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": named}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert qlora.live.load("other", folder).status_code == 200
    remark = qlora.live.ask("GET", "/v1/adapters/other").json()["remark"]
    qlora.live.unload("other")
    assert remark is None if said is None else said in remark


async def test_a_mix_of_both_adapters_differs_from_each(qlora: Qlora) -> None:
    async def text(model: str) -> str:
        body = {"model": model, "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        async with httpx.AsyncClient(base_url=qlora.live.url, timeout=LIMIT) as client:
            answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    mixed, whole, both, few = await asyncio.gather(*map(text, ("all*0.5+all*0.5", "all", "all*0.5+few*0.5", "few")))
    assert mixed == whole
    assert len({whole, both, few}) == 3
