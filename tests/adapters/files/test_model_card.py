"""Model cards: the fields that are kept, and what strangers put there."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.adapters.files.beneath import opened
from loraplex.adapters.files.model_card import MAX_BYTES, MAX_ITEMS, MAX_TEXT, Card, read_card


def card(folder: Path, text: str | None) -> Card:
    if text is not None:
        (folder / "README.md").write_text(text)
    with opened(folder) as place:
        return read_card(place)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, {}),
        ("# an adapter\n", {}),
        ("---\ntags: [lora, sql, 3]\nmodel-index: [{a: 1}]\n---\n# it\n", {"tags": ["lora", "sql", "3"]}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: {a: b}\nversion: 1.2\n---\n", {"version": "1.2"}),
        ("---\nbase_model: |\n  org/\n  x\n---\n", {"base_model": "org/ x"}),
        ("---\n- a\n- b\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("text\n---\nlicense: mit\n---\n", {}),
    ],
)  # fmt: skip
def test_fields(tmp_path: Path, text: str | None, found: Card) -> None:
    assert card(tmp_path, text) == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("---\n{[\n---\n", "no YAML"),
        (
            "---\na: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b]\nd: [*c, *c, *c, *c]\n---\n",
            "no YAML",
        ),
        ("---\nlicense: " + "x" * MAX_BYTES + "\n---\n", "does not end"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, text: str, why: str) -> None:
    found = card(tmp_path, text)
    assert list(found) == ["error"]
    assert why in found["error"]


def test_it_is_bounded(tmp_path: Path) -> None:
    tags = "\n".join(f"- t{i}" for i in range(100))
    found = card(tmp_path, f"---\nlicense: {'x' * 1000}\ntags:\n{tags}\n---\n")
    assert (len(found["license"]), len(found["tags"])) == (MAX_TEXT, MAX_ITEMS)


def test_no_link_out_of_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("---\nlicense: mine\n---\n")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with opened(folder, [folder]) as place:
        assert read_card(place) == {}
