"""Before a base is loaded: what the process is set to, and where the base is."""

from __future__ import annotations

import ctypes
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Iterable, MutableMapping
from contextlib import suppress
from pathlib import Path

from loraplex.server.address_space import address_limit
from loraplex.server.config import DEMO

BASE_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
"""What is downloaded of a base's Hub repository: never a pickle, never code."""

LEAST_ADDRESSES = 1 << 30
"""Bytes of address space; Python, torch and their threads map 720 MiB before a base is read."""

DESCRIPTORS = 65_536
"""Open files and connections, more than any limit here asks for."""

M_ARENA_MAX = -8
"""malloc.h's."""


READING_THREADS = 3
"""Of the tokenizers library: two short texts and a long one are read at a time (text/fair_pool.py)."""


class StartError(Exception):
    """The server cannot start; the message is one line that says why and what to do."""

    def __init__(self, reason: object) -> None:
        super().__init__(" ".join(str(reason).split()))


def prepare_environment(environ: MutableMapping[str, str]) -> None:
    """Set what libraries read when they are loaded: call before torch is imported. The user's own are kept.

    Waiting OpenMP threads sleep: spinning, they would take the cores from the API's thread and, in containers, from
    the quota. The threads of tokenizers are rayon's.
    """
    settings = {
        "OMP_NUM_THREADS": str(usable_cpus()),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "true",
        "RAYON_NUM_THREADS": str(READING_THREADS),
    }
    for name, value in settings.items():
        environ.setdefault(name, value)


def bound_malloc() -> None:
    """Call before threads are started: two arenas for all of them. Each keeps what was freed in it, up to 64 MiB."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(M_ARENA_MAX, 2)


def hide_arguments(secrets: Iterable[str]) -> None:
    """Overwrite those among this process's arguments, where everybody sees them: `ps`, /proc/PID/cmdline.

    Only Linux tells where they lie, in fields 48 and 49 of /proc/self/stat. Until this is called they were to be seen.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
    except (OSError, ValueError, IndexError):
        return
    shown = ctypes.string_at(start, end - start)
    for secret in filter(None, secrets):
        for found in re.finditer(rb"(?<=[\0=])" + re.escape(os.fsencode(secret)) + rb"(?=\0)", shown):
            ctypes.memset(start + found.start(), ord("*"), len(found[0]))


def check_address_space() -> None:
    """Raise StartError where libraries could not even be loaded: they end the process in ways that tell nothing."""
    limit = address_limit()
    if 0 <= limit < LEAST_ADDRESSES:
        raise StartError(
            f"the address space is limited to {limit >> 20} MiB (ulimit -v), and the process alone takes "
            f"{LEAST_ADDRESSES >> 20}; raise the limit to that and --memory"
        )


def raise_descriptors() -> None:
    """Files and connections this process may have open, as far as the system lets it: shells begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # macOS says "unlimited" and takes less
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptors() -> int:
    """Count the files and connections that this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def usable_cpus() -> int:
    """Count the cores this process may use: its affinity, less where a container's quota is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2 here, or the quota is "max"
        return cores


def end_on_sigterm() -> None:
    """End on SIGTERM until the server handles signals itself: a container's first process would not hear of it."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def find_base(base: str, native: bool = False) -> Path:
    """Find the folder of the base `base`: made ("demo", a GGUF file), local, or downloaded. Raises StartError.

    native: the demo base is served out of its GGUF, without being converted.
    """
    if base == DEMO:
        from loraplex.server.models.demo import DemoError, ensure_demo_base, find_verified_source

        try:
            return _folder_of_gguf(find_verified_source()) if native else ensure_demo_base()
        except DemoError as error:
            raise StartError(error) from error
    path = Path(base).expanduser()
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.gguf"))
        if inside and not (path / "config.json").exists():
            raise StartError(f"the folder {base!r} has no config.json; give a GGUF file in it, such as {inside[0]}")
        return path
    if path.exists():
        return _folder_of_gguf(path)
    if base.count("/") != 1 or base.startswith(("/", ".", "~")):
        raise StartError(f"there is no folder {base!r}; give a folder, a Hub id such as org/name, or {DEMO!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=list(BASE_FILES)))
    except Exception as error:  # the Hub client fails in a dozen ways
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise StartError(f"there is no folder {base!r}, and the Hub could not give it either: {reason}") from error


def _folder_of_gguf(file: Path) -> Path:
    """Make the folder that stands for the GGUF `file`. Raises StartError."""
    from loraplex.server.models.demo import default_cache_dir
    from loraplex.server.models.gguf.folder import folder_for
    from loraplex.server.models.gguf.header import GgufError

    try:
        return folder_for(file, default_cache_dir())
    except GgufError as error:
        raise StartError(error) from error
