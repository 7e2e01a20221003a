"""The state of a server in one SQLite file: what is written is there after a kill at any moment, or none of it is.

    STATE_DIR/state.db    a table for each kind of row (version_records.py, alias_records.py)
    STATE_DIR/lock        locked by the one server that works on the folder

A file that is damaged is put aside and the server starts without it. adapters.json, which older servers kept there, is
taken over once. Without a folder the same tables are in memory.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from loraplex.server.catalog.version_records import KeptAlias, KeptLabel, KeptName, KeptScore, KeptVersion

logger = logging.getLogger(__name__)

FILE, LOCK, OLD_FILE = "state.db", "lock", "adapters.json"

FORMAT = 1
"""SQLite's user_version. A file with a greater one was written by a later server."""


class StateNotKept(Exception):
    """A change that could not be written down, and was not made; `str(error)` is fit for the caller."""


class StateError(Exception):
    """The folder cannot be used; one line that says why."""


class KeptRow(Protocol):
    """A frozen dataclass of plain values."""

    KEY: ClassVar[tuple[str, ...]]
    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=KeptRow)

KINDS: tuple[type[KeptRow], ...] = (KeptName, KeptVersion, KeptLabel, KeptAlias, KeptScore)


class Transaction:
    """Collect what is to be written at once. StateStore.changing makes transactions."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def put(self, row: KeptRow) -> None:
        """Write `row`, in place of the one with its key."""
        names = [field.name for field in fields(row)]
        marks = ", ".join("?" * len(names))
        values = [getattr(row, name) for name in names]
        self._database.execute(f"INSERT OR REPLACE INTO {_table(type(row))} VALUES ({marks})", values)

    def drop(self, kind: type[KeptRow], *key: str) -> None:
        """Remove the row of this key; nothing where there is none."""
        where = " AND ".join(f"{name} = ?" for name in kind.KEY)
        self._database.execute(f"DELETE FROM {_table(kind)} WHERE {where}", key)


class StateStore:
    """Hold the state of one server. Any thread; one change after the other."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open the state in `folder`, which is made if need be; None: in memory.

        Raises StateError where nothing can be written in the folder, another server works on it, or a later one did.
        """
        self.folder = folder
        self._lock = threading.Lock()
        self._held: int | None = None
        if folder is None:
            self._database = _connect(":memory:")
            _prepare(self._database)
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._held = _hold(folder)
            self._database = _open(folder / FILE)
            self._take_over(folder / OLD_FILE)
        except (OSError, sqlite3.Error, StateNotKept) as error:
            self.close()
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise StateError(f"--state-dir {folder}: cannot be written: {reason}") from error
        except StateError:
            self.close()
            raise

    def close(self) -> None:
        """Let another server have the folder. Idempotent."""
        if hasattr(self, "_database"):
            self._database.close()
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def rows(self, kind: type[R]) -> list[R]:
        """Read all rows of a kind, by their keys. Raises StateError."""
        types = {field.name: str(field.type) for field in fields(kind)}
        try:
            with self._lock:
                found = self._database.execute(
                    f"SELECT {', '.join(types)} FROM {_table(kind)} ORDER BY 1, 2"
                ).fetchall()
        except sqlite3.Error as error:
            raise StateError(f"--state-dir {self.folder}: cannot be read: {error}") from error
        values = [{name: _as(types[name], value) for name, value in zip(types, row, strict=True)} for row in found]
        return [kind(**each) for each in values]

    @contextmanager
    def changing(self) -> Iterator[Transaction]:
        """Have all that the block writes on disk after it, or nothing where it raises. Raises StateNotKept."""
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield Transaction(self._database)
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                self._roll_back()
                logger.error("a change of the adapters is refused, --state-dir cannot be written: %s", error)
                raise StateNotKept(
                    f"the change is not made, as it could not be kept for a restart: the server's --state-dir cannot "
                    f"be written ({error}); try again once it can"
                ) from None
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):  # it is rolled back already where the disk was full
            self._database.execute("ROLLBACK")

    def touch(self) -> None:
        """Write something, to see whether it can be done. Raises StateNotKept."""
        with self.changing():
            self._database.execute("INSERT OR REPLACE INTO notes VALUES ('touched', ?)", (str(time.time()),))

    def _take_over(self, path: Path) -> None:
        """Make the names of the older file, if it is there, ours, once."""
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return
        try:
            known = _parse_old(text)
        except ValueError as error:
            aside = _aside(path)
            os.replace(path, aside)
            logger.warning("%s is damaged (%s): kept as %s; the server starts without it", path, error, aside)
            return
        with self.changing() as change:
            if not self._database.execute("SELECT 1 FROM notes WHERE name = 'taken over'").fetchall():
                self._database.execute("INSERT INTO notes VALUES ('taken over', ?)", (str(time.time()),))
                for row in known:
                    change.put(row)
        os.replace(path, path.with_name(f"{path.name}.taken-over"))
        logger.info("%s: its %d adapters are in %s from now on", path, len(known), FILE)


def _table(kind: type[KeptRow]) -> str:
    return kind.__name__


def _connect(place: str) -> sqlite3.Connection:
    return sqlite3.connect(place, isolation_level=None, check_same_thread=False, timeout=5.0)


def _open(path: Path) -> sqlite3.Connection:
    """Open the database. Raises OSError, sqlite3.Error, StateError."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # for the owner alone: a source may hold a login
    database = _connect(str(path))
    try:
        [(found,)] = database.execute("PRAGMA quick_check(1)").fetchall()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        _check_format(database, path)
        _prepare(database)
    except sqlite3.OperationalError:  # it cannot be read or written, which says nothing of what is in it
        database.close()
        raise
    except sqlite3.DatabaseError as error:
        database.close()
        aside = _aside(path)
        os.replace(path, aside)
        logger.warning("%s is damaged (%s): kept as %s; the server starts without it", path, error, aside)
        return _open(path)
    return database


