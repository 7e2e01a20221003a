"""Read an audit log: verify its chain, and find lines by number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.server.proof.audit import MAX_LINE, NOTHING_BEFORE, Head, files_of, hash_of, read_head


class AuditBroken(Exception):
    """The log is not what was written; `str(error)` says where."""


@dataclass(frozen=True)
class _Line:
    """A line, and what it says of itself."""

    path: Path
    place: int  # in its file, from 1
    data: bytes  # without its end
    fields: dict[str, Any]


def verify(folder: Path, expected: Head | None = None) -> Head:
    """Check every line of the log in `folder` and return its head.

    expected: a head that was kept elsewhere: the log must hold that line, so that a log which was cut short or written
    anew from some line on, with its head, shows. Raises AuditBroken naming the first file and line that are not as
    they were written, and OSError.
    """
    last, seen = Head(), expected is None or expected == Head()
    for line in _lines(folder):
        where = f"{line.path}, line {line.place}"
        number = last.number + 1
        if line.fields.get("number") != number:
            raise AuditBroken(f"{where}: it is number {line.fields.get('number')!r}; expected {number}")
        if line.fields.get("previous") != last.hash:
            raise AuditBroken(f"{where}: it does not follow the line before, or that was changed")
        if json.dumps(line.fields, sort_keys=True, separators=(",", ":")).encode() != line.data:
            raise AuditBroken(f"{where}: it is not written as this log writes")
        last = Head(number, hash_of(line.data))
        seen = seen or last == expected
    head = read_head(folder)
    if head is None and (last.number > 1 or files_of(folder)):
        raise AuditBroken(f"{folder}/head.json is missing or damaged, and the last line found is {last.number}")
    if head is not None and head != last and not _follows(folder, head, last):
        raise AuditBroken(f"{folder}: line {head.number} was written last, and the last one there is {last.number}")
    if not seen:
        assert expected is not None
        raise AuditBroken(f"{folder}: there is no line {expected.number} with the hash {expected.hash}")
    return last


def page(folder: Path, after: int, limit: int) -> list[dict[str, Any]]:
    """Read up to `limit` lines whose numbers are greater than `after`, each with its hash. Raises AuditBroken."""
    found: list[dict[str, Any]] = []
    files = files_of(folder)
    begun = [path for path in files if int(path.stem) <= after + 1]
    for line in _lines(folder, files[max(0, len(begun) - 1) :]):
        number = line.fields.get("number")
        if isinstance(number, int) and number > after:
            found.append({**line.fields, "hash": hash_of(line.data)})
        if len(found) >= limit:
            break
    return found


def _lines(folder: Path, files: list[Path] | None = None) -> Iterator[_Line]:
    for path in files_of(folder) if files is None else files:
        with path.open("rb") as file:
            place = 0
            while data := file.readline(MAX_LINE + 1):
                place += 1
                if not data.endswith(b"\n"):
                    raise AuditBroken(f"{path}, line {place}: it does not end")
                yield _Line(path, place, data[:-1], _parse(data[:-1], f"{path}, line {place}"))
        if place == 0:
            raise AuditBroken(f"{path}: it is empty")


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        raise AuditBroken(f"{where}: it is no JSON") from None
    if not isinstance(found, dict):
        raise AuditBroken(f"{where}: it is no JSON object")
    return found


def _follows(folder: Path, head: Head, last: Head) -> bool:
    """Return whether `last` is the one line that a killed server had written and not noted."""
    if last.number != head.number + 1:
        return False
    previous = page(folder, last.number - 1, 1)[0]["previous"]
    return bool(previous == (head.hash if head.number else NOTHING_BEFORE))
