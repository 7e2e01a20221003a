"""Keep adapters that came over the network on disk, a folder each, while a version is made of them.

    <root>/<id>/adapter_config.json, adapter_model.safetensors

An adapter is written as it comes, some bytes at a time, and is complete once finish() has returned: its folder is a
source like any other then. What has not come to its end is removed. Without its config in a file of its own, the
config is read out of the weights' own header, under CONFIG_KEY of its `__metadata__`. Free of torch.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from loraplex.adapters.errors import AdapterError, AdapterRefused
from loraplex.adapters.files.beneath import below
from loraplex.adapters.files.bounded_json import parse_json
from loraplex.adapters.sources.process_folder import PUSHED, ProcessFolder, remove_stale
from loraplex.adapters.sources.remote import CONFIG_FILE, FILES, WEIGHTS_FILE

CONFIG_KEY = "adapter_config"
"""Of a safetensors file's `__metadata__`: adapter_config.json as a string."""

MAX_HEADER, MAX_HEADER_VALUES = 8 << 20, 1 << 20
"""Of a header that a config is looked for in; the reader's bounds, which hold for what is served, are narrower."""


class NoRoom(AdapterError):
    """There is no room on disk for what comes."""


class Spool:
    """The folder of what came. Any thread may call any method."""

    def __init__(self, parent: Path, most: int, *, keep: bool = False) -> None:
        """Use a folder below `parent` and at most `most` bytes, what is still coming included.

        keep: the folder is `parent` itself and stays when the process ends (keep_only() says what of it); otherwise it
        is the process's own. No folder is made before the first adapter comes.
        """
        self._parent = parent.absolute()
        self._most = most
        self._keep = keep
        self._own: ProcessFolder | None = None
        self._lock = threading.Lock()
        self._used = 0
        self._sizes: dict[str, int] = {}  # of complete ones, by the folder's name
        if not keep:
            remove_stale(PUSHED, parent)

    @property
    def used_bytes(self) -> int:
        """Bytes of all there is, complete or coming."""
        with self._lock:
            return self._used

    def owns(self, source: str) -> bool:
        """Return whether `source` is one of the spool's own folders."""
        return self.size_of(source) > 0

    def size_of(self, source: str) -> int:
        """Return the bytes of the folder that `source` names; 0 where it is none of the spool's."""
        with self._lock:
            return self._sizes.get(Path(source).name, 0) if Path(source).parent == self._root() else 0

    def begin(self) -> SpooledAdapter:
        """Make the folder of one adapter that begins to come. Raises NoRoom."""
        try:
            with self._lock:
                if self._own is None and not self._keep:
                    self._parent.mkdir(parents=True, exist_ok=True)
                    self._own = ProcessFolder(PUSHED, self._parent)
                folder = self._root() / secrets.token_hex(12)
            folder.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise _no_room(self._parent, error) from None
        return SpooledAdapter(self, folder)

    def remove(self, source: str) -> None:
        """Delete the folder that `source` names, if it is one of the spool's. What reads it now has it open."""
        size = self.size_of(source)
        if size:
            with self._lock:
                self._used -= self._sizes.pop(Path(source).name, 0)
            shutil.rmtree(source, ignore_errors=True)

    def keep_only(self, sources: Collection[str]) -> None:
        """Take over what an earlier process has left of `sources`, and delete the rest. Before anything comes."""
        if not self._keep or not self._parent.is_dir():
            return
        wanted = {Path(source).name for source in sources if Path(source).parent == self._root()}
        for folder in self._parent.iterdir():
            if folder.name in wanted and all((folder / name).is_file() for name in FILES):
                self.grow(self._complete(folder.name, folder_bytes(folder)))
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def grow(self, size: int) -> None:
        """Count so many bytes more. Raises NoRoom."""
        with self._lock:
            if self._used + size > self._most:
                raise NoRoom(
                    f"adapters that were pushed take {self._used} bytes of the {self._most} they may (--pushed-bytes), "
                    "and this one would take more: unload some, or give them a shorter ttl"
                )
            self._used += size

    def shrink(self, size: int) -> None:
        """Undo grow()."""
        with self._lock:
            self._used -= size

    def close(self) -> None:
        """Let go of the process's own folder."""
        with self._lock:
            self._own = None

    def _complete(self, name: str, size: int) -> int:
        with self._lock:
            self._sizes[name] = size
        return size

    def _root(self) -> Path:
        return self._own.path if self._own is not None else self._parent


