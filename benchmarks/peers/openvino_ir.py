"""OpenVINO GenAI in an environment of its own: its ContinuousBatchingPipeline, in its process and without HTTP.

The model is converted once by optimum-intel, from the very files that the demo base consists of. Its weights are kept
in 16 bits (bf16 values, which float16 holds), in int8 a channel, or in int4 a group of 64: its default of 128 does not
divide the rows. The settings are those that its documentation names for latency on a CPU: PERFORMANCE_HINT LATENCY,
one stream, a thread for each core. Precisions are its defaults for this machine: arithmetic in bf16 where the CPU has
it and fp32 elsewhere, keys and values in 8 bits, activations of int8 and int4 weights quantised on the fly.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loraplex.benchmarks.peers.peer import Peer, Skipped
from loraplex.benchmarks.peers.piped import Piped, worker
from loraplex.benchmarks.peers.processes import make_environment, run
from loraplex.benchmarks.random_adapters import WEIGHTS
from loraplex.benchmarks.readme_loads import CONTEXTS, LOADS, Load

VERSION = "2026.4.1.0"


def torch_version() -> str:
    """Ours: wherever pip found one without CUDA, it finds it again."""
    return importlib.metadata.version("torch").partition("+")[0]


PACKAGES = (f"openvino-genai=={VERSION}", "optimum-intel==2.2.0", "nncf==3.4.0", f"torch=={torch_version()}")
"""The last three convert; pip's configuration or PIP_EXTRA_INDEX_URL says where a torch without CUDA is."""

UNUSED = ("torchvision",)
"""A requirement of the converter's, which PyPI has for CUDA's torch alone: it cannot be imported beside torch +cpu."""

WEIGHT_FORMATS = {
    "OpenVINO": ("--weight-format", "fp16"),
    "OpenVINO int8": ("--weight-format", "int8"),
    "OpenVINO int4": ("--weight-format", "int4", "--group-size", "64", "--ratio", "1.0"),
}
"""By the peer's name, what optimum-cli is told."""

BATCHED_TOKENS = 2048
"""Of one step, prompts and answers. 16 prompts of 96 at once take 5 % less of the CPU than in its default of 256."""

WORKER = Path(__file__).with_name("openvino_worker.py")


def install(folder: Path) -> Path:
    """The environment's home under `folder`, made unless it is there: 1.6 GB, minutes of downloads. Raises Skipped."""
    home = folder / f"openvino-{VERSION}"
    whole = home / "installed.json"
    if whole.exists():
        return home
    found = make_environment(home, PACKAGES, UNUSED)
    wanted = ("openvino", "openvino-genai", "optimum-intel", "nncf")
    whole.write_text(json.dumps({name: found[name] for name in wanted if name in found}))
    return home


def convert(home: Path, base: Path, name: str) -> Path:
    """The folder with `base` as the peer `name` wants it, made unless it is there: a minute. Raises Skipped."""
    model = home / "models" / name.replace(" ", "-")
    if model.exists():
        return model
    partial = model.with_suffix(".partial")
    partial.parent.mkdir(exist_ok=True)
    line = ["env", "HF_HUB_OFFLINE=1", str(home / "venv/bin/optimum-cli"), "export", "openvino", "--model", str(base)]
    line += ["--task", "text-generation-with-past", *WEIGHT_FORMATS[name], str(partial)]
    run(line, home / f"{model.name}.log")
    if not (partial / "openvino_model.xml").exists():  # it exits with 0 where a group size does not fit
        raise Skipped(f"optimum-cli wrote no model, see {home / model.name}.log")
    partial.rename(model)
    return model


def command(home: Path, model: Path, adapters: Sequence[Path]) -> list[str]:
    """The worker's."""
    files = [str(adapter / WEIGHTS) for adapter in adapters]
    options = {"cores": len(os.sched_getaffinity(0)), "batched": BATCHED_TOKENS, "adapters": files}
    return [str(home / "venv/bin/python"), "-P", str(WORKER), str(model), json.dumps(options)]


def peer(name: str, folder: Path, base: Path, adapters: Sequence[Path]) -> Peer:
    """The one of WEIGHT_FORMATS, installed and converted under `folder`. Raises Skipped.

    Loads with adapters are run on 16-bit weights alone, one request after the other: a batch of it wears one set.
    """
    home = install(folder)
    model = convert(home, base, name)

    @contextmanager
    def start(load: Load) -> Iterator[Piped]:
        with worker(name, command(home, model, adapters[: load.adapters])) as running:
            yield Piped(running)

    loads = [load.name for load in (*LOADS, *CONTEXTS) if name == "OpenVINO" or not load.adapters]
    settings = (
        f"no HTTP; weights by {' '.join(WEIGHT_FORMATS[name])}; ContinuousBatchingPipeline, max_num_batched_tokens "
        f"{BATCHED_TOKENS}, no prefix cache; LATENCY, one stream, a thread a core; precisions by default"
    )
    return Peer(name, json.loads((home / "installed.json").read_text()), start, loads, settings)
