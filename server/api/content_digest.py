"""The Content-Digest of a request (RFC 9530), computed while its content comes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re

from loraplex.server.api.errors import ApiError

ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512"}
"""RFC 9530's active ones -> hashlib's."""

_MEMBER = re.compile(r"([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/=]*):")
"""Of a structured field's dictionary (RFC 9651): a key and a byte sequence."""


class ContentDigest:
    """The digests that a header promises. One thread at a time."""

    def __init__(self, header: str) -> None:
        """header: the field's value; "" for none. Raises ApiError (400) where nothing in it can be verified."""
        self._wanted = _read(header) if header.strip() else {}
        self._hashes = {name: hashlib.new(ALGORITHMS[name], usedforsecurity=False) for name in self._wanted}

    def take(self, data: bytes) -> None:
        """Count content as it is sent, before any Content-Encoding is undone."""
        for found in self._hashes.values():
            found.update(data)

    def check(self) -> None:
        """Raise ApiError (400) unless all that came has every digest that was promised."""
        for name, wanted in self._wanted.items():
            found = self._hashes[name].digest()
            if not hmac.compare_digest(found, wanted):
                raise ApiError(
                    400,
                    f"Content-Digest says {name} {_shown(wanted)}, and what came has {_shown(found)}; send it again",
                    param="content-digest",
                    code="digest_mismatch",
                )


def _read(header: str) -> dict[str, bytes]:
    """Raises ApiError."""
    wanted: dict[str, bytes] = {}
    for part in header.split(","):
        found = _MEMBER.fullmatch(part.strip())
        if found is None:
            raise _wrong(f"found {part.strip()[:100]!r}")
        name, value = found[1], found[2]
        if name not in ALGORITHMS:
            continue
        try:
            digest = base64.b64decode(value, validate=True)
        except binascii.Error:
            raise _wrong(f"{name} is not base64") from None
        size = hashlib.new(ALGORITHMS[name], usedforsecurity=False).digest_size
        if len(digest) != size:
            raise _wrong(f"{name} has {len(digest)} bytes, expected {size}")
        if wanted.setdefault(name, digest) != digest:
            raise _wrong(f"{name} is there twice, with different values")
    if not wanted:
        raise _wrong(f"none of its digests is of {' or '.join(ALGORITHMS)}")
    return wanted


def _wrong(why: str) -> ApiError:
    message = f"Content-Digest: {why}; expected sha-256=:BASE64: or sha-512=:BASE64: (RFC 9530), or no such header"
    return ApiError(400, message, param="content-digest", code="invalid_digest")


def _shown(digest: bytes) -> str:
    return f"{digest.hex()[:12]}..."