def _check_format(database: sqlite3.Connection, path: Path) -> None:
    [(found,)] = database.execute("PRAGMA user_version").fetchall()
    if found > FORMAT:
        database.close()
        raise StateError(f"{path}: written by a later server (format {found}, expected at most {FORMAT}); use that one")


def _prepare(database: sqlite3.Connection) -> None:
    """Have the tables. A rollback journal, not a log beside it: a folder that is moved away is noticed."""
    database.execute("PRAGMA journal_mode = DELETE")
    database.execute("PRAGMA synchronous = EXTRA")  # the journal's end is on disk, too, when a change is answered
    database.execute("CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
    for kind in KINDS:
        columns = ", ".join(f"{field.name} {_COLUMNS[str(field.type)]}" for field in fields(kind))
        keys = ", ".join(kind.KEY)
        database.execute(f"CREATE TABLE IF NOT EXISTS {_table(kind)} ({columns}, PRIMARY KEY ({keys}))")
    database.execute(f"PRAGMA user_version = {FORMAT}")


_COLUMNS = {
    "str": "TEXT NOT NULL",
    "bool": "INTEGER NOT NULL",
    "int": "INTEGER NOT NULL",
    "float": "REAL NOT NULL",
    "float | None": "REAL",
}


def _as(type_name: str, value: Any) -> Any:
    return bool(value) if type_name == "bool" else value


def _hold(folder: Path) -> int:
    """Lock the folder for this server. Raises OSError, StateError."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(handle)
        raise StateError(
            f"--state-dir {folder}: another server (process {holder}) works on it; stop that one, or give this one a "
            "folder of its own"
        ) from None
    except OSError:
        os.close(handle)
        raise
    with suppress(OSError):  # a full disk: only the number is missing then
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged-{time.time_ns()}")


def _parse_old(text: bytes) -> list[KeptName]:
    """Parse the state of earlier releases, a JSON file. Raises ValueError."""
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("version") != 1 or not isinstance(found.get("adapters"), list):
        raise ValueError("expected an object of version 1 with a list of adapters")
    known = []
    for entry in found["adapters"]:
        match entry:
            case {"name": str(name), "source": str(source), "ambient": bool(ambient)}:
                known.append(KeptName(name, source, ambient, entry.get("pinned") is True))
            case _:
                raise ValueError("an entry without name, source or ambient")
    return known
