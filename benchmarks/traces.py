"""Recorded traffic: when requests came and how long they were, as two public datasets write it.

- Azure's LLM inference traces of 2023 and 2024, CSV: `TIMESTAMP,ContextTokens,GeneratedTokens`, the timestamp a date
  and a time of day with up to seven digits of a second (`2023-11-16 18:17:03.9799600`), in 2024 with an offset.
- Mooncake's, JSON lines: `{"timestamp": milliseconds, "input_length": n, "output_length": n, "hash_ids": [...]}`;
  a hash id stands for 512 tokens of a prompt, and equal ones at the start of two prompts are what these share.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_BLOCK = 512
"""Tokens of one of Mooncake's hash ids."""

MOST_TOKENS = 10_000_000
"""Of a prompt or an answer: more than any model takes."""

_FRACTION = re.compile(r"\.(\d+)")


class BadTrace(Exception):
    """A file is no trace that can be read; the message names the line and what was expected."""


@dataclass(frozen=True)
class TraceRow:
    """A request of a trace."""

    at: float  # seconds after the first one
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()  # hash ids


def read_trace(path: Path) -> list[TraceRow]:
    """A trace in either format, known by its first line; by time, from 0. Raises BadTrace, OSError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            if first.lstrip().startswith("{"):
                rows = [_mooncake(path, number, line) for number, line in enumerate(file, 1) if line.strip()]
            else:
                rows = _azure(path, csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadTrace(f"{path}: no text of a trace: {error}") from None
    if not rows:
        raise BadTrace(f"{path}: no requests in it")
    rows.sort(key=lambda row: row.at)
    start = rows[0].at
    return [TraceRow(row.at - start, row.prompt_tokens, row.output_tokens, row.blocks) for row in rows]


def _azure(path: Path, reader: csv.DictReader[str]) -> list[TraceRow]:
    if missing := set(AZURE_COLUMNS) - set(reader.fieldnames or ()):
        expected = f"Azure's {','.join(AZURE_COLUMNS)} or Mooncake's JSON lines"
        raise BadTrace(f"{path}:1: no column {', '.join(sorted(missing))}; expected {expected}")
    rows = []
    for number, line in enumerate(reader, 2):
        try:
            when, prompt, output = (line[name] for name in AZURE_COLUMNS)
            rows.append(_row(_seconds(when), int(prompt), int(output)))
        except (ValueError, TypeError) as error:
            raise BadTrace(f"{path}:{number}: {error}") from None
    return rows


def _seconds(text: str) -> float:
    """Of the epoch; a time without an offset counts as UTC's, since only differences matter."""
    digits = _FRACTION.search(text)
    whole = datetime.fromisoformat(_FRACTION.sub("", text.strip()))
    return _epoch(whole) + (float(f"0.{digits[1]}") if digits else 0.0)


def _epoch(when: datetime) -> float:
    zero = datetime(2000, 1, 1, tzinfo=when.tzinfo)
    return (when - zero).total_seconds()


def _mooncake(path: Path, number: int, line: str) -> TraceRow:
    try:
        found: Mapping[str, Any] = json.loads(line)
        blocks = tuple(int(block) for block in found.get("hash_ids", ()))
        return _row(found["timestamp"] / 1000, int(found["input_length"]), int(found["output_length"]), blocks)
    except KeyError as error:
        raise BadTrace(f"{path}:{number}: no {error}; expected timestamp, input_length, output_length") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise BadTrace(f"{path}:{number}: {error}") from None


def _row(at: float, prompt: int, output: int, blocks: Iterable[int] = ()) -> TraceRow:
    """A recorded answer may have been empty; one token is the least that can be asked for."""
    if not (0 <= prompt <= MOST_TOKENS and 0 <= output <= MOST_TOKENS):
        raise ValueError(f"{prompt} prompt tokens and {output} output tokens; expected 0 to {MOST_TOKENS:,}")
    if not math.isfinite(at):
        raise ValueError(f"a time of {at}")
    return TraceRow(at, max(1, prompt), max(1, output), tuple(blocks))
