"""What can go wrong with an adapter. Raised where it is known; server/api/errors.py maps each to HTTP, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_MESSAGE = 800
"""Characters of a refusal."""


class AdapterError(Exception):
    """Base of all adapter errors; `str(error)` is fit for the caller: what was found, what was expected, what to do."""


class AdapterNotFound(AdapterError):
    """No adapter of that name is registered, or its folder does not exist."""


class AdapterUnavailable(AdapterError):
    """Its source cannot be reached at present, is too slow, or broke off: trying again later may help."""


class VersionGone(AdapterError):
    """A version of an adapter was here and is no more: it expired, or newer ones took its place."""


class VersionUnclear(AdapterError):
    """What follows the @ stands for no version, or for several."""


class VersionMoved(AdapterError):
    """The name does not point at the version that the caller expected: somebody else was first."""

    def __init__(self, message: str, present: str | None) -> None:
        super().__init__(message)
        self.present = present  # the digest; None: there is no such name


class AdapterExists(AdapterError):
    """The name is taken."""


class InvalidAdapterName(AdapterError):
    """The name cannot be used for an adapter, whatever its files hold."""


class AdapterRefused(AdapterError):
    """The adapter was found but cannot be served: damaged, for another base, of an unsupported kind, or without effect.

    `code` is a stable machine-readable reason: "missing_file", "bad_config", "bad_file", "unsupported_kind",
    "unsupported_option", "unmatched_tensor", "missing_tensor", "shape_mismatch", "not_finite", "no_effect",
    "too_large", "needs_setting" (the config leaves open what its library is told at each call), "changed" (the files
    are other ones than when the request came in), "forbidden" (a path or an address that callers may not reach),
    "missing_extra" (a library is not installed).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def about_folder(folder: Path) -> Iterator[None]:
    """Have refusals say which folder they are about, in one line, whatever a stranger's file puts into names."""
    try:
        yield
    except AdapterRefused as error:
        message = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
        raise AdapterRefused(error.code, f"{folder}: {message[:MAX_MESSAGE]}") from error
    except OSError as error:
        raise AdapterRefused("missing_file", f"{folder} cannot be read: {error.strerror}") from error


def without_frames(error: BaseException) -> BaseException:
    """Strip `error` of the frames it came through: they hold secrets and files' bytes, and it may be kept for long."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
