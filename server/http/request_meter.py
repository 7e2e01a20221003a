"""One request while it comes: how much of it there is, against the bounds. Each method raises Refused beyond them."""

from __future__ import annotations

from loraplex.server.http.bounds import FREE_PIECES, MAX_TARGET, PIECE_BYTES, Bounds
from loraplex.server.http.refused import Refused


class RequestMeter:
    """The counts of one request. All sizes are bytes."""

    __slots__ = ("_bounds", "_fields", "_framing", "_pieces", "_unfinished", "body", "declared", "head", "raw")

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self.head = 0  # target and fields, those of trailers too
        self.declared = 0  # Content-Length
        self.raw = 0  # what is left of a body that the parser does not read
        self.body = 0
        self._fields = self._pieces = 0
        self._unfinished = 0  # of a field that has not ended
        self._framing = 0  # around the pieces of the body

    @property
    def largest(self) -> int:
        """The bytes of the head so far."""
        return max(self.head, self._unfinished)

    def add_target(self, size: int) -> None:
        """Count a part of the target."""
        self.head += size
        if self.head > MAX_TARGET:
            raise Refused(414, f"The target is longer than {MAX_TARGET} bytes.")

    def add_field(self, name: bytes, value: bytes) -> None:
        """Count a header field, or a trailer."""
        self._fields += 1
        self._unfinished = 0
        self.head += len(name) + len(value) + 4
        self._check_head()

    def add_unfinished(self, size: int) -> None:
        """Count bytes in which no field ended."""
        self._unfinished += size
        self._check_head()

    def check_parameters(self, target: bytes) -> None:
        """Check the whole target: frameworks take it apart for every route."""
        if target.count(b"&") >= self._bounds.header_count:
            raise Refused(414, f"The target has more than {self._bounds.header_count} parameters.")

    def add_piece(self, size: int) -> None:
        """Count a piece of the body; how large all may be together is the caller's to say."""
        self.body += size
        self._pieces += 1
        if self._pieces > FREE_PIECES + self.body // PIECE_BYTES:
            raise Refused(413, f"The body comes in pieces of under {PIECE_BYTES} bytes: send it in larger chunks.")

    def add_framing(self, size: int) -> None:
        """Count bytes that came with the body and are none of it."""
        self._framing += size
        if self._framing > self._bounds.head_bytes + self.body // 4:
            raise Refused(413, "The body is more framing than content: send it in larger chunks.")

    def _check_head(self) -> None:
        bounds = self._bounds
        if self._fields > bounds.header_count or self.largest > bounds.head_bytes:
            raise Refused(431, f"At most {bounds.header_count} header fields of {bounds.head_bytes} bytes are taken.")
