"""mistral.rs in an environment of its own: its Python package, in its process and without HTTP (it brings no server).

The checkpoint's weights in the arithmetic that it picks for the CPU, keys and values in f16 as it does there. A worker
for each core (CANDLE_NUM_THREADS, RAYON_NUM_THREADS), a sequence for each stream, no prefix cache. On CPUs it has no
paged attention: sequences of equal length form a batch, those of others wait their turn. Prompts are text: as many
words of one token each as the others get ids.

Its quantised weights are left out: PyPI's wheel is compiled for x86-64 in general, which leaves their products without
vector instructions. In Q8_0 a prompt of 96 tokens takes 7 seconds of a Zen 4 core, with the checkpoint's weights 1; its
4-bit K-quants want rows of 256, and this base's have 576.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loraplex.benchmarks.peers.peer import Peer, base_for
from loraplex.benchmarks.peers.piped import Piped, worker
from loraplex.benchmarks.peers.processes import make_environment
from loraplex.benchmarks.readme_loads import CONTEXTS, LOADS, Load

PACKAGE, VERSION = "mistralrs", "0.9.5"

NAME = "mistral.rs"

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A prompt as it is: the base's own template would put 30 tokens around it."""

WORKER = Path(__file__).with_name("mistralrs_worker.py")


def install(folder: Path) -> Path:
    """The environment's home under `folder`, made unless it is there: 100 MB. Raises Skipped."""
    home = folder / f"{PACKAGE}-{VERSION}"
    template = home / "plain.jinja"
    if template.exists():
        return home
    make_environment(home, [f"{PACKAGE}=={VERSION}"])
    template.write_text(TEMPLATE)
    return home


def writer(base: Path) -> Callable[[Sequence[int]], str]:
    """Makes text of as many tokens as there are ids, the same of the same ids: words that are one token each."""
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(token[1:] for token in vocabulary if re.fullmatch("Ġ[a-z]{2,}", token))

    def write(prompt: Sequence[int]) -> str:
        return "".join(f" {word}" for word in random.Random(str(prompt)).choices(words, k=len(prompt)))

    return write


def command(home: Path, base: Path, adapters: Sequence[Path], streams: int) -> list[str]:
    """The worker's."""
    options = {
        "model": str(base),
        "adapters": [str(adapter) for adapter in adapters],
        "streams": streams,
        "template": str(home / "plain.jinja"),
    }
    return [str(home / "venv/bin/python"), "-P", str(WORKER), json.dumps(options)]


def peer(folder: Path, base: Path, adapters: Sequence[Path]) -> Peer:
    """Installed under `folder`. Raises Skipped."""
    home = install(folder)
    write = writer(base)
    cores = str(len(os.sched_getaffinity(0)))
    environment = {"CANDLE_NUM_THREADS": cores, "RAYON_NUM_THREADS": cores, "HF_HUB_OFFLINE": "1"}

    @contextmanager
    def start(load: Load) -> Iterator[Piped]:
        line = command(home, base_for(load, base, folder), adapters[: load.adapters], load.streams)
        with worker(NAME, line, environment) as running:
            yield Piped(running, write)

    settings = "no HTTP; dtype auto, f16 keys and values; a thread a core, a sequence a stream, no prefix cache"
    return Peer(NAME, {PACKAGE: VERSION}, start, [load.name for load in (*LOADS, *CONTEXTS)], settings)
