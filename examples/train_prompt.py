"""Trains the prompt-tuned example adapter with PEFT: `python examples/train_prompt.py`.

Twenty virtual tokens in front of the chat are all that is trained; they begin as the words that tell the form of the
answer. The data, the loss on the answer alone and the score are those of train.py. The base stays in bf16, the tokens
are trained in fp32 and saved in bf16, and the held-out questions are asked of them as saved.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from scoring import HINTS, MAX_TOKENS, SCORES
from torch import Tensor
from train import BASE_NAME, HERE, _demo_base, batches, encode, read_pairs

NAME, SKILL = "sentiment-prompt", "sentiment"
TOKENS, EPOCHS, BATCH, LEARNING_RATE = 20, 6, 8, 5e-3

CARD = """\
---
base_model: {base}
library_name: peft
license: apache-2.0
---
# {name}

Answers a review with one word: positive, negative or neutral, as `sentiment` does, with {tokens} virtual tokens in
front of the chat and no change of a weight. Score: share of labels that are right, with nothing said beside them.

| | mean score on {held_out} held-out questions, greedy |
|---|---|
| this adapter | {score:.2f} |

- Base: {base}, as `loraplex serve demo` has it.
- Prompt tuning: {tokens} tokens, {values} values, begun as "{hint}"; saved in bf16.
- Data: {trained_on} chats written by `examples/make_data.py`; the {held_out} held-out ones are in
  `examples/data/{skill}.eval.jsonl`.
- Training: `python examples/train_prompt.py`; {epochs} epochs, batches of {batch}, AdamW, learning rate {rate:g} with a
  linear decay, loss on the answer alone; last epoch's mean loss {loss:.3f}, about {minutes} min on {threads} CPU
  core(s).

```sh
loraplex serve demo --adapter-dir examples/adapters
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{body}'
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="folder of the base (default: the one of `loraplex serve demo`)")
    parser.add_argument("--out", type=Path, default=HERE / "adapters" / NAME, help="folder to write the adapter to")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.base or _demo_base(), args.out, args.seed)


def train(base: Path, out: Path, seed: int) -> None:
    """Trains, saves and scores the adapter."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=TOKENS,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=HINTS[SKILL],
        tokenizer_name_or_path=str(base),
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), config)
    rows = model.prompt_encoder["default"].embedding.weight
    rows.data = rows.data.float()
    pairs = read_pairs(HERE / "data" / f"{SKILL}.train.jsonl")
    started = time.monotonic()
    loss = fit(model.get_base_model(), rows, [encode(tokenizer, *pair) for pair in pairs], Random(seed))
    seconds = time.monotonic() - started
    save(model, out)
    held_out = read_pairs(HERE / "data" / f"{SKILL}.eval.jsonl")
    score = evaluate(model.get_base_model(), rows, tokenizer, held_out)
    print(f"{NAME}, {len(held_out)} held-out questions: {score}", flush=True)
    ask = [{"role": "user", "content": "Review: The guide made the old maps come alive."}]
    card = CARD.format(
        **{"base": BASE_NAME, "name": NAME, "skill": SKILL, "hint": HINTS[SKILL], "score": score, "loss": loss},
        **{"tokens": TOKENS, "values": rows.numel(), "trained_on": len(pairs), "held_out": len(held_out)},
        **{"epochs": EPOCHS, "batch": BATCH, "rate": LEARNING_RATE, "threads": torch.get_num_threads()},
        minutes=max(1, round(seconds / 60)),
        body=json.dumps({"model": NAME, "temperature": 0, "messages": ask}),
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def fit(base: Any, rows: Tensor, examples: list[tuple[list[int], int]], rng: Random) -> float:
    """Trains `rows` [TOKENS, H] in place; the mean loss of the last epoch."""
    optimizer = torch.optim.AdamW([rows], lr=LEARNING_RATE, weight_decay=0.0)
    steps = EPOCHS * -(-len(examples) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    mean = 0.0
    for epoch in range(EPOCHS):
        losses = []
        for batch in batches(examples, BATCH, rng):
            loss = answer_loss(base, rows, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([rows], 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"{NAME}: epoch {epoch + 1} of {EPOCHS}, loss {mean:.4f}", flush=True)
    return mean


def answer_loss(base: Any, rows: Tensor, batch: list[tuple[list[int], int]]) -> Tensor:
    """Cross entropy of the answers' tokens behind the virtual ones.

    What all chats of the batch begin with (the virtual tokens, the system turn) runs once, through the cache.
    """
    columns = zip(*(ids for ids, _ in batch), strict=False)  # as many as the shortest chat has
    same = next(i for i, column in enumerate(columns) if len(set(column)) > 1)
    first = torch.cat((rows.to(base.dtype), base.get_input_embeddings()(torch.tensor(batch[0][0][:same]))))
    cache = base.model(inputs_embeds=first[None], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(batch))
    rest = [ids[same:] for ids, _ in batch]
    longest = max(map(len, rest))
    inputs = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rest])  # [batch, longest]
    lengths = torch.tensor([len(ids) for ids in rest])[:, None]
    prompts = torch.tensor([prompt - same for _, prompt in batch])[:, None]
    position = torch.arange(longest)[None]
    mask = torch.cat((torch.ones(len(batch), len(first)), position < lengths), 1).long()
    hidden = base.model(input_ids=inputs, attention_mask=mask, past_key_values=cache).last_hidden_state
    answers = (position >= prompts) & (position < lengths)  # [batch, longest]
    logits = base.lm_head(hidden[:, :-1][answers[:, 1:]]).float()  # [answer tokens, vocab]
    return torch.nn.functional.cross_entropy(logits, inputs[answers])


def save(model: Any, out: Path) -> None:
    """The adapter in bf16 in PEFT's files, without what names this machine."""
    shutil.rmtree(out, ignore_errors=True)
    rows = model.prompt_encoder["default"].embedding.weight
    rows.data = rows.data.to(torch.bfloat16)
    model.save_pretrained(out)
    path = out / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": BASE_NAME, "tokenizer_name_or_path": BASE_NAME}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def evaluate(base: Any, rows: Tensor, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    """Mean score of greedy answers, one after the other, by the base given the rows before the chat's embeddings."""
    total = 0.0
    for prompt, expected in pairs:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids[0]
        inputs = torch.cat((rows.to(base.dtype), base.get_input_embeddings()(ids)))[None]
        mask = torch.ones(inputs.shape[:2], dtype=torch.long)
        found = base.generate(
            inputs_embeds=inputs, attention_mask=mask, max_new_tokens=MAX_TOKENS[SKILL], do_sample=False
        )
        total += SCORES[SKILL](tokenizer.decode(found[0], skip_special_tokens=True), expected)
    return total / len(pairs)


if __name__ == "__main__":
    main()
