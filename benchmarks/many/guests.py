"""Adapters for a soak beside the good ones: damaged ones, one whose file changes, and a folder of all."""

from __future__ import annotations

import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

from loraplex.benchmarks.random_adapters import WEIGHTS, Module, write_adapter

BAD = ("not_finite", "truncated", "wrong_shape", "no_weights")

CHANGING = "changing"


def make_folder(folder: Path, good: Path, count: int, modules: list[Module], rank: int) -> None:
    """Hard links to ad0 .. of `good`, the bad ones, and one to change, as a server's --adapter-dir."""
    folder.mkdir(parents=True)
    for index in range(count):
        shutil.copytree(good / f"ad{index}", folder / f"ad{index}", copy_function=os.link)
    for name in BAD:
        make_bad(folder / name, name, modules, rank)
    write_adapter(folder / CHANGING, modules, rank, seed=count)


def make_bad(path: Path, kind: str, modules: list[Module], rank: int) -> None:
    """An adapter that must be refused for the reason its `kind` names."""
    if kind == "wrong_shape":
        modules = [replace(modules[0], n_in=modules[0].n_in + 1), *modules[1:]]
    write_adapter(path, modules, rank, seed=1)
    file = path / WEIGHTS
    match kind:
        case "not_finite":
            with file.open("r+b") as handle:
                handle.seek(-2, os.SEEK_END)
                handle.write(struct.pack("<H", 0x7FC0))  # bf16: not a number
        case "truncated":
            os.truncate(file, file.stat().st_size // 2)
        case "no_weights":
            file.unlink()


def change(path: Path, modules: list[Module], rank: int, seed: int) -> None:
    """Give the adapter other weights, by one rename, as a careful publisher does."""
    beside = path.with_name(f".{path.name}")
    write_adapter(beside, modules, rank, seed)
    (beside / WEIGHTS).replace(path / WEIGHTS)
