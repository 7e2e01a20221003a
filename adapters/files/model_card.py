"""Read what the model card of an adapter (README.md) says of it in its front matter, within bounds.

A card is a remark: what is wrong with it is said in its place, and refuses nothing.
"""

from __future__ import annotations

import os
import re
from typing import Any

from loraplex.adapters.files.beneath import Folder
from loraplex.adapters.files.bounded_yaml import parse_yaml

FILE = "README.md"

MAX_BYTES = 16 << 10
"""Of the front matter; a fraction of a millisecond to find, 5 ms to parse."""

MAX_TEXT, MAX_ITEMS = 200, 20
"""Characters of a value, and items of a list, that are kept."""

FIELDS = (
    "base_model",
    "datasets",
    "language",
    "library_name",
    "license",
    "model_name",
    "pipeline_tag",
    "tags",
    "version",
)
"""Of the Hub's model cards; others are prose, or metrics in a form of their own."""

_FRONT = re.compile(rb"\A(?:\xef\xbb\xbf)?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)

Card = dict[str, str | list[str]]


def read_card(place: Folder) -> Card:
    """Read the fields of the card in an adapter's folder that are text, numbers or lists of them; {}: there are none.

    A card that cannot be read has the one field "error".
    """
    try:
        with place.open(FILE) as (handle, info):
            data = os.read(handle, min(info.st_size, MAX_BYTES))
    except OSError:
        return {}
    front = _FRONT.match(data)
    if front is None:
        too_long = data.startswith(b"---") and len(data) == MAX_BYTES
        return {"error": f"its front matter does not end within {MAX_BYTES} bytes"} if too_long else {}
    try:
        found = parse_yaml(front[1])
    except ValueError:
        return {"error": "its front matter is no YAML that can be followed"}
    if not isinstance(found, dict):
        return {}
    values = {name: _value(found[name]) for name in FIELDS if name in found}
    return {name: value for name, value in values.items() if value is not None}


def _value(found: Any) -> str | list[str] | None:
    if isinstance(found, str | int | float):
        return _text(found)
    if isinstance(found, list):
        return [_text(item) for item in found[:MAX_ITEMS] if isinstance(item, str | int | float)]
    return None


def _text(found: object) -> str:
    return " ".join(str(found).split()).encode("utf-8", "replace").decode()[:MAX_TEXT]
