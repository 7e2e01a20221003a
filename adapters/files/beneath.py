"""Local folders held open, and what is in them reached without a link that leads out of where it may lie. No torch.

A name that was checked may be another thing by the time it is opened, so nothing is checked by name: whoever reads a
local adapter opens its folder here, and its files through that. How far links may lead is part of an adapter's source:

    /srv/sql                    wherever links lead: the operator's own word
    /adapters/./sql             nowhere out of /adapters, which itself is taken as it is written
    /adapters/./sql/./last      nowhere out of /adapters/sql, in whose own path below /adapters there is no link

(rsync marks the part of a path that counts in the same way.) The kernel looks after it in one call, openat2 with
RESOLVE_BENEATH; where there is no such call, or a link is absolute, the path is walked part by part with O_NOFOLLOW.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from itertools import islice
from pathlib import Path

MARK = "/./"
"""Before what must stay below what is in front of it."""

MAX_LINKS = 40
"""In one path, as in Linux."""

LINKED_OUT = (
    "a link leads out of the folder that adapters may be in, or in circles, and is not followed: put the files there "
    "themselves"
)

MAX_NAMES = 1000
"""Of a folder are looked at, to say what is in it."""

_PATH_ONLY = getattr(os, "O_PATH", os.O_RDONLY)
_FOLDER = _PATH_ONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # a FIFO has nobody wait

_OPENAT2 = 437  # of Linux 5.6, on every kind of machine
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x02, 0x04, 0x08
_ATTEMPTS = 4
"""Of a call that the kernel breaks off because something below was renamed meanwhile."""


class _How(ctypes.Structure):
    """struct open_how."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def below(root: object, *inner: object) -> str:
    """Make the source of what is at `inner` below `root` and must stay there, each of `inner` below the one before."""
    return MARK.join(str(part) for part in (root, *inner))


def roots_of(source: str) -> tuple[Path, ...]:
    """List the folders that a local adapter's source must not be led out of, from the outermost on; () for none."""
    parts = source.split(MARK)
    return () if "://" in source else tuple(Path(MARK.join(parts[:n])).expanduser() for n in range(1, len(parts)))


def shown(source: str) -> str:
    """Return `source` as its caller wrote it."""
    return source if "://" in source else source.replace(MARK, "/")


