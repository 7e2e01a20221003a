"""A version's receipt: what its files are, how much they change this base, and how exactly they are computed with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from loraplex.adapters.receipt import Measured, SiteEffect

WORSE = 4.0
"""Times as far from the plain reference as the base that an adapter's answers may be: both sum in the same dtype."""

CLOSE = 1e-2
"""Log-probability within which no answer is doubted."""

_REPEATS = ("they repeat others, as ", " does")
"""Around one of them."""

_SIGNIFICANT = 6
"""Digits of the numbers that are told."""


@dataclass(frozen=True)
class BaseIdentity:
    """Which base it was that an adapter was checked against."""

    names: tuple[str, ...]  # what requests call it, and where it was loaded from
    digest: str  # models/base_digest.py
    formats: str  # of its weights in memory, as "nf4, inputs exact, bfloat16"

    def is_named(self, named: str | None) -> bool | None:
        """Return whether `named` is this base, as far as names tell; None: nothing is named.

        The last part counts, whoever publishes it, and a folder of the Hub's cache by the repository it is of.
        """
        if not named:
            return None
        return _last(named) in {part for name in self.names for part in _parts(name)}


@dataclass(frozen=True)
class Probe:
    """Largest differences in log-probability between fused answers and the plain reference, on fixed token ids."""

    tokens: int  # compared, of prompt and answer, of the base and of the adapter each
    base: float
    adapter: float
    own_tokens: int = 0  # of the adapter's: those whose rows of embedding or head are its own, or changed by it


@dataclass(frozen=True)
class Receipt:
    """What is known of one content once it was measured and probed."""

    measured: Measured
    base: BaseIdentity
    probe: Probe | None
    probe_error: str | None = None  # why there is none
    seconds: float = 0.0  # that it took to make

    @property
    def remark(self) -> str:
        """Say what a reader should look at first; "": nothing."""
        found, named = self.measured, self.measured.base_named
        remarks = []
        if found.is_noop:
            remarks.append("it changes nothing and answers as the base does")
        elif found.own:
            what = "tensors or modules change rows of the base's norms, embedding or head"
            remarks.append(f"{found.own} of its {what}, which is probed and whose norm is not measured")
        elif found.idle:
            remarks.append(f"{found.idle} of its {found.modules} modules come to nothing")
        if self.base.is_named(named) is False:
            remarks.append(f"its config names the base {str(named)[:200]!r}, and this one is {self.base.names[0]!r}")
        return "; ".join(remarks)

    @property
    def doubt(self) -> str | None:
        """Say why answers of the adapter cannot be relied on; None: they can."""
        if self.probe is None:
            return f"it was not probed: {self.probe_error}"
        most = WORSE * max(self.probe.base, CLOSE)
        if not self.probe.adapter <= most:  # NaN too
            return (
                f"its answers differ from the plain reference by {self.probe.adapter:.3g} in log-probability and the "
                f"base's by {self.probe.base:.3g}; at most {most:.3g} was expected"
            )
        return None

    def as_json(self) -> dict[str, Any]:
        """Make the object that is shown, kept and digested."""
        found = self.measured
        return {
            "adapter": {
                "digest": found.digest,
                "kind": found.kind,
                "rank": found.rank,
                "modules": found.modules,
                "idle_modules": found.idle,
                "noop": found.is_noop,
            },
            "tensors": {
                "matched": found.tensors,
                "ignored": len(found.ignored),
                "why_ignored": f"{_REPEATS[0]}{found.ignored[0]}{_REPEATS[1]}" if found.ignored else None,
                "unmatched": 0,
                "own_rows": found.own,
            },
            "dtype": {"file": list(found.dtypes), "packed": found.dtype, "rounding": _short(found.rounding)},
            "effect": {
                "relative": _short(found.relative),
                "bias": _short(found.bias),
                "sites": [
                    {
                        "projections": list(site.projections),
                        "modules": site.modules,
                        "relative": _short(site.relative),
                        "largest": _short(site.largest),
                        "layer": site.layer,
                        "rounding": _short(site.rounding),
                    }
                    for site in found.sites
                ],
            },
            "base": {
                "digest": self.base.digest,
                "formats": self.base.formats,
                "named": found.base_named,
                "is_named": self.base.is_named(found.base_named),
            },
            "probe": {
                "tokens": self.probe.tokens if self.probe else 0,
                "base": _short(self.probe.base) if self.probe else None,
                "adapter": _short(self.probe.adapter) if self.probe else None,
                "own_tokens": self.probe.own_tokens if self.probe else 0,
                "error": self.probe_error,
            },
            "card": dict(found.card),
            "remark": self.remark or None,
        }

    @classmethod
    def read(cls, text: str, base: BaseIdentity) -> Receipt | None:
        """Read what `text` has written; None: it is of another base than `base`, or not as this server writes it."""
        try:
            receipt = cls._of(json.loads(text), base)
        except (KeyError, TypeError, ValueError, IndexError):
            return None
        return receipt if receipt.text == text else None

    @classmethod
    def _of(cls, found: Any, base: BaseIdentity) -> Receipt:
        adapter, tensors, dtype, effect, probe = (
            found[part] for part in ("adapter", "tensors", "dtype", "effect", "probe")
        )
        sites = tuple(
            SiteEffect(
                tuple(site["projections"]),
                *(site[name] for name in ("modules", "relative", "largest", "layer", "rounding")),
            )
            for site in effect["sites"]
        )
        why = str(tensors["why_ignored"] or "").removeprefix(_REPEATS[0]).removesuffix(_REPEATS[1])
        measured = Measured(
            digest=adapter["digest"],
            kind=adapter["kind"],
            rank=adapter["rank"],
            tensors=tensors["matched"],
            ignored=(why,) * tensors["ignored"],
            dtypes=tuple(dtype["file"]),
            dtype=dtype["packed"],
            modules=adapter["modules"],
            idle=adapter["idle_modules"],
            sites=sites,
            relative=effect["relative"],
            rounding=dtype["rounding"],
            bias=effect["bias"],
            own=tensors["own_rows"],
            base_named=found["base"]["named"],
            card=found["card"],
        )
        numbers = (probe[name] for name in ("tokens", "base", "adapter", "own_tokens"))
        made = Probe(*numbers) if probe["error"] is None else None
        return cls(measured, base, made, probe["error"])

    @property
    def text(self) -> str:
        """Write as_json() with sorted keys and without spaces."""
        return json.dumps(self.as_json(), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """Compute the sha256, in hex, of `text`."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def _short(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT}g}")


def _last(name: str) -> str:
    return PurePosixPath(name.rstrip("/")).name.casefold()


def _parts(name: str) -> Iterable[str]:
    """List what `name`, a path or a repository, may be called by."""
    yield _last(name)
    yield _last(name).removesuffix(".gguf")
    for part in PurePosixPath(name).parts:
        if found := re.fullmatch(r"models--(?:.+--)?(.+?)", part):
            yield found[1].casefold()
