"""How a command ends that cannot do what it was told: one line, and an exit code that says whose fault it is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from loraplex.server.command.remote import RemoteError

REFUSED = 1
"""Exit code: the server refuses what it was asked to change."""

MISUSED = 2
"""Exit code: the command cannot be run as it was given."""


def warn(line: str) -> None:
    """Print one line on stderr."""
    print(f"loraplex: {' '.join(line.split())}", file=sys.stderr)


def give_up(reason: object) -> NoReturn:
    """End with one line."""
    warn(str(reason))
    sys.exit(MISUSED)


def end_refused(error: RemoteError) -> NoReturn:
    """End with the server's words: MISUSED where there is no server, no such name or no right to it, else REFUSED."""
    if error.status in (0, 401, 404):
        give_up(error)
    warn(str(error))
    sys.exit(REFUSED)
