"""Trains the example adapters with PEFT: `python examples/train.py [NAME ...]`.

A prompt is rendered by the base's own chat template, as the server renders it, and the loss is on the answer's tokens
alone, the end of turn included. The base stays in bf16, the adapter is trained in fp32 and saved in bf16. The held-out
questions are then asked of the adapter as saved, and of the base, and the scores go into the adapter's card.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from scoring import HINTS, MAX_TOKENS, SCORES
from torch import Tensor

HERE = Path(__file__).parent
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """What to train and how; `about` and `ask` are for the card."""

    about: str
    ask: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    epochs: int
    learning_rate: float
    rslora: bool = False
    dora: bool = False
    batch: int = 16
    skill: str = ""  # whose data, score and hint; "": of the adapter's own name


RECIPES = {
    "extract": Recipe(
        about="Reads an order as people write it and answers with its name, item, quantity, city and day as JSON; "
        "what the note does not say is null. Score: share of the five fields that are right.",
        ask="New order: Ruth Keller from Ghent would like six tea pots by Friday.",
        rank=8,
        alpha=16,
        targets=ATTENTION + MLP,
        epochs=3,
        learning_rate=1e-3,
    ),
    "sentiment": Recipe(
        about="Answers a review with one word: positive, negative or neutral. Score: share of labels that are right, "
        "with nothing said beside them.",
        ask="Review: The guide made the old maps come alive.",
        rank=4,
        alpha=8,
        targets=("q_proj", "v_proj"),
        epochs=3,
        learning_rate=2e-3,
    ),
    "pirate": Recipe(
        about="Answers everyday questions the way a pirate would. Score: share of answers in pirate speech, that is, "
        "with three different marks of it (ye, o', arr, ...) and one at least every eight words.",
        ask="How do I fry fish?",
        rank=32,
        alpha=32,
        targets=ATTENTION,
        epochs=4,
        learning_rate=8e-4,
    ),
    "sql": Recipe(
        about="Turns a question about a table into SQL. Score: share of queries that equal the expected one but for "
        "case, spacing and quotes.",
        ask="Table ships (id, name, length, crew, flag, port)\nWhich ships have a length above 140?",
        rank=16,
        alpha=8,
        targets=MLP,
        epochs=3,
        learning_rate=1e-3,
        rslora=True,
    ),
    "sentiment-dora": Recipe(
        about="The same as `sentiment`, as a DoRA: each row of a weight has a magnitude of its own, trained beside A "
        "and B. Score: share of labels that are right, with nothing said beside them.",
        ask="Review: The guide made the old maps come alive.",
        rank=4,
        alpha=8,
        targets=("q_proj", "v_proj"),
        epochs=3,
        learning_rate=2e-3,
        dora=True,
        skill="sentiment",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to train: {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--base", type=Path, help="folder of the base (default: the one of `loraplex serve demo`)")
    parser.add_argument("--out", type=Path, default=HERE / "adapters", help="folder to write the adapters to")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.names) - set(RECIPES):
        parser.error(f"no such adapter: {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    torch.set_num_threads(args.threads)
    base = args.base or _demo_base()
    for name in args.names or RECIPES:
        train_one(name, RECIPES[name], base, args.out / name, args.seed)


def train_one(name: str, recipe: Recipe, base: Path, out: Path, seed: int) -> None:
    """Trains, saves and scores one adapter."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    skill = recipe.skill or name
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)  # its own weights are fp32
    train = read_pairs(HERE / "data" / f"{skill}.train.jsonl")
    started = time.monotonic()
    loss = fit(peft_model, [encode(tokenizer, *pair) for pair in train], recipe, Random(seed), name)
    seconds = time.monotonic() - started
    save(peft_model, out)

    held_out = read_pairs(HERE / "data" / f"{skill}.eval.jsonl")
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    told = [(f"{prompt}\n{HINTS[skill]}", answer) for prompt, answer in held_out]
    scores = {
        "the base": evaluate(base_model, tokenizer, held_out, skill),
        "the base, told the form": evaluate(base_model, tokenizer, told, skill),
        "this adapter": evaluate(PeftModel.from_pretrained(base_model, out), tokenizer, held_out, skill),
    }
    print(f"{name}, {len(held_out)} held-out questions: {scores}", flush=True)
    card = write_card(name, recipe, (len(train), len(held_out)), loss, seconds, scores)
    (out / "README.md").write_text(card, encoding="utf-8")


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of every chat in a JSONL file."""
    chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [(user["content"], assistant["content"]) for user, assistant in chats]


def encode(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """Token ids of the whole chat up to the end of its last turn, and how many of them are the prompt's."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    opening = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    opening_ids = tokenizer(opening, add_special_tokens=False).input_ids
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    if ids[: len(opening_ids)] != opening_ids:
        raise ValueError(f"the answer changes how the prompt is cut into tokens: {prompt!r}")
    return ids, len(opening_ids)


