"""`loraplex adapters list` and `diff`: what a running server knows of its adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.server.command.remote import Remote, RemoteError

DIGITS = 12
"""Of a digest, in tables."""

RECEIPT_SECONDS = 60.0
"""That a receipt is waited for."""


@dataclass(frozen=True)
class ReceiptDifference:
    """One field that two receipts differ in."""

    path: str  # "effect.sites.0.relative"
    one: Any  # None: the receipt has no such field
    other: Any


def list_adapters(remote: Remote) -> list[dict[str, Any]]:
    """Ask for all adapters that the key may see, by name, each as GET /v1/adapters/{name} tells it.

    No receipt is begun for it. Raises RemoteError.
    """
    cards = remote.ask("GET", "/v1/models")["data"]
    return [remote.adapter(card["id"]) for card in cards if card["parent"] is not None]


def table(adapters: list[dict[str, Any]]) -> str:
    """Write one line an adapter."""
    head = ("name", "kind", "rank", "pages", "digest", "effect", "source")
    return columns([head, *(_row(each) for each in adapters)])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Write rows of as many cells each below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def find_differences(remote: Remote, one: str, other: str) -> list[ReceiptDifference]:
    """Compare the receipts of two adapters, or of two versions. Raises RemoteError where one has none."""
    first, second = (_receipt(remote, name) for name in (one, other))
    left, right = dict(_leaves(first)), dict(_leaves(second))
    paths = [*left, *(path for path in right if path not in left)]
    return [
        ReceiptDifference(path, left.get(path), right.get(path)) for path in paths if left.get(path) != right.get(path)
    ]


def _receipt(remote: Remote, name: str) -> Mapping[str, Any]:
    proof = remote.adapter(name, wait=RECEIPT_SECONDS)["proof"]
    if proof["receipt"] is None:
        raise RemoteError(f"there is no receipt of {name!r}: {proof['error'] or proof['status']}")
    found: Mapping[str, Any] = proof["receipt"]
    return found


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _row(adapter: Mapping[str, Any]) -> tuple[str, ...]:
    proof = adapter["proof"]
    effect = f"{proof['receipt']['effect']['relative']:.3g}" if proof["receipt"] else proof["status"]
    numbers = (str(adapter["rank"] or "-"), str(adapter["pages"]))
    digest = (adapter["digest"] or "not read")[:DIGITS]
    return (adapter["id"], adapter["kind"], *numbers, digest, effect, adapter["source"])
