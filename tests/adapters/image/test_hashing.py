"""SHA-256 in compiled code, against hashlib."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplex.adapters.image.hashing import Hash
from loraplex.adapters.image.packing import OpenFile

both = pytest.mark.parametrize("native", [True, False])


@both
@given(st.lists(st.binary(max_size=200) | st.sampled_from([bytes(55), bytes(56), bytes(64), bytes(1000)]), max_size=8))
def test_in_whatever_pieces(native: bool, pieces: list[bytes]) -> None:
    digest, known = Hash(native), hashlib.sha256()
    for piece in pieces:
        digest.take(piece)
        known.update(piece)
        assert digest.hexdigest() == known.hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    """A descriptor and what it holds: more than is read at a time."""
    data = random.Random(0).randbytes(700_001)
    (tmp_path / "file").write_bytes(data)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    yield descriptor, data
    os.close(descriptor)


@both
@pytest.mark.parametrize("nice", [0, 10])
def test_read_from_a_file(file: tuple[int, bytes], native: bool, nice: int) -> None:
    descriptor, data = file
    digest, memory = Hash(native), torch.zeros(len(data) - 3, dtype=torch.uint8)
    digest.take(data[:3])
    digest.read(OpenFile(descriptor, 3), memory[:1000], nice)
    digest.read(OpenFile(descriptor, 1003), memory[1000:], nice)
    assert memory.numpy().tobytes() == data[3:]
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("nice", [0, 10])
def test_what_keeps_it_from_reading(file: tuple[int, bytes], tmp_path: Path, nice: int) -> None:
    descriptor, data = file
    with pytest.raises(EOFError, match="ends before"):
        Hash().read(OpenFile(descriptor, 1), torch.zeros(len(data), dtype=torch.uint8), nice)
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(IsADirectoryError):
        Hash().read(OpenFile(folder, 0), torch.zeros(8, dtype=torch.uint8), nice)
    os.close(folder)


WITHOUT_THREADS = """
import os, resource, sys
import torch
from loraplex.adapters.image.hashing import Hash
from loraplex.adapters.image.packing import OpenFile
memory, digest = torch.zeros(1000, dtype=torch.uint8), Hash()
file = OpenFile(os.open("/dev/zero", os.O_RDONLY), 0)
with open("/proc/self/statm") as sizes:
    size = int(sizes.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), -1))  # no thread's stack fits
digest.read(file, memory, 10)
print(digest.hexdigest())
"""


def test_where_there_can_be_no_more_threads() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_THREADS], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == hashlib.sha256(bytes(1000)).hexdigest(), done.stderr


def priorities() -> set[int]:
    """Of the threads that this process has."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            found.add(os.getpriority(os.PRIO_PROCESS, int(task)))
    return found


def test_a_lower_priority_is_that_of_another_thread() -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    descriptor = os.open("/dev/zero", os.O_RDONLY)
    memory = torch.zeros(32 << 20, dtype=torch.uint8)  # 0.1 s without the instructions
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(Hash(native=False).read, OpenFile(descriptor, 0), memory, 7)
        seen = set[int]()
        while not reading.done():
            seen |= priorities()
        reading.result()
    os.close(descriptor)
    assert min(19, own + 7) in seen
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
