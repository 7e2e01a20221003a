"""The audit log: a line for each change of what names stand for, each chained to the one before. Free of torch.

    STATE_DIR/audit/000000000001.jsonl      named by the first line's number; the next file goes on where one is full
    STATE_DIR/audit/head.json               number and hash of the last line

A line is JSON with sorted keys. `previous` is the hash of the line before, 64 zeros for the first, and a line's own
hash is the sha256 of all its bytes but the line's end. A line is on disk before its change is made; where the machine
stops in between, there is a line of a change that was not made, never a change without a line. Names, digests, keys'
names and tenants are in it, and neither keys nor prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraplex.server.catalog.state_store import StateError, StateNotKept
from loraplex.server.catalog.version_records import StateChange
from loraplex.server.whole_file import flush, replace_file

logger = logging.getLogger(__name__)

FOLDER, HEAD = "audit", "head.json"

NOTHING_BEFORE = "0" * 64

FILE_BYTES = 64 << 20
"""Of a file, after which the next is begun: some 100,000 lines."""

MAX_LINE = 1 << 20
"""Bytes of a line; a receipt's card is the longest part, and bounded."""


@dataclass(frozen=True)
class AuditEvent:
    """One change, as the log has it."""

    what: str  # a StateChange's, or "receipt": a version was measured
    name: str
    when: float  # seconds since 1970
    key: str = ""  # the key's name, never the key
    tenant: str = ""
    before: str = ""  # what the name stood for
    after: str = ""
    receipt: str = ""  # digest of the receipt of `after`, where that is made
    card: dict[str, Any] = field(default_factory=dict)  # of `after`, as its README.md says


@dataclass(frozen=True)
class Head:
    """The last line."""

    number: int = 0
    hash: str = NOTHING_BEFORE


def event_of(change: StateChange) -> AuditEvent:
    """Make the event of a change; its receipt is told by digest."""
    receipt = hashlib.sha256(change.receipt.encode()).hexdigest() if change.receipt else ""
    who = change.who
    return AuditEvent(change.what, change.name, change.when, who.key, who.tenant, change.before, change.after, receipt)


def line_of(number: int, previous: str, event: AuditEvent) -> bytes:
    """Write a line, without its end."""
    fields = {"number": number, "previous": previous, **asdict(event)}
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def hash_of(line: bytes) -> str:
    """Compute a line's hash."""
    return hashlib.sha256(line).hexdigest()


class AuditLog:
    """Appends. Any thread, one after the other."""

    def __init__(self, state_dir: Path, file_bytes: int = FILE_BYTES) -> None:
        """Go on with the log below `state_dir`, which is begun if need be.

        What was being written when the server was killed is taken off: nobody was told that it is there. Raises
        StateError where the log cannot be written, or its end is not what was written last.
        """
        self.folder = state_dir / FOLDER
        self._file_bytes = file_bytes
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._head = _recover(self.folder)
        except OSError as error:
            raise StateError(f"{self.folder}: cannot be written: {error.strerror}") from error

    @property
    def head(self) -> Head:
        """Number and hash of the last line: whoever keeps it elsewhere sees whether lines were taken off."""
        return self._head

    def append(self, event: AuditEvent) -> Head:
        """Have a line on disk. Raises StateNotKept, and there is none."""
        with self._lock:
            number = self._head.number + 1
            line = line_of(number, self._head.hash, event)
            head = Head(number, hash_of(line))
            path = self._file(number)
            size = path.stat().st_size if path.exists() else 0
            try:
                _append(path, line + b"\n")
                _write_head(self.folder, head)
            except OSError as error:
                with suppress(OSError):
                    os.truncate(path, size)
                    _write_head(self.folder, self._head)
                logger.error("a change of the adapters is refused, the audit log cannot be written: %s", error)
                raise StateNotKept(
                    f"the change is not made, as it could not be written into the audit log ({error.strerror}); try "
                    "again once it can"
                ) from None
            self._head = head
            return head

    def _file(self, number: int) -> Path:
        """Return the file that line `number` goes to."""
        found = files_of(self.folder)
        if found and found[-1].stat().st_size < self._file_bytes:
            return found[-1]
        return self.folder / f"{number:012d}.jsonl"


def files_of(folder: Path) -> list[Path]:
    """List a log's files in the order of their lines."""
    return sorted(path for path in folder.glob("*.jsonl") if path.stem.isdecimal())


def read_head(folder: Path) -> Head | None:
    """Read what was written last; None: it is not there, or damaged."""
    try:
        found = json.loads((folder / HEAD).read_bytes())
        return Head(int(found["number"]), str(found["hash"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _append(path: Path, data: bytes) -> None:
    is_new = not path.exists()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    if is_new:
        flush(path.parent)


def _write_head(folder: Path, head: Head) -> None:
    replace_file(folder / HEAD, json.dumps(asdict(head)))


def _recover(folder: Path) -> Head:
    """Find the last line. Raises OSError, StateError."""
    files, head = files_of(folder), read_head(folder)
    if not files and head is None:
        return Head()
    known = head or Head()
    data = files[-1].read_bytes() if files else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        logger.warning("%s: a line that was not written to its end is taken off", files[-1])
        os.truncate(files[-1], whole)
        if whole == 0:
            files[-1].unlink()
            return _recover(folder)
    lines = data[:whole].splitlines()
    last = Head(_number(lines[-1]), hash_of(lines[-1])) if lines else Head()
    follows = last.number == known.number + 1 and _previous(lines[-1]) == known.hash if lines else False
    if last != known and not follows:
        raise StateError(
            f"{folder}: the audit log ends with line {last.number}, and line {known.number} was written last; see "
            "`loraplex audit verify`, and put the folder aside to begin a new log"
        )
    if last != known:
        _write_head(folder, last)  # the server was killed in between
    return last


def _number(line: bytes) -> int:
    try:
        return int(json.loads(line)["number"])
    except (ValueError, KeyError, TypeError):
        return -1


def _previous(line: bytes) -> str:
    try:
        return str(json.loads(line)["previous"])
    except (ValueError, KeyError, TypeError):
        return ""
