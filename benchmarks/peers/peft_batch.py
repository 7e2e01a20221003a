"""PEFT's mixed batch: transformers' generate() over rows that wear different adapters (adapter_names); no server.

    python -m loraplex.benchmarks.peers.peft_batch BASE ADAPTER...      prints tokens per second of each round

In a process of its own, so that its memory and threads end with it.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from loraplex.benchmarks.peers.peer import OUTPUT_TOKENS, PROMPT_TOKENS, Skipped


def measure(base: Path, adapters: Sequence[Path], rounds: int) -> list[float]:
    """Tokens per second of `rounds` batches, a row for each adapter. Raises Skipped."""
    if find_spec("peft") is None:
        raise Skipped("peft is not installed: pip install peft")
    command = [sys.executable, "-m", __name__, str(base), *map(str, adapters), "--rounds", str(rounds)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Skipped(f"it failed: {result.stderr.strip()[-500:]}")
    return [float(line) for line in result.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=1)
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
    for seed in range(arguments.rounds):
        rng = random.Random(seed)
        prompt = torch.tensor([[rng.randrange(100, 40000) for _ in range(PROMPT_TOKENS)] for _ in names])
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                adapter_names=names,
                do_sample=False,
                min_new_tokens=OUTPUT_TOKENS,
                max_new_tokens=OUTPUT_TOKENS,
                pad_token_id=0,
            )
        assert out.shape == (len(names), PROMPT_TOKENS + OUTPUT_TOKENS)
        print(len(names) * OUTPUT_TOKENS / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
