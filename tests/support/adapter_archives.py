"""The files of an adapter whose bytes nobody reads, in archives and in folders."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

CONFIG, WEIGHTS = b'{"peft_type": "LORA"}', os.urandom(700_000)
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}


def tar(files: dict[str, bytes], extra: Callable[[tarfile.TarFile], None] = lambda tar: None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
        extra(out)
    return buffer.getvalue()


def weights(folder: Path) -> bytes:
    """Of a folder with the two files and no others."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return (folder / "adapter_model.safetensors").read_bytes()
