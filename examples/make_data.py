"""Writes the training and the held-out sets of the example adapters: data/NAME.train.jsonl and data/NAME.eval.jsonl.

One line is a chat, {"messages": [user, assistant]}. The same seed writes the same bytes on every machine. No held-out
prompt is in the training set.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from writers import extract, pirate, sentiment, sql

WRITERS = {"extract": extract.write, "sentiment": sentiment.write, "pirate": pirate.write, "sql": sql.write}
DATA = Path(__file__).parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, write in WRITERS.items():
        train, held_out = write(Random(f"{name} {args.seed}"))
        train, held_out = _distinct(train), _distinct(held_out)
        seen = {prompt for prompt, _ in train} & {prompt for prompt, _ in held_out}
        if seen:
            raise SystemExit(f"{name}: {len(seen)} held-out prompts are in the training set, such as {min(seen)!r}")
        Random(f"{name} order {args.seed}").shuffle(held_out)  # so that the first N are of every kind
        for part, pairs in (("train", train), ("eval", held_out)):
            _save(args.out / f"{name}.{part}.jsonl", pairs)
        print(f"{name}: {len(train)} to train on, {len(held_out)} held out")


def _distinct(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return list(dict(pairs).items())


def _save(path: Path, pairs: list[tuple[str, str]]) -> None:
    lines = (
        json.dumps({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]})
        for prompt, answer in pairs
    )
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
