"""What the base's files hash to is kept for the next start, and damage of it costs no more than reading them again."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.server.proof.base_file import FILE, identified


def given(state: Path | None, found: dict[str, str]) -> dict[str, str]:
    """What an identifier is given that leaves `found`."""
    seen: list[dict[str, str]] = []

    def identify(known: dict[str, str]) -> str:
        seen.append(dict(known))
        known.clear()
        known.update(found)
        return "digest"

    assert identified(state, identify) == "digest"
    return seen[0]


def test_it_is_kept(tmp_path: Path) -> None:
    assert given(tmp_path, {"file": "one"}) == {}
    assert given(tmp_path, {"file": "two"}) == {"file": "one"}
    assert given(tmp_path, {}) == {"file": "two"}
    assert given(None, {"file": "one"}) == {}


@pytest.mark.parametrize("text", ["", "{damaged", "[1]", "null"])
def test_damage_is_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert given(tmp_path, {"file": "one"}) == {}
    assert given(tmp_path, {"file": "one"}) == {"file": "one"}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    assert given(tmp_path / "gone", {"file": "one"}) == {}
