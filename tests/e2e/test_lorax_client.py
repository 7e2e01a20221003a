"""The real lorax-client against a live server with a tiny model; PEFT says what adapters, mixes and merges answer."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft.utils import merge_utils

from tests.support.served import Served, greedy, serve_tiny
from tests.support.waiting import LIMIT

lorax = pytest.importorskip("lorax", reason="lorax-client is not installed")
from lorax import AsyncClient, Client  # noqa: E402
from lorax.errors import GenerationError, ValidationError  # noqa: E402
from lorax.types import MergedAdapters  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "the other one, and the end of it"
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "two": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 8, "target_modules": "all-linear"},
}
CLOSE = 2e-4
"""Log-probabilities in fp32, summed in another order."""


class Lorax:
    """The server, its client, and PEFT's models of sums of adapters."""

    def __init__(self, served: Served) -> None:
        self.live, self.folders, self.base = served.live, served.folders, served.oracles["tiny"]
        self.client = Client(served.live.url)

    def oracle(self, weights: dict[str, float]) -> Any:
        """PEFT's model of the base wearing the sum of adapters with these weights: their factors side by side."""
        from peft import PeftModel

        first, *others = weights
        model = PeftModel.from_pretrained(copy.deepcopy(self.base), str(self.folders[first]), adapter_name=first)
        for name in others:
            model.load_adapter(str(self.folders[name]), adapter_name=name)
        model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
        model.set_adapter("sum")
        return model.eval()

    def greedy(self, model: Any, tokens: int) -> tuple[list[int], list[float]]:
        return greedy(model, self.live.tokenizer.encode(PROMPT), tokens)

    def check(self, answer: Any, model: Any, tokens: int = 12) -> None:
        """That `answer` is the model's greedy one, token by token."""
        ids, logprobs = self.greedy(model, tokens)
        assert [token.id for token in answer.details.tokens] == ids
        assert [token.logprob for token in answer.details.tokens] == pytest.approx(logprobs, abs=CLOSE)
        assert answer.generated_text == self.live.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def served(base: Path, oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lorax]:
    """The adapter "wide" is loaded on first use."""
    folder = tmp_path_factory.mktemp("adapters")
    with serve_tiny(base, oracle, folder, ADAPTERS, loaded=("one", "two")) as served:
        yield Lorax(served)


def ask(served: Lorax, **parameters: Any) -> Any:
    return served.client.generate(PROMPT, max_new_tokens=12, ignore_eos_token=True, **parameters)


def test_the_base_and_an_adapter(served: Lorax) -> None:
    served.check(ask(served), served.base)
    one = served.oracle({"one": 1.0})
    served.check(ask(served, adapter_id="one"), one)
    served.check(ask(served, adapter_id="tiny:one", adapter_source="local"), one)
    assert served.greedy(one, 12) != served.greedy(served.base, 12)  # or all of this shows little
    served.live.idle()


def test_streams(served: Lorax) -> None:
    one = served.oracle({"one": 1.0})
    events = list(
        served.client.generate_stream(PROMPT, adapter_id="one", max_new_tokens=12, ignore_eos_token=True, details=True)
    )
    ids, logprobs = served.greedy(one, 12)
    assert [event.token.id for event in events] == ids
    assert [event.token.logprob for event in events] == pytest.approx(logprobs, abs=CLOSE)
    text = served.live.tokenizer.decode(ids)
    assert events[-1].generated_text == text
    assert "".join(event.token.text for event in events if not event.token.special) == text
    assert events[-1].details.finish_reason == "length"
    assert events[-1].details.generated_tokens == 12


def test_the_async_client(served: Lorax) -> None:
    client = AsyncClient(served.live.url)

    async def both() -> tuple[Any, list[Any]]:
        whole = await client.generate(PROMPT, adapter_id="two", max_new_tokens=12, ignore_eos_token=True)
        stream = client.generate_stream(PROMPT, adapter_id="two", max_new_tokens=12, ignore_eos_token=True)
        return whole, [event async for event in stream]

    whole, events = asyncio.run(both())
    served.check(whole, served.oracle({"two": 1.0}))
    assert events[-1].generated_text == whole.generated_text


