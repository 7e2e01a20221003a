"""PEFT's mixed batch: transformers' generate() over rows that wear different adapters (adapter_names); no server.

    python -m loraplex.benchmarks.peers.peft_batch BASE ADAPTER...

It loads them, prints "ready", and then, for every line of standard input with a JSON list of prompts, one batch's
seconds. In a process of its own, so that its memory and threads end with it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from loraplex.benchmarks.peers.peer import Figures, Peer, Skipped
from loraplex.benchmarks.peers.piped import READY, Worker, worker
from loraplex.benchmarks.readme_loads import LOADS, OUTPUT_TOKENS, Load


@dataclass(frozen=True)
class Batch:
    """The process."""

    worker: Worker
    rows: int

    def warm(self, load: Load) -> None:
        """One batch."""
        self.measure(load, seed=-1)

    def measure(self, load: Load, seed: int) -> Figures:
        """The load's first prompts, one for each row. Raises RuntimeError where the process ended."""
        prompts = load.prompts(seed)[: self.rows]
        return Figures(len(prompts) * OUTPUT_TOKENS / float(self.worker.ask(prompts)), None)


def peer(base: Path, adapters: Sequence[Path]) -> Peer:
    """Of what is installed. Raises Skipped."""
    if find_spec("peft") is None:
        raise Skipped("peft is not installed: pip install peft")

    @contextmanager
    def start(load: Load) -> Iterator[Batch]:
        worn = [str(path) for path in adapters[: load.streams]]
        with worker("PEFT", [sys.executable, "-m", __name__, str(base), *worn]) as running:
            yield Batch(running, len(worn))

    versions = {name: importlib.metadata.version(name) for name in ("peft", "transformers")}
    # One batch of rows that start and end together: nothing else of it compares with a server's loads.
    loads = [load.name for load in LOADS if load.streams > 1 and load.adapters > 1]
    return Peer("PEFT", versions, start, loads, "no HTTP; bf16; one generate() over a row a stream, an adapter each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapters", type=Path, nargs="+")
    arguments = parser.parse_args()

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    names = [path.name for path in arguments.adapters]
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, arguments.adapters[0], adapter_name=names[0])
    for path, name in zip(arguments.adapters[1:], names[1:], strict=True):
        model.load_adapter(path, adapter_name=name)
    model.eval()
    print(READY, flush=True)
    for line in sys.stdin:
        prompts = torch.tensor(json.loads(line))
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                adapter_names=names,
                do_sample=False,
                min_new_tokens=OUTPUT_TOKENS,
                max_new_tokens=OUTPUT_TOKENS,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - start
        assert out.shape == (len(names), prompts.shape[1] + OUTPUT_TOKENS)
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
