"""PEFT's mixed batch: transformers' generate() over rows that wear different adapters (adapter_names); no server.

    python -m loraplex.benchmarks.peers.peft_batch BASE ADAPTER...

It loads them, prints "ready", and then, for every line of standard input with a JSON list of prompts, one batch's
seconds. In a process of its own, so that its memory and threads end with it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from loraplex.benchmarks.peers.peer import Figures, Peer, Skipped
from loraplex.benchmarks.readme_loads import LOADS, OUTPUT_TOKENS, Load


class Batch:
    """The process."""

    def __init__(self, process: subprocess.Popen[str], rows: int) -> None:
        self._process = process
        self._rows = rows

    def warm(self, load: Load) -> None:
        """One batch."""
        self.measure(load, seed=-1)

    def measure(self, load: Load, seed: int) -> Figures:
        """The load's first prompts, one for each row. Raises RuntimeError where the process ended."""
        prompts = load.prompts(seed)[: self._rows]
        assert self._process.stdin is not None
        try:
            print(json.dumps(prompts), file=self._process.stdin, flush=True)
        except OSError as error:
            raise RuntimeError("PEFT's process ended") from error
        return Figures(len(prompts) * OUTPUT_TOKENS / float(self.read()), None)

    def read(self) -> str:
        """Its next line. Raises RuntimeError where it ended."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline().strip():
            return line
        raise RuntimeError("PEFT's process ended")


def peer(base: Path, adapters: Sequence[Path]) -> Peer:
    """Of what is installed. Raises Skipped."""
    if find_spec("peft") is None:
        raise Skipped("peft is not installed: pip install peft")

    @contextmanager
    def start(load: Load) -> Iterator[Batch]:
        worn = [str(path) for path in adapters[: load.streams]]
        line = [sys.executable, "-m", __name__, str(base), *worn]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
            batch = Batch(process, len(worn))
            try:
                try:
                    batch.read()
                except RuntimeError:
                    log.seek(0)
                    raise Skipped(f"it failed: {log.read().strip()[-500:]}") from None
                yield batch
            finally:
                process.kill()
                process.communicate()

    versions = {name: importlib.metadata.version(name) for name in ("peft", "transformers")}
    # One batch of rows that start and end together: nothing else of it compares with a server's loads.
    return Peer("PEFT", versions, start, [load.name for load in LOADS if load.streams > 1 and load.adapters > 1])


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
    print("ready", flush=True)
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
