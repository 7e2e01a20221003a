"""One live batch of every kind of adapter, the base and a weighted pair, against LoRA alone of as many bytes.

Rows take turns, so that what disturbs the machine disturbs both. Before that every adapter answers alone, and in the
batch it must answer the same, greedily.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from loraplex.benchmarks.load import Request, call, keep_streaming
from loraplex.benchmarks.many.figures import Report, Target
from loraplex.benchmarks.many.served import Server, serve
from loraplex.benchmarks.random_adapters import ATTENTION, adapter_bytes, modules_of
from loraplex.benchmarks.random_kinds import INVOCATION, RandomKinds, write_kind, write_kinds
from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.server.models.config import ModelConfig

STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 48, 32
PAIR = "lora*0.5+dora*0.5"
FLAGS = ("--max-model-len", "256", "--memory", "3G")


def run(base: str, name: str, checkpoint: Path, report: Report, rounds: int = 3, seconds: float = 15.0) -> None:
    """Measure and report. base: as on the command line; name: what requests call it; checkpoint: its folder."""
    with tempfile.TemporaryDirectory(prefix="loraplex-kinds-") as folder:
        made = write_kinds(checkpoint, Path(folder) / "kinds")
        if made.left_out:
            report.say(f"  no adapter is made of: {', '.join(made.left_out)}")
        with serve(base, *FLAGS) as server:
            asyncio.run(_all(server, name, checkpoint, Path(folder), made, report, rounds, seconds))


async def _all(
    server: Server,
    base: str,
    checkpoint: Path,
    folder: Path,
    made: RandomKinds,
    report: Report,
    rounds: int,
    seconds: float,
) -> None:
    await load(server, {name: folder / "kinds" / name for name in made.names})
    config = ModelConfig.from_hf(checkpoint)
    page = config.num_layers * 2 * config.num_kv_heads * BLOCK_SIZE * config.head_dim * 2
    sizes = {name: page * await pages(server, name) for name in made.names}
    twins = _write_twins(checkpoint, folder / "twins", sizes)
    await load(server, twins)
    mixed = [*made.names, base, PAIR]
    alike = [f"twin-{name}" if f"twin-{name}" in twins else base for name in made.names]
    alike += [base, "twin-lora*0.5+twin-dora*0.5"]
    loaded = [page * await pages(server, name) for name in twins]
    report.say(
        f"  {len(made.names)} adapters of {sum(sizes.values()) / 1e6:.1f} MB on the device; LoRA alone: {len(twins)} "
        f"of {sum(loaded) / 1e6:.1f} MB"
    )
    vocab = config.vocab_size
    differing, distinct = await compare(server, mixed, vocab)
    report.judge("answers in the batch that are not those alone", differing, Target("<=", 0))
    report.note(f"distinct answers of {len(mixed)} to one prompt", distinct)
    rates: dict[str, list[float]] = {"kinds": [], "LoRA alone": []}
    for number in range(rounds):
        for row, names in (("kinds", mixed), ("LoRA alone", alike)):
            rates[row].append(await rate(server, names, vocab, seconds, random.Random(number)))
    for row, found in rates.items():
        report.note(f"tokens per second, {row}", statistics.median(found))
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    report.judge("every kind, against LoRA alone of as many bytes", statistics.median(ratios), Target(">=", 0.8))


def _write_twins(checkpoint: Path, folder: Path, sizes: Mapping[str, int]) -> dict[str, Path]:
    """Write for each adapter a LoRA of about its bytes on the device; what has next to none gets none."""
    config = ModelConfig.from_hf(checkpoint)
    each = adapter_bytes(modules_of(checkpoint, ATTENTION), 1)
    found = {}
    for seed, (name, size) in enumerate(sizes.items()):
        if rank := round(size / each):
            raw = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(ATTENTION)}
            found[f"twin-{name}"] = folder / name
            write_kind(folder / name, raw, config, seed)
    return found


async def load(server: Server, folders: Mapping[str, Path]) -> None:
    """Register adapters by name. Raises RuntimeError for one that is refused."""
    for name, folder in folders.items():
        body = {"lora_name": name, "lora_path": str(folder)}
        status, text = await call(server.address, "POST", "/v1/load_lora_adapter", body)
        if status != 200:
            raise RuntimeError(f"{name}: {text}")


async def pages(server: Server, name: str) -> int:
    """Of a loaded adapter on the device."""
    _, text = await call(server.address, "GET", f"/v1/adapters/{name}")
    return int(json.loads(text)["pages"])


async def compare(server: Server, names: Sequence[str], vocab: int) -> tuple[int, int]:
    """Count the adapters whose answer beside all others is not the one they give alone, and the different answers."""
    prompt = _prompt(random.Random(7), vocab)

    async def answer(name: str) -> str:
        request = Request(name, prompt, OUTPUT_TOKENS, {"stream": False})
        status, text = await call(server.address, "POST", request.path, request.content())
        if status != 200:
            raise RuntimeError(f"{name}: {text}")
        return str(json.loads(text)["choices"][0]["text"])

    alone = {name: await answer(name) for name in names}
    together = await asyncio.gather(*(answer(name) for name in names))
    differing = sum(alone[name] != found for name, found in zip(names, together, strict=True))
    return differing, len(set(together))


async def rate(server: Server, names: Sequence[str], vocab: int, seconds: float, rng: random.Random) -> float:
    """Output tokens per second of STREAMS streams over `names` in turn, whole rounds of them for about `seconds`."""
    order, end = itertools.cycle(names), time.monotonic() + seconds
    sent = 0

    def draw() -> Request | None:
        nonlocal sent
        if time.monotonic() > end and sent % len(names) == 0:
            return None
        sent += 1
        return Request(next(order), _prompt(rng, vocab), OUTPUT_TOKENS)

    start = time.perf_counter()
    replies = await keep_streaming(server.address, draw, STREAMS)
    return sum(reply.tokens for reply in replies) / (time.perf_counter() - start)


def _prompt(rng: random.Random, vocab: int) -> list[int]:
    """Draw a prompt above what is special, that calls an activated LoRA before its last quarter."""
    low = min(INVOCATION, vocab // 2)
    prompt = [rng.randrange(low, vocab) for _ in range(PROMPT_TOKENS)]
    prompt[PROMPT_TOKENS * 3 // 4] = INVOCATION
    return prompt
