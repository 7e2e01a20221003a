"""Adapters as they are sent: a folder's files as one body."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from loraplex.adapters.sources.remote import CONFIG_FILE, WEIGHTS_FILE
from loraplex.adapters.sources.spool import CONFIG_KEY

SAFETENSORS = {"content-type": "application/vnd.safetensors"}


def with_metadata(weights: bytes, **metadata: str) -> bytes:
    """The safetensors file with this `__metadata__` instead of its own."""
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    text = json.dumps({**header, "__metadata__": metadata}).encode()
    return len(text).to_bytes(8, "little") + text + weights[8 + length :]


def one_body(folder: Path) -> bytes:
    """The folder's adapter as one safetensors file, its config in the metadata."""
    config = (folder / CONFIG_FILE).read_text()
    return with_metadata((folder / WEIGHTS_FILE).read_bytes(), **{CONFIG_KEY: config})


def form(*parts: tuple[str, bytes], boundary: str = "b0undary", end: bool = True) -> tuple[dict[str, str], bytes]:
    """Headers and body of a multipart form, as RFC 7578 writes one."""
    lines = [
        f'--{boundary}\r\nContent-Disposition: form-data; filename="name=no"; name="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in parts
    ]
    body = b"".join(lines) + (f"--{boundary}--\r\n".encode() if end else b"")
    return {"content-type": f"multipart/form-data; boundary={boundary}"}, body


def content_digest(body: bytes, name: str = "sha-256") -> dict[str, str]:
    """The header that promises `body`."""
    found = hashlib.new(name.replace("-", ""), body).digest()
    return {"content-digest": f"{name}=:{base64.b64encode(found).decode()}:"}
