"""Layers whose keys and values share pages, and how many pages a sequence comes to hold."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

MAX_GROUPS = 8
"""Backends have room for as many page tables in a step."""


@dataclass(frozen=True)
class GroupSpec:
    """Layers that share pages. `len(layers)` may fall short of the page's layer places: the rest is padding."""

    layers: tuple[int, ...]
    window: int | None


def kv_groups(windows: ListLike[int | None]) -> tuple[GroupSpec, ...]:
    """Cut layers (`windows[i]` is layer i's window) into groups of one window and equal size.

    The size is the least frequent window's layer count, or the most frequent one's where they are within a quarter of
    each other (12 and 13 layers make two groups of 13, not two of 12 and one of 1), or more where that makes too many
    groups; a window's last group may be padded. Gemma 3 (26 layers, 4 of them full): 1 + 6 groups of 4 with 2 places
    unused.
    """
    by_window: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        by_window.setdefault(window, []).append(layer)
    counts = [len(layers) for layers in by_window.values()]
    size = max(counts) if 4 * max(counts) < 5 * min(counts) else min(counts)
    while sum(-(-count // size) for count in counts) > max(MAX_GROUPS, len(counts)):
        size += 1
    return tuple(
        GroupSpec(tuple(layers[start : start + size]), window)
        for window, layers in by_window.items()
        for start in range(0, len(layers), size)
    )


def group_layers(groups: ListLike[GroupSpec]) -> int:
    """Count the layer places in every KV page."""
    return max(len(group.layers) for group in groups)


def peak_pages(groups: ListLike[GroupSpec], block_size: int, num_tokens: int, chunk: int) -> int:
    """Bound the pages a sequence of `num_tokens` ever holds when at most `chunk` tokens are computed in a step."""
    blocks = -(-num_tokens // block_size)
    total = 0
    for group in groups:
        # A chunk's queries see window - 1 + chunk keys; an interval that long touches at most this many blocks.
        most = blocks if group.window is None else (group.window + chunk - 3 + block_size) // block_size + 1
        total += min(blocks, most)
    return total