class Folder:
    """An open folder. What is asked of it raises OSError, with EXDEV where a link leads out."""

    def __init__(self, handle: int, roots: tuple[Path, ...] = (), inner: str = ".") -> None:
        """handle: of the last of `roots`, below which the folder is at `inner`; of the folder itself without any."""
        self._handle = handle
        self._roots = roots
        self._inner = inner

    def link(self, name: str) -> os.stat_result:
        """Return the stat of what stands at `name` right here, be it a link."""
        return os.stat(f"{self._inner}/{name}", dir_fd=self._handle, follow_symlinks=False)

    def stat(self, name: str) -> os.stat_result:
        """Return the stat of the file that `name` leads to."""
        if not self._roots:
            return os.stat(name, dir_fd=self._handle)
        handle = self._hold(name, _PATH_ONLY | os.O_CLOEXEC)
        try:
            return os.fstat(handle)
        finally:
            os.close(handle)

    def has(self, name: str) -> bool:
        """Return whether `name` leads to a regular file."""
        with suppress(OSError):
            return stat.S_ISREG(self.stat(name).st_mode)
        return False

    def check(self) -> None:
        """Raise unless there is such a folder."""
        os.close(self._hold(".", _FOLDER))

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[int, os.stat_result]]:
        """Open the regular file that `name` leads to, for reading. Raises FileNotFoundError for what is none.

        With as few calls as can be: each lets go of the GIL, and may wait for it beside an engine at work.
        """
        if not self._roots and not self.has(name):  # it may be a device, and to open one may do something
            raise FileNotFoundError(errno.ENOENT, "it is no file")
        handle = self._hold(name, _FILE)
        try:
            info = os.fstat(handle)
            if not stat.S_ISREG(info.st_mode):
                raise FileNotFoundError(errno.ENOENT, "it is no file")
            yield handle, info
        finally:
            os.close(handle)

    def names(self, inner: str = ".") -> list[str]:
        """List what is in the folder, or in `inner` of it, sorted: all, unless there are more than MAX_NAMES."""
        handle = self._hold(inner, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.scandir(handle) as entries:
                return sorted(entry.name for entry in islice(entries, MAX_NAMES))
        finally:
            os.close(handle)

    def _hold(self, name: str, flags: int) -> int:
        if self._roots:
            return open_below(self._handle, f"{self._inner}/{name}", flags, self._roots[-1])
        return os.open(name, flags, dir_fd=self._handle)


@contextmanager
def opened(folder: Path, roots: Sequence[Path] = ()) -> Iterator[Folder]:
    """Open `folder`, which must not be led out of the last of `roots` (see roots_of), below which it may be missing.

    Raises OSError.
    """
    with ExitStack() as held:

        def hold(handle: int) -> int:
            held.callback(os.close, handle)
            return handle

        outer, *further = roots or (folder,)
        handle = hold(os.open(outer, _FOLDER))
        for inner in further:
            handle = hold(open_below(handle, str(inner.relative_to(outer)), _FOLDER, None))
            outer = inner
        if not roots:
            yield Folder(handle)
            return
        yield Folder(handle, tuple(roots), str(folder.relative_to(outer)))


def open_below(root: int, path: str, flags: int, named: Path | None) -> int:
    """Open `path` below the open folder `root`; `named`: how absolute links call that. None: no link at all.

    Raises OSError: EXDEV where it leads out of `root`, ELOOP for a link where there may be none.
    """
    if _has_openat2():
        resolve = _BENEATH | _NO_MAGICLINKS | (_NO_SYMLINKS if named is None else 0)
        for _ in range(_ATTEMPTS):
            try:
                return _openat2(root, path, flags, resolve)
            except OSError as error:
                if error.errno == errno.EXDEV and named is not None:
                    break  # an absolute link may lead to what is below all the same
                if error.errno != errno.EAGAIN:
                    raise
    return walk_below(root, path, flags, named)


def walk_below(root: int, path: str, flags: int, named: Path | None) -> int:
    """Open `path` as open_below() does, part by part."""
    stack = [root]  # the folders walked through
    left = path.split("/")[::-1]
    links = 0
    try:
        while left:
            name = left.pop()
            if name in ("", "."):
                continue
            if name == "..":
                if len(stack) == 1:
                    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
                os.close(stack.pop())
                continue
            target = _link(name, stack[-1])
            if target is not None:
                links += 1
                if links > MAX_LINKS or named is None:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                if target.startswith("/"):
                    target = _inside(target, named)
                    while len(stack) > 1:
                        os.close(stack.pop())
                left += target.split("/")[::-1]
            elif any(part not in ("", ".") for part in left):
                stack.append(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=stack[-1]))
            else:
                return os.open(name, flags | os.O_NOFOLLOW, dir_fd=stack[-1])
        return os.open(".", flags, dir_fd=stack[-1])
    finally:
        for handle in stack[1:]:
            os.close(handle)


def _link(name: str, folder: int) -> str | None:
    """Read where the link `name` leads; None for what is none."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _inside(target: str, root: Path) -> str:
    """Return an absolute link's target as a path below `root`. Raises OSError (EXDEV)."""
    for name in (os.path.abspath(root), os.path.realpath(root)):
        with suppress(ValueError):
            return str(Path(target).relative_to(name))
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@cache
def _syscall() -> Callable[..., int]:
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    call.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_How), ctypes.c_size_t)
    return call


def _openat2(folder: int, path: str, flags: int, resolve: int) -> int:
    handle = _syscall()(_OPENAT2, folder, os.fsencode(path), _How(flags, 0, resolve), ctypes.sizeof(_How))
    if handle < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return handle


@cache
def _has_openat2() -> bool:
    """Return whether there is openat2: old kernels, other systems and some sandboxes have none."""
    if os.uname().sysname != "Linux":
        return False
    try:
        with opened(Path("/")) as root:
            os.close(_openat2(root._handle, ".", _FOLDER, _BENEATH))
    except OSError:
        return False
    return True