class SpooledAdapter:
    """One adapter on its way. `with` removes it unless it came to its end; any thread may do so."""

    def __init__(self, spool: Spool, folder: Path) -> None:
        self._spool = spool
        self._folder = folder
        self._open: dict[str, int] = {}
        self._size = 0
        self._done = False
        self._lock = threading.RLock()

    def __enter__(self) -> SpooledAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return self._folder

    @property
    def size(self) -> int:
        """Bytes that came."""
        return self._size

    def write(self, name: str, data: bytes) -> None:
        """Add to one of FILES. Raises NoRoom."""
        with self._lock:
            if data and not self._done:  # else nobody wants it any more
                self._write(name, data)

    def _write(self, name: str, data: bytes) -> None:
        self._spool.grow(len(data))
        self._size += len(data)
        try:
            handle = self._open.get(name)
            if handle is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                handle = self._open[name] = os.open(self._folder / name, flags, 0o600)
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
        except OSError as error:
            raise _no_room(self._folder, error) from None

    def finish(self) -> str:
        """Return the source of what came whole. Raises AdapterRefused, NoRoom; nothing is left then."""
        with self._lock:
            return self._finish()

    def _finish(self) -> str:
        try:
            if WEIGHTS_FILE not in self._open:
                raise AdapterRefused("missing_file", f"no {WEIGHTS_FILE} came")
            if CONFIG_FILE not in self._open:
                self.write(CONFIG_FILE, _config_inside(self._folder / WEIGHTS_FILE))
            self._close()
        except BaseException:
            self.discard()
            raise
        self._spool._complete(self._folder.name, self._size)
        self._done = True
        return below(self._folder.parent, self._folder.name)

    def discard(self) -> None:
        """Remove all of it, unless it came to its end. Idempotent."""
        with self._lock:
            self._close()
            if not self._done:
                self._done = True
                shutil.rmtree(self._folder, ignore_errors=True)
                self._spool.shrink(self._size)

    def _close(self) -> None:
        for handle in self._open.values():
            with suppress(OSError):
                os.close(handle)
        self._open = {}


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the files right in `folder`."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _config_inside(weights: Path) -> bytes:
    """Read the config out of the header. Raises AdapterRefused("bad_file"; "missing_file" where there is none)."""
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, max(0, weights.stat().st_size - 8)):
            raise AdapterRefused(
                "bad_file",
                f"{WEIGHTS_FILE} is damaged or cut short: it has {weights.stat().st_size} bytes, and does not begin "
                "with the length of a header that fits",
            )
        header = file.read(length)
    try:
        found = parse_json(header, MAX_HEADER, MAX_HEADER_VALUES)
    except ValueError as error:
        raise AdapterRefused("bad_file", f"{WEIGHTS_FILE} is damaged or cut short: its header: {error}") from None
    metadata = found.get("__metadata__") if isinstance(found, dict) else None
    config = metadata.get(CONFIG_KEY) if isinstance(metadata, dict) else None
    if not isinstance(config, str):
        raise AdapterRefused(
            "missing_file",
            f"there is no {CONFIG_FILE}: send it as the part 'config' of a multipart body, or as text under "
            f"'{CONFIG_KEY}' of the safetensors file's __metadata__",
        )
    return config.encode("utf-8", "surrogatepass")


def _no_room(where: Path, error: OSError) -> NoRoom:
    return NoRoom(f"what comes cannot be written below {where.parent}: {error.strerror or type(error).__name__}")
