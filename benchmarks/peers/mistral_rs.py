"""mistral.rs in an environment of its own: its Python package, in its process and without HTTP (it brings no server).

Weights as the checkpoint's or, by its in-situ quantisation, in Q8_0 (its 4-bit kinds of K-quants want rows of 256, and
this base's have 576); arithmetic as it picks for the CPU, keys and values in f16 as it does there. A worker for each
core (CANDLE_NUM_THREADS, RAYON_NUM_THREADS), a sequence for each stream, no prefix cache. On CPUs it has no paged
attention: sequences of equal length form a batch, those of others wait their turn. Prompts are text: as many words of
one token each as the others get ids.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loraplex.benchmarks.peers.peer import Peer, base_for
from loraplex.benchmarks.peers.piped import Piped, worker
from loraplex.benchmarks.peers.processes import run
from loraplex.benchmarks.readme_loads import CONTEXTS, LOADS, Load

PACKAGE, VERSION = "mistralrs", "0.9.5"

QUANTIZED = {"mistral.rs": None, "mistral.rs Q8_0": "Q8_0"}
"""By the peer's name, the in-situ quantisation."""

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A prompt as it is: the base's own template would put 30 tokens around it."""

WORKER = Path(__file__).with_name("mistralrs_worker.py")


def install(folder: Path) -> Path:
    """The environment's home under `folder`, made unless it is there: 100 MB. Raises Skipped."""
    home = folder / f"{PACKAGE}-{VERSION}"
    template = home / "plain.jinja"
    if template.exists():
        return home
    home.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "venv", "--clear", str(home / "venv")], home / "venv.log")
    pip = [str(home / "venv/bin/python"), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", f"{PACKAGE}=={VERSION}"], home / "install.log")
    template.write_text(TEMPLATE)
    return home


def writer(base: Path) -> Callable[[Sequence[int]], str]:
    """Makes text of as many tokens as there are ids, the same of the same ids: words that are one token each."""
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(token[1:] for token in vocabulary if re.fullmatch("Ġ[a-z]{2,}", token))

    def write(prompt: Sequence[int]) -> str:
        return "".join(f" {word}" for word in random.Random(str(prompt)).choices(words, k=len(prompt)))

    return write


def command(home: Path, base: Path, adapters: Sequence[Path], quantized: str | None, streams: int) -> list[str]:
    """The worker's."""
    options = {
        "model": str(base),
        "adapters": [str(adapter) for adapter in adapters],
        "quantized": quantized,
        "streams": streams,
        "template": str(home / "plain.jinja"),
    }
    return [str(home / "venv/bin/python"), "-P", str(WORKER), json.dumps(options)]


def peer(name: str, folder: Path, base: Path, adapters: Sequence[Path]) -> Peer:
    """The one of QUANTIZED, installed under `folder`. Raises Skipped.

    Loads with adapters are run on the checkpoint's weights alone.
    """
    home = install(folder)
    write = writer(base)
    cores = str(len(os.sched_getaffinity(0)))
    environment = {"CANDLE_NUM_THREADS": cores, "RAYON_NUM_THREADS": cores, "HF_HUB_OFFLINE": "1"}

    @contextmanager
    def start(load: Load) -> Iterator[Piped]:
        read = base_for(load, base, folder)
        line = command(home, read, adapters[: load.adapters], QUANTIZED[name], load.streams)
        with worker(name, line, environment) as running:
            yield Piped(running, write)

    loads = [load.name for load in (*LOADS, *CONTEXTS) if QUANTIZED[name] is None or not load.adapters]
    weights = "the checkpoint's weights, dtype auto" if QUANTIZED[name] is None else f"in-situ {QUANTIZED[name]}"
    settings = f"no HTTP; {weights}, f16 keys and values; a thread a core, a sequence a stream, no prefix cache"
    return Peer(name, {PACKAGE: VERSION}, start, loads, settings)
