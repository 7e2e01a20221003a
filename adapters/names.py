"""What an adapter may be called."""

from __future__ import annotations

import re

from loraplex.adapters.errors import InvalidAdapterName

MAX_NAME = 200
"""Characters. Names travel in URLs, metric labels and logs."""

_NAME = re.compile(r"(?:[A-Za-z0-9._-]+/)?[A-Za-z0-9._-]+")


def check_name(name: str) -> None:
    """Raise InvalidAdapterName unless `name` is letters, digits, `.`, `_`, `-`, after at most one `tenant/`."""
    usable = len(name) <= MAX_NAME and _NAME.fullmatch(name) is not None
    if not usable or any(part.strip(".") == "" for part in name.split("/")):  # "." and ".." are no names
        shown = name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."
        raise InvalidAdapterName(
            f"adapter name {shown!r} cannot be used: expected letters, digits, '.', '_' and '-', optionally after one "
            f"'tenant/' prefix, at most {MAX_NAME} characters"
        )
