"""JSON that strangers wrote, as objects, within bounds that are looked at before any object is made.

json.loads holds the GIL from its first byte to its last, and 85 MB of "[]" take it 16 s. What decides is how many
values there are, so brackets, colons and commas are counted first (1 ms a MB). A million values take 60 ms, those of
an adapter's header in these bounds 3 ms; numbers are looked at before they are computed, by Python's own code, which
others may interrupt. Messages say where and not what: the file may be none of the caller's.
"""

from __future__ import annotations

import json
from typing import Any

MAX_DIGITS = 40
"""Of a number: 2 ** 64 has 20, and a float64 written to its last bit some 25."""


def parse_json(data: bytes, max_bytes: int, max_values: int) -> Any:
    """Parse `data`. Raises ValueError, whose message holds nothing of the data.

    max_values: brackets, colons and commas, those inside of strings among them.
    """
    if len(data) > max_bytes:
        raise ValueError(f"it has {len(data)} bytes, at most {max_bytes} are read")
    found = sum(map(data.count, (b"[", b"{", b":", b",")))
    if found > max_values:
        raise ValueError(f"it holds {found} values or more, at most {max_values} are read")
    try:
        return json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_int=_int,
            parse_float=_float,
            parse_constant=_constant,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice in one object")
    return found


def _int(text: str) -> int:
    return int(_short(text))


def _float(text: str) -> float:
    return float(_short(text))


def _constant(text: str) -> float:
    raise ValueError("it holds NaN or Infinity, which JSON does not have")


def _short(text: str) -> str:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(text)} digits, at most {MAX_DIGITS} are read")
    return text
