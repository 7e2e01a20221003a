"""What is attacked: a server of its own with keys and a plan for its memory, or one that runs already."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loraplex.benchmarks.adversary.target import Target
from loraplex.benchmarks.load import Address
from loraplex.benchmarks.many.served import serve
from loraplex.benchmarks.random_adapters import modules_of, write_adapter
from loraplex.server.startup import find_base
from loraplex.server.tenancy.keys_file import new_key

MODEL = "base"
"""What requests call it."""


@dataclass(frozen=True)
class Victim:
    """Another client's view, and the server's process where it is known."""

    address: Address
    model: str
    pid: int | None = None
    memory: int = 0  # bytes of the plan; 0: unknown
    end: Callable[[], None] = lambda: None  # the process


@dataclass(frozen=True)
class World:
    """How to start one, again and again: each has folders of its own."""

    base: str  # "demo" or a folder
    memory: int
    flags: tuple[str, ...] = ()

    @contextmanager
    def started(self, open_files: int | None = None) -> Iterator[tuple[Victim, Target]]:
        """A server with two tenants, one of which attacks. Raises served.NotStarted."""
        with tempfile.TemporaryDirectory(prefix="loraplex-adversary-") as scratch:
            root = Path(scratch)
            for folder in ("files", "watched"):
                (root / folder).mkdir()
            write_adapter(root / "sample", modules_of(find_base(self.base), ("q_proj",)), rank=1, seed=0)
            good, good_entry = new_key("good", "good")
            evil, evil_entry = new_key("evil", "evil", load_on_use=True)
            (root / "keys.yaml").write_text(f"keys:\n{good_entry}{evil_entry}")
            flags = (
                *("--api-keys", str(root / "keys.yaml"), "--allowed-path", str(root / "files")),
                *("--adapter-dir", str(root / "watched"), "--memory", str(self.memory)),
                *("--served-model-name", MODEL, *self.flags),
            )
            with serve(self.base, *flags, open_files=open_files) as server:
                address = replace(server.address, api_key=evil)
                target = Target(address, MODEL, "evil", root / "files", root / "watched", root / "sample")
                other = replace(server.address, api_key=good)
                yield Victim(other, MODEL, server.pid, self.memory, server.process.kill), target
