"""What a server knows of names and versions, as rows of its state (state_store.py), and what it tells of a change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

What = Literal["load", "push", "unload", "pin", "label", "alias", "promote", "rollback", "expire", "score"]
"""What may happen to a name."""


@dataclass(frozen=True)
class Who:
    """Name whoever asked for a change: a key's name and its tenant, both "" for the server itself and without keys."""

    key: str = ""
    tenant: str = ""


@dataclass(frozen=True)
class KeptName:
    """Say where the adapter of a name came from: a row of what was loaded over the API."""

    KEY: ClassVar[tuple[str, ...]] = ("name",)

    name: str
    source: str  # as the caller gave it, or where its copy is
    ambient: bool = True  # see SourceAccess; a caller's own token is not kept
    pinned: bool = False
    retain: int = 0  # versions before the one it has that can still be asked for
    keep_alive: float | None = None  # seconds without a request after which it is taken away; None: never


@dataclass(frozen=True)
class KeptVersion:
    """Describe one content that a name has or had, the later ones with the greater `number`."""

    KEY: ClassVar[tuple[str, ...]] = ("name", "digest")

    name: str
    digest: str  # 64 hex digits
    number: int
    source: str  # where it came from, as listings show it
    made: float  # seconds since 1970
    key: str = ""  # who brought it
    tenant: str = ""
    copy: str = ""  # the folder with its own copy of the files; "": there is none
    nbytes: int = 0  # of the copy
    expires: float | None = None  # seconds since 1970; None: never
    gone: str = ""  # why it cannot be asked for any more; "": it can
    receipt: str = ""  # JSON


@dataclass(frozen=True)
class KeptLabel:
    """Name one version of an adapter: `name@label`."""

    KEY: ClassVar[tuple[str, ...]] = ("name", "label")

    name: str
    label: str
    digest: str


@dataclass(frozen=True)
class KeptAlias:
    """Say what an alias stands for (aliases.py)."""

    KEY: ClassVar[tuple[str, ...]] = ("name",)

    name: str
    revision: int
    state: str  # JSON
    previous: str  # JSON; "": it was never changed
    changed: float  # seconds since 1970


@dataclass(frozen=True)
class KeptScore:
    """Say what one version of an adapter scored on one golden set (scores.py)."""

    KEY: ClassVar[tuple[str, ...]] = ("name", "digest", "golden")

    name: str
    digest: str
    golden: str  # sha256 of the set
    score: float  # 0 to 1
    made: float  # seconds since 1970


@dataclass(frozen=True)
class StateChange:
    """Tell of one change, once it is sure to be made."""

    who: Who
    when: float  # seconds since 1970
    what: What
    name: str
    before: str = ""  # a digest, or what an alias stood for; "": nothing
    after: str = ""
    receipt: str = ""  # of the version that `after` names, as JSON
