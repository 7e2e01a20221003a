"""The version of this installation."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Return the installed distribution's version; "unknown" when run from files that were never installed."""
    try:
        return metadata.version("loraplex")
    except metadata.PackageNotFoundError:
        return "unknown"
