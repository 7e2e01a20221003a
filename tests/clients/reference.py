"""A tiny random base with an adapter, and what transformers and PEFT say about the documents of the lm-eval tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.peft_adapters import make_peft_adapter
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer

TASKS = Path(__file__).parent / "lm-eval" / "tasks"

GREEDY_TOKENS = 12
"""As max_gen_toks in tasks/generate.yaml."""


def write_tiny_world(folder: Path) -> tuple[Path, Path, Path]:
    """Base, folder of adapters with one of them, "wide", and the reference: JSON by model, task and document."""
    base, adapters = folder / "base", folder / "adapters"
    make_tiny_model("llama", base)
    make_tiny_tokenizer(base)
    model = load_oracle(base)
    wide = make_peft_adapter(model, adapters / "wide", r=8, target_modules="all-linear").model
    reference = {name: _reference(each, base) for name, each in (("tiny", load_oracle(base)), ("wide", wide))}
    path = folder / "reference.json"
    path.write_text(json.dumps(reference), encoding="utf-8")
    return base, adapters, path


def _reference(model: Any, base: Path) -> dict[str, list[Any]]:
    """Log-likelihoods: sums over the tokens of a continuation, after a context or a token that is the start."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def scores(context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The sum, and whether greedy decoding would say the same."""
        with torch.no_grad():
            rows = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].float()
        wanted = torch.tensor(continuation)
        sum_ = float(rows.log_softmax(-1).gather(1, wanted[:, None]).sum())
        return sum_, bool((rows.argmax(-1) == wanted).all())

    def greedy(text: str) -> str:
        found = ids(text)
        prompt = len(found)
        with torch.no_grad():
            for _ in range(GREEDY_TOKENS):
                found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
        return tokenizer.decode(found[prompt:], skip_special_tokens=True)

    docs = [json.loads(line) for line in (TASKS / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
    choices = []
    for doc in docs:
        context = ids(doc["context"])
        wholes = [ids(f"{doc['context']} {choice}") for choice in doc["choices"]]
        assert all(whole[: len(context)] == context for whole in wholes)  # no token spans the border
        choices.append([scores(context, whole[len(context) :]) for whole in wholes])
    start = [tokenizer.bos_token_id or tokenizer.eos_token_id]  # as lm-eval has it: bos is 0 here, so it takes eos
    return {
        "choose": choices,
        "perplexity": [scores(start, ids(doc["context"]))[0] for doc in docs],
        "generate": [greedy(doc["context"]) for doc in docs],
    }
