"""Long texts are tokenised on threads of a low priority, and not on the one that asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex.adapters.throttle import READING_NICE
from loraplex.server.startup import prepare_environment
from tests.support.tiny import make_tiny_tokenizer

ASKS = """
import os, sys, threading
from pathlib import Path
from loraplex.server.text import reading_threads
from loraplex.server.text.tokenizer import Tokenizer

def spent():
    "Thread -> its nanoseconds on a core."
    tasks = Path("/proc/self/task").iterdir()
    return {int(task.name): int((task / "schedstat").read_text().split()[0]) for task in tasks}

reading_threads.begin()
tokenizer, text, own = Tokenizer.read(Path(sys.argv[1])), "the quick brown fox " * 20_000, threading.get_native_id()
before = spent()
ids = tokenizer.encode(text)
tokenizer.decode(ids)
taken = {thread: spent()[thread] - value for thread, value in before.items()}
low = {thread: value for thread, value in taken.items() if os.getpriority(os.PRIO_PROCESS, thread) >= int(sys.argv[2])}
print(own in low, sum(low.values()) > taken[own] > 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux only")
def test_long_texts_are_read_at_a_low_priority(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    nice = min(19, os.getpriority(os.PRIO_PROCESS, 0) + READING_NICE)
    own = ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")
    environ = {name: value for name, value in os.environ.items() if name not in own}
    prepare_environment(environ)
    command = [sys.executable, "-c", ASKS, str(tmp_path), str(nice)]
    told = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120, check=True)
    assert told.stdout.split() == ["False", "True"]