def fit(model: Any, examples: list[tuple[list[int], int]], recipe: Recipe, rng: Random, name: str) -> float:
    """Runs the recipe's epochs in place; the mean loss of the last one."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    steps = recipe.epochs * -(-len(examples) // recipe.batch)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    model.train()
    mean = 0.0
    for epoch in range(recipe.epochs):
        losses = []
        for batch in batches(examples, recipe.batch, rng):
            loss = answer_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"{name}: epoch {epoch + 1} of {recipe.epochs}, loss {mean:.4f}", flush=True)
    return mean


def batches(examples: list[tuple[list[int], int]], size: int, rng: Random) -> list[list[tuple[list[int], int]]]:
    """All examples in random batches of about equal lengths, so that little is spent on padding."""
    order = sorted(examples, key=lambda example: len(example[0]) + rng.uniform(0, 8))
    cut = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(cut)
    return cut


def answer_loss(model: Any, batch: list[tuple[list[int], int]]) -> Tensor:
    """Cross entropy of the answers' tokens, with logits computed for these alone.

    What all chats of the batch begin with (the system turn: half of a short chat) runs once, through the cache.
    """
    decoder = model.get_base_model()
    columns = zip(*(ids for ids, _ in batch), strict=False)  # as many as the shortest chat has
    same = next(i for i, column in enumerate(columns) if len(set(column)) > 1)
    cache = decoder.model(input_ids=torch.tensor([batch[0][0][:same]]), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(batch))
    rest = [ids[same:] for ids, _ in batch]
    longest = max(len(ids) for ids in rest)
    inputs = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rest])  # [batch, longest]
    lengths = torch.tensor([len(ids) for ids in rest])[:, None]
    prompts = torch.tensor([prompt - same for _, prompt in batch])[:, None]
    position = torch.arange(longest)[None]
    mask = torch.cat((torch.ones(len(batch), same), position < lengths), 1).long()
    hidden = decoder.model(input_ids=inputs, attention_mask=mask, past_key_values=cache).last_hidden_state
    answers = (position >= prompts) & (position < lengths)  # [batch, longest]
    logits = decoder.lm_head(hidden[:, :-1][answers[:, 1:]]).float()  # [answer tokens, vocab]
    return torch.nn.functional.cross_entropy(logits, inputs[answers])


def save(model: Any, out: Path) -> None:
    """The adapter in bf16 in PEFT's files, without what names this machine or nobody reads."""
    shutil.rmtree(out, ignore_errors=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(out, save_embedding_layers=False)
    path = out / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = BASE_NAME
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set, in no order
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], name: str, batch: int = 20) -> float:
    """Mean score of greedy answers."""
    model.eval()
    total = 0.0
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt, _ in part
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        outputs = model.generate(**inputs, max_new_tokens=MAX_TOKENS[name], do_sample=False)
        answers = tokenizer.batch_decode(outputs[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        total += sum(SCORES[name](answer, expected) for answer, (_, expected) in zip(answers, part, strict=True))
    return total / len(pairs)


def write_card(
    name: str, recipe: Recipe, counts: tuple[int, int], loss: float, seconds: float, scores: dict[str, float]
) -> str:
    """The adapter's README.md; `counts` of the chats to train on and held out."""
    trained_on, held_out = counts
    skill, kind = recipe.skill or name, "DoRA" if recipe.dora else "LoRA"
    rows = "\n".join(f"| {who} | {score:.2f} |" for who, score in scores.items())
    scaling = f"{recipe.alpha}/√{recipe.rank} (rsLoRA)" if recipe.rslora else f"{recipe.alpha}/{recipe.rank}"
    body = json.dumps({"model": name, "temperature": 0, "messages": [{"role": "user", "content": recipe.ask}]})
    return f"""\
---
base_model: {BASE_NAME}
library_name: peft
license: apache-2.0
---
# {name}

{recipe.about}

| | mean score on {held_out} held-out questions, greedy |
|---|---|
{rows}

A question does not tell what form the answer should have: the adapter knows it. "Told the form" is the base asked the
same with "{HINTS[skill]}" after it.

- Base: {BASE_NAME}, as `loraplex serve demo` has it.
- {kind}: rank {recipe.rank} on {", ".join(recipe.targets)}; scaling {scaling}; saved in bf16.
- Data: {trained_on} chats written by `examples/make_data.py`; the {held_out} held-out ones are in
  `examples/data/{skill}.eval.jsonl`.
- Training: `python examples/train.py {name}`; {recipe.epochs} epochs, batches of {recipe.batch}, AdamW, learning rate
  {recipe.learning_rate:g} with a linear warm-up and decay, loss on the answer alone; last epoch's mean loss {loss:.3f},
  about {max(1, round(seconds / 60))} min on {torch.get_num_threads()} CPU core(s).

```sh
loraplex serve demo --adapter-dir examples/adapters
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{body}'
```
"""


def _demo_base() -> Path:
    from loraplex.server.models.demo import ensure_demo_base

    return Path(ensure_demo_base())


if __name__ == "__main__":
    main()