def test_details(served: Lorax) -> None:
    answer = ask(served, adapter_id="one", decoder_input_details=True, return_k_alternatives=3, return_full_text=True)
    prompt = served.live.tokenizer.encode(PROMPT)
    with torch.no_grad():
        rows = served.oracle({"one": 1.0})(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    expected = [float(rows[i, token]) for i, token in enumerate(prompt[1:])]
    assert [token.id for token in answer.details.prefill] == prompt
    assert answer.details.prefill[0].logprob is None
    assert [token.logprob for token in answer.details.prefill[1:]] == pytest.approx(expected, abs=CLOSE)
    top = rows[-1].topk(3)
    first = answer.details.tokens[0].alternative_tokens
    assert [token.id for token in first] == top.indices.tolist()
    assert [token.logprob for token in first] == pytest.approx(top.values.tolist(), abs=CLOSE)
    assert answer.generated_text.startswith(PROMPT)


def test_best_of_and_seeds(served: Lorax) -> None:
    answer = ask(served, best_of=3, do_sample=True, temperature=2.0)
    every = [answer.details, *answer.details.best_of_sequences]
    means = [sum(token.logprob for token in each.tokens) / 12 for each in every]
    assert len(every) == 3
    assert means[0] == max(means)
    again = [ask(served, do_sample=True, temperature=2.0, seed=5) for _ in range(2)]
    assert again[0] == again[1]
    assert again[0].details.seed == 5


def test_watermarks(served: Lorax) -> None:
    """Greedy: what transformers' watermark leads to, token by token, beside streams without one. Drawn: transformers'
    detector finds it, and finds none without it. The prompt takes several steps."""
    from transformers import WatermarkDetector, WatermarkingConfig

    prompt = PROMPT * 8
    ids = served.live.tokenizer.encode(prompt)
    assert len(ids) > 64  # token_budget
    config = WatermarkingConfig(greenlist_ratio=0.5, bias=2.0)
    processor = config.construct_processor(served.base.config.vocab_size, "cpu")

    def expected(mark: bool) -> list[int]:
        text = torch.tensor([ids])
        with torch.no_grad():
            for _ in range(48):
                row = served.base(text).logits[:, -1].float()
                row = processor(text, row) if mark else row
                text = torch.cat([text, row.argmax(-1, keepdim=True)], 1)
        return text[0, len(ids) :].tolist()

    marked, plain = expected(True), expected(False)
    assert marked != plain

    def tokens(client: Any, **parameters: Any) -> list[int]:
        answer = client.generate(prompt, ignore_eos_token=True, **{"max_new_tokens": 48, **parameters})
        return [token.id for token in answer.details.tokens]

    with ThreadPoolExecutor(4) as pool:
        marks = [True, False, True, False]
        answers = list(pool.map(lambda mark: tokens(Client(served.live.url), watermark=mark), marks))
    assert answers == [marked, plain, marked, plain]
    detector = WatermarkDetector(served.base.config, "cpu", config)
    drawn = [tokens(served.client, watermark=m, do_sample=True, seed=4, max_new_tokens=150) for m in (True, False)]
    assert [bool(detector(torch.tensor([text]))[0]) for text in drawn] == [True, False]
    served.live.idle()


def test_structured_output(served: Lorax) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
    schema["additionalProperties"] = False  # type: ignore[assignment]
    answer = served.client.generate(
        PROMPT, adapter_id="one", max_new_tokens=40, response_format={"type": "json_object", "schema": schema}
    )
    assert answer.generated_text[0] == "{"
    assert '"n"' in answer.generated_text


def test_errors(served: Lorax) -> None:
    with pytest.raises(GenerationError):
        ask(served, adapter_id="nobody")
    with pytest.raises(GenerationError):
        ask(served, adapter_id="/nowhere/at-all", adapter_source="local")
    with pytest.raises(ValidationError):
        ask(served, best_of=2)
    with pytest.raises(GenerationError):
        list(served.client.generate_stream(PROMPT, adapter_id="nobody"))
    served.live.idle()


def test_first_use_loads_once_for_all(served: Lorax) -> None:
    loads = served.live.parts.adapters.loader.stats().loads
    folder = str(served.folders["wide"])
    with ThreadPoolExecutor(16) as pool:
        clients = [Client(served.live.url) for _ in range(16)]
        options = {"adapter_id": folder, "adapter_source": "local", "max_new_tokens": 12, "ignore_eos_token": True}
        answers = list(pool.map(lambda client: client.generate(PROMPT, **options), clients))
    assert served.live.parts.adapters.loader.stats().loads - loads == 1
    wide = served.oracle({"wide": 1.0})
    for answer in answers:
        served.check(answer, wide)
    served.live.idle()


def test_linear_merges_are_exact_sums(served: Lorax) -> None:
    """Of adapters of different ranks and targets, too, which a merge of their factors could not be."""
    folders = [str(served.folders[name]) for name in ("one", "wide")]
    merged = MergedAdapters(ids=folders, weights=[0.7, -0.4], merge_strategy="linear", density=0.0)
    expected = served.oracle({"one": 0.7, "wide": -0.4})
    served.check(ask(served, merged_adapters=merged, adapter_source="local"), expected)
    for model in ("one*0.7+two*0.3", "tiny:two*0.3+one*0.7"):
        served.check(ask(served, adapter_id=model), served.oracle({"one": 0.7, "two": 0.3}))
    served.live.idle()


def test_mixes_have_prefixes_of_their_own(served: Lorax) -> None:
    """The same prompt with other weights, other adapters and none, in turns: what is cached of one helps no other."""
    long = PROMPT * 4
    stats = served.live.parts.engine.stats
    models = ["one*0.5+two*0.5", "one*0.5+two*0.6", "one", "tiny", "two*0.5+one*0.5"]

    def complete(model: str) -> Any:
        body = {"model": model, "prompt": long, "max_tokens": 6, "temperature": 0, "logprobs": 0, "ignore_eos": True}
        return httpx.post(f"{served.live.url}/v1/completions", json=body, timeout=LIMIT).json()["choices"][0]

    first = [complete(model) for model in models]
    before = stats().prefix_hits
    again = [complete(model) for model in models]
    assert stats().prefix_hits > before
    for old, new in zip(first, again, strict=True):
        assert old["text"] == new["text"]
        assert old["logprobs"]["token_logprobs"] == pytest.approx(new["logprobs"]["token_logprobs"], abs=CLOSE)
    logprobs = [choice["logprobs"]["token_logprobs"] for choice in first]
    assert logprobs[0] == pytest.approx(logprobs[4], abs=CLOSE)  # the order does not count
    for other in logprobs[1:4]:
        assert logprobs[0] != pytest.approx(other, abs=10 * CLOSE)
    served.live.idle()


def test_ties_is_served_as_peft_merges_the_factors(served: Lorax) -> None:
    from peft.tuners.lora import LoraLayer

    weights, density = [1.0, 0.5], 0.6
    merged = MergedAdapters(ids=["one", "two"], weights=weights, merge_strategy="ties", density=density)
    answers = [ask(served, merged_adapters=merged) for _ in range(2)]
    oracle = served.oracle({"one": 1.0, "two": 1.0})  # alpha / r is the same for both
    oracle.set_adapter("one")
    with torch.no_grad():
        for layer in oracle.modules():
            if isinstance(layer, LoraLayer):
                for factors in (layer.lora_A, layer.lora_B):
                    tensors = [factors[name].weight.data.clone() for name in ("one", "two")]
                    factors["one"].weight.copy_(merge_utils.ties(tensors, torch.tensor(weights), density))
    for answer in answers:
        served.check(answer, oracle)
    assert served.greedy(oracle, 12) != served.greedy(served.oracle({"one": 1.0, "two": 0.5}), 12)
    served.live.idle()


@pytest.mark.parametrize("strategy", ["dare_linear", "dare_ties"])
def test_dare_is_made_once_and_served(served: Lorax, strategy: str) -> None:
    merged = MergedAdapters(ids=["one", "two"], weights=[1.0, 1.0], merge_strategy=strategy, density=0.5)
    loads = served.live.parts.adapters.loader.stats().loads
    first, second = (ask(served, merged_adapters=merged) for _ in range(2))
    assert served.live.parts.adapters.loader.stats().loads - loads == 1
    assert first == second
    assert first.generated_text != ask(served).generated_text
    different = MergedAdapters(ids=["one", "missing"], weights=[1.0, 1.0], merge_strategy=strategy, density=0.5)
    with pytest.raises(GenerationError):
        ask(served, merged_adapters=different)
    served.live.idle()


def test_ranks_that_differ_are_not_merged(served: Lorax) -> None:
    folders = [str(served.folders[name]) for name in ("one", "wide")]
    merged = MergedAdapters(ids=folders, weights=[1.0, 1.0], merge_strategy="ties", density=0.5)
    with pytest.raises(GenerationError):
        ask(served, merged_adapters=merged, adapter_source="local")
    served.live.idle()
