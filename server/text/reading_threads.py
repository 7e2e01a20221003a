"""The threads that texts are tokenised on: the tokenizers library's own, at a low priority.

A text of 60,000 characters takes 16 to 30 ms of a core. Two such texts at a time, on threads with the engine's
priority, made another client's gaps 2.3 times as long on two cores. Threads of Python's at a low priority are no way
out: who lets go of the interpreter's lock for one waits until it has run (adapters/throttle.py). The library's threads
never have that lock.
"""

from __future__ import annotations

import threading

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from loraplex.adapters.throttle import READING_NICE, lower_priority


def begin() -> None:
    """Start them, with what the library reads for the first time. A thread has the priority of who starts it."""
    thread = threading.Thread(target=_begin, name="reading-threads")
    thread.start()
    thread.join()


def _begin() -> None:
    lower_priority(READING_NICE)
    Tokenizer(WordLevel({"": 0}, unk_token="")).encode_batch(["", ""])
