"""Attacks by what stands in an adapter's files: loaded over the API, or found in the watched folder."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import time
from itertools import count
from pathlib import Path

from loraplex.benchmarks.adversary.target import Target, repeat
from loraplex.benchmarks.random_adapters import CONFIG, WEIGHTS

EMPTY = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}


def write(folder: Path, header: str) -> Path:
    """An adapter whose weights have this header and nothing after it; it appears whole."""
    partial = folder.with_name(f".{folder.name}")
    partial.mkdir(parents=True)
    data = header.encode()
    (partial / WEIGHTS).write_bytes(struct.pack("<Q", len(data)) + data)
    (partial / CONFIG).write_text(json.dumps(EMPTY))
    return partial.rename(folder)


async def _load_again(target: Target, seconds: float, header: str) -> None:
    """Each time under another name, of another folder."""
    assert target.files is not None
    numbers, files = count(), target.files

    async def one(_: int) -> None:
        name = f"x{next(numbers)}"
        folder = await asyncio.to_thread(write, files / f"{name}-{time.monotonic_ns()}", header)
        await target.load(name, folder)

    await repeat(target, seconds, 1, one)


async def huge_shapes(target: Target, seconds: float) -> None:
    """A header of 1.6 MB: one tensor, with 80,000 dimensions of 20 digits."""
    dimensions = ",".join(["99999999999999999999"] * 80_000)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    await _load_again(target, seconds, f'{{"{name}":{{"dtype":"F32","shape":[{dimensions}],"data_offsets":[0,4]}}}}')


async def many_tensors(target: Target, seconds: float) -> None:
    """A header of 700,000 tensors."""
    each = '"t{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    await _load_again(target, seconds, "{" + ",".join(each.format(number) for number in range(700_000)) + "}")


async def many_lists(target: Target, seconds: float) -> None:
    """A header of 85 MB that is empty lists."""
    await _load_again(target, seconds, '{"__metadata__":[' + ",".join(["[]"] * 28_000_000) + "]}")


async def appearing(target: Target, seconds: float, folders: int = 5000) -> None:
    """5,000 adapters in the watched folder at once: good ones, of one tensor a layer."""
    assert target.watched is not None
    assert target.sample is not None
    target.begin()
    deadline, watched, sample = time.monotonic() + seconds, target.watched, target.sample

    def make() -> None:
        for number in range(folders):
            if time.monotonic() > deadline:
                return
            partial = watched / f".came{number}"
            partial.mkdir()
            for name in (WEIGHTS, CONFIG):
                os.link(sample / name, partial / name)
            partial.rename(watched / f"came{number}")

    await asyncio.to_thread(make)
    await asyncio.sleep(max(0.0, deadline - time.monotonic()))
