"""AdapterInfo: what log lines say of an adapter's size."""

from __future__ import annotations

from loraplex.adapters.info import AdapterInfo


def test_a_kind_without_ranks_is_called_by_its_name() -> None:
    assert AdapterInfo(8, ("q_proj",), 12, 3_000_000).size == "rank 8, 12 pages"
    assert AdapterInfo(0, ("k_proj",), 1, 3_000, kind="ia3").size == "IA3, 1 pages"
