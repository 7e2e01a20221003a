"""A base of eight billion weights in 4 bits: what it takes, and how near a decode step comes to reading it once.

    python -m loraplex.benchmarks.large [--adapters 32] [--memory 12G] [--seconds 60]

Llama-3.1-8B's shape with random int4 codes, and tables in int8, made as they are asked for: there is no file of it. The
engine is the server's own, on the CPU. A step is timed as the tokens of running answers come, beside the machine's
bandwidth measured in turns with it, and set against the bytes that a step reads: weights, each adapter worn, keys and
values.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraplex.benchmarks.kernels.machine import limits
from loraplex.benchmarks.random_adapters import adapter_bytes, make_adapters, modules_of
from loraplex.kernels.quantized import GroupScales, QuantizedWeight, WeightFormat
from loraplex.server.command.build import EngineParts, build_engine
from loraplex.server.config_engine import Device, EngineConfig
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.engine.step.memory import size
from loraplex.server.engine.step.system_memory import resident_memory
from loraplex.server.models.checkpoint import StoredTensor
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.formats.quantize import INT4, INT8
from loraplex.server.models.weight_sizes import EMBED, HEAD, expected_shapes
from loraplex.server.options import parse_size

RANK, PROMPT, ANSWER = 16, 8, 24
LIMITS_SECONDS = 1.0

PROMPTS = 100_000
"""Token ids below this are in prompts."""

NOISE = (16 << 20) + 64
"""Random bytes: no multiple of a row, so that rows differ."""

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


class RandomCheckpoint:
    """Weights of the same NOISE random bytes over and over: linears in int4, tables in int8, norms of one."""

    def __init__(self, config: ModelConfig) -> None:
        self.folder = Path("random")
        self._noise = torch.randint(-(1 << 31), 1 << 31, (NOISE >> 2,), dtype=torch.int32).view(torch.uint8)
        self.tensors = {
            name: StoredTensor(self.folder, shape, 2, _format(name)) for name, shape in expected_shapes(config).items()
        }

    def read(self, name: str) -> Tensor | QuantizedWeight:
        """Make the tensor `name`, of the size a trained model's has."""
        stored = self.tensors[name]
        form, shape = stored.format, stored.shape
        if form is None:
            return torch.ones(shape, dtype=torch.bfloat16)
        out, columns = shape
        noise = self._noise.repeat(-(-out * columns // NOISE))[: out * columns].view(out, columns)
        codes = noise.view(torch.int8).clamp_(min=-127) if form is INT8 else noise.bitwise_and_(15)
        step = columns**-0.5 / (64 if form is INT8 else 4)
        scale = torch.full((out, form.groups(columns)), step, dtype=torch.float16)
        return QuantizedWeight(form, codes, GroupScales(scale), GroupScales(scale * -7.5) if form is INT4 else None)


def _format(name: str) -> WeightFormat | None:
    if name in (EMBED, HEAD):
        return INT8
    return INT4 if name.endswith("_proj.weight") else None


@dataclass(frozen=True)
class Steps:
    """Decode steps of so many rows, each with an adapter of its own or none."""

    rows: int
    adapters: int
    seconds: float  # of a step, median over the answers
    nbytes: int  # that a step reads

    def line(self, read: float) -> str:
        least = self.nbytes / read
        return (
            f"{self.rows} rows, {self.adapters} adapters: {1e3 * self.seconds:.0f} ms a step, {size(self.nbytes)} at "
            f"{read / 1e9:.1f} GB/s take {1e3 * least:.0f}: {self.seconds / least:.2f} times"
        )


async def answer(parts: EngineParts, number: int, adapter: str | None) -> float:
    """Take an answer; the seconds of each token after the first."""
    mix = () if adapter is None else ((parts.adapters.registry.lease(adapter), 1.0),)
    prompt = tuple(torch.randint(PROMPTS, (PROMPT,), generator=torch.Generator().manual_seed(number)).tolist())
    request = GenerationRequest(str(number), prompt, SamplingParams(ANSWER, temperature=0.0), mix)
    times = [time.perf_counter() async for _ in parts.engine.submit(request)]
    # all rows run together once the last prompt is computed: the second half of an answer
    half = len(times) // 2
    return (times[-1] - times[half]) / (len(times) - 1 - half)


async def measure(parts: EngineParts, rows: int, adapters: int, each: int, seed: int) -> Steps:
    """Let `rows` answers run at once. each: bytes of an adapter."""
    names = [f"ad{row % adapters}" if adapters else None for row in range(rows)]
    found = await asyncio.gather(*(answer(parts, seed * 1000 + row, name) for row, name in enumerate(names)))
    config = parts.model_config
    kv = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * (PROMPT + 3 * ANSWER // 4)
    table = config.vocab_size * config.hidden_size * 17 // 16  # of the embedding's rows only a few are read
    nbytes = parts.memory.weights_bytes - table + min(rows, adapters) * each + rows * kv
    return Steps(rows, adapters, statistics.median(found), nbytes)


async def serve(parts: EngineParts, folder: Path, count: int, each: int, seconds: float) -> None:
    """Register the adapters and measure until `seconds` are over, in turns with the machine's bandwidth."""
    for index in range(count):
        await parts.adapters.register(f"ad{index}", str(folder / f"ad{index}"))
    cases = dict.fromkeys([(1, 0), (1, 1), (min(16, count), min(16, count)), (count, count)])
    deadline, seed = time.monotonic() + seconds, 1
    while seed == 1 or time.monotonic() < deadline:
        for rows, adapters in cases:
            if seed == 1 and adapters:
                await measure(parts, rows, adapters, each, 0)  # they come to the device
            read = limits(LIMITS_SECONDS).read
            print((await measure(parts, rows, adapters, each, seed)).line(read), flush=True)
        seed += 1
    print(f"resident: {size(resident_memory())}")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"])
    parser.add_argument("--memory", type=parse_size, default=parse_size("12G"))
    parser.add_argument("--seconds", type=float, default=60, help="after which no further round is begun")
    arguments = parser.parse_args()
    run(arguments.adapters, arguments.layers, arguments.memory, arguments.seconds)


def run(adapters: int, layers: int, memory: int, seconds: float) -> None:
    """Build the engine with so many adapters in a folder of its own, measure, and print what it takes."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "config.json").write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": layers}))
        config = ModelConfig.from_hf(base)
        make_adapters(base, base / "adapters", adapters, ranks=(RANK,))
        start = time.monotonic()
        parts = build_engine(
            EngineConfig(Device.cpu, memory=memory, max_model_len=512, max_num_seqs=32, token_budget=64),
            base,
            "large",
            model_config=config,
            checkpoint=RandomCheckpoint(config),
            count_process=True,
        )
        print(f"loaded in {time.monotonic() - start:.0f} s, {size(resident_memory())} resident: {parts.memory}")
        parts.engine.start()
        try:
            each = adapter_bytes(modules_of(base), RANK)
            asyncio.run(serve(parts, base / "adapters", adapters, each, seconds))
        finally:
            parts.engine.stop()
            parts.adapters.close()


if __name__ == "__main__":
    main()
